"""QuantizeLinear and DequantizeLinear with a gradient: that of the reals behind the codes.

Rounding has no gradient anywhere. The straight-through estimator (Bengio et al. 2013, arXiv 1308.3432) takes that of
the identity instead, and none where a value is clipped: past the grid nothing that the value does is seen. The values
are the exact ones, bit for bit.
"""

from __future__ import annotations

from torch import Tensor

from efrapq.graph.ops_call import Call, Op
from efrapq.graph.ops_quant import CODE_RANGES, QUANT_OPS, aligned, code_type

__all__ = ["STRAIGHT_THROUGH"]


def _quantize(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Codes as reals, where x has a gradient; else what QuantizeLinear gives."""
    codes = QUANT_OPS["QuantizeLinear"](call, x, scale, zero_point)
    assert isinstance(codes, Tensor)
    if not x.requires_grad:
        return codes
    reals = x / aligned(call, scale, x)
    if zero_point is not None:
        reals = reals + aligned(call, zero_point, x).to(x.dtype)
    reals = reals.clamp(*CODE_RANGES[code_type(call, zero_point)])
    return reals + (codes.to(x.dtype) - reals).detach()


def _dequantize(call: Call, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """(codes - zero_point) · scale, of codes that may be held as reals."""
    if not codes.is_floating_point():
        reals = QUANT_OPS["DequantizeLinear"](call, codes, scale, zero_point)
        assert isinstance(reals, Tensor)
        return reals
    if zero_point is not None:
        codes = codes - aligned(call, zero_point, codes).to(codes.dtype)
    return codes * aligned(call, scale, codes)


# In place of the operators of this name: see `Executor`.
STRAIGHT_THROUGH: dict[tuple[str, str], Op] = {
    ("", "QuantizeLinear"): _quantize,
    ("", "DequantizeLinear"): _dequantize,
}
