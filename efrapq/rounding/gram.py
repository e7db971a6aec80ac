"""Gram matrices xᵀx of many rows: half the products where the result is symmetric, and exact where x are codes.

Activation codes are integers of eight bits, so their Gram matrix is one of integers. Where the CPU multiplies such
integers (VNNI), it is computed exactly, several times faster than in float32, and does not depend on how the rows
were cut into chunks.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["MOST_ROWS", "exact_integers", "gram_", "gram_codes_", "mirror_"]

# Columns a panel: products below the diagonal panels are never computed.
PANEL = 512
# So many products of two signed bytes, 128² at most, fit the int32 that adds them up.
MOST_ROWS = (2**31 - 1) // 128**2


@functools.cache
def exact_integers() -> bool:
    """Whether torch multiplies int8 matrices exactly here. Without VNNI, pair sums saturate at int16."""
    if not hasattr(torch, "_int_mm") or not torch.cpu.is_available():
        return False
    found: dict[str, object] = dict(torch.cpu.get_capabilities())
    return bool(found.get("avx512_vnni") or found.get("avx_vnni") or found.get("avx2_vnni"))


def gram_(total: Tensor, x: Tensor) -> None:
    """total += xᵀx on and above the diagonal panels. total: (G, D, D) float64; x: (G, R, D) float32."""
    size = x.shape[2]
    for a in range(0, size, PANEL):
        b = min(a + PANEL, size)
        total[:, a:b, a:] += x[:, :, a:b].transpose(1, 2) @ x[:, :, a:]


def gram_codes_(total: Tensor, codes: Tensor, zero_point: int) -> None:
    """total += (q - z)ᵀ(q - z), exactly. total: (D, D) float64; codes q: (R, D) uint8, at most MOST_ROWS rows."""
    if len(codes) > MOST_ROWS:
        raise ValueError(f"at most {MOST_ROWS} rows at once")
    signed = (codes ^ 128).view(torch.int8)  # q - 128
    shift = 128 - zero_point  # q - z = (q - 128) + shift
    sums = signed.sum(0, dtype=torch.int64).double()
    size = codes.shape[1]
    for a in range(0, size, PANEL):
        b = min(a + PANEL, size)
        total[a:b, a:] += torch._int_mm(_dense(signed[:, a:b].t()), _dense(signed[:, a:]))
        total[a:b, a:] += shift * (sums[a:b, None] + sums[a:]) + float(len(codes) * shift * shift)


def _dense(x: Tensor) -> Tensor:
    """Rows one after another, and strides that say so: the product believes even the stride of a dimension of one
    (pytorch/pytorch#195066), which `contiguous` leaves as it is."""
    return x.clone(memory_format=torch.contiguous_format)


def mirror_(total: Tensor) -> Tensor:
    """Fill in what was not computed below the diagonal panels, in place. total: (…, D, D)."""
    size = total.shape[-1]
    for a in range(0, size, PANEL):
        b = min(a + PANEL, size)
        total[..., b:, a:b] = total[..., a:b, b:].transpose(-1, -2)
    return total
