"""Tensors from untrusted files: whether they are what they say, and no larger than what holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from efrapq.errors import (
    AlreadyQuantizedError,
    BadWeightsError,
    CorruptFileError,
    LimitError,
    UnsupportedModelError,
)
from efrapq.io.limits import Limits
from efrapq.io.text import listing, printable

if TYPE_CHECKING:
    import torch

__all__ = ["plain_tensors", "require_finite"]

# Copies of views may take this much whatever the size of the file.
_SLACK = 1 << 20


def plain_tensors(
    tensors: Mapping[str, torch.Tensor], file: str, stored: int, limits: Limits
) -> dict[str, torch.Tensor]:
    """Return `tensors` as plain ones: on the CPU, detached, contiguous, of their own dtype.

    `stored` is the number of bytes of the file they came from; `file` is its name in messages. Raises
    AlreadyQuantizedError for quantized tensors, UnsupportedModelError for sparse, nested, meta and complex ones
    and dtypes below 16 bits that are not integers, LimitError for tensors that would be far larger in memory than
    in the file, CorruptFileError for one that reaches outside its storage. Each names the tensor.
    """
    import torch

    plain: dict[str, torch.Tensor] = {}
    copied = 0
    for key, tensor in tensors.items():
        _require_strided(key, tensor, file)
        if tensor.numel() > limits.max_tensor_elements:
            raise LimitError(
                f"{file}: tensor '{printable(key)}' has {tensor.numel():,} elements; "
                f"the limit is {limits.max_tensor_elements:,}"
            )
        _require_inside(key, tensor, file)
        if not tensor.is_contiguous() or tensor.is_neg():
            # Only here does a view become as large as it claims to be.
            copied += tensor.numel() * tensor.element_size()
            if copied > min(limits.max_total_bytes, limits.max_expansion * stored + _SLACK):
                raise LimitError(
                    f"{file}: tensor '{printable(key)}' of shape {list(tensor.shape)} is an expanded view, far larger "
                    f"than the data stored for it; save a contiguous copy"
                )
        with torch.no_grad():
            plain[key] = tensor.detach().cpu().resolve_neg().contiguous()
    return plain


def require_finite(tensors: Mapping[str, torch.Tensor], file: str = "the model") -> None:
    """Raise BadWeightsError, naming the first offenders, if a floating tensor holds NaN or infinity.

    `tensors` maps names to dense CPU tensors of any dtype and shape; `file` is what messages call their origin.
    """
    bad = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not _finite(tensor)]
    if bad:
        raise BadWeightsError(f"{file}: NaN or infinity in {listing(bad)}; get weights from before the training broke")


def _finite(tensor: torch.Tensor) -> bool:
    # NaN goes through to both ends of the range. A mask of isfinite() would take several times as long.
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.detach().aminmax())


def _require_strided(key: str, tensor: torch.Tensor, file: str) -> None:
    import torch

    plain_types = (torch.Tensor, torch.nn.Parameter)
    if tensor.is_quantized:
        raise AlreadyQuantizedError(f"{file}: tensor '{printable(key)}' is quantized; give the float model")
    if tensor.is_meta:
        kind = "a meta tensor, which has no data"
    elif tensor.layout is not torch.strided or tensor.is_nested:
        kind = "sparse or nested"
    elif type(tensor) not in plain_types:
        kind = f"of the special type {printable(type(tensor).__name__)}"
    elif tensor.dtype not in _dtypes():
        kind = f"of type {printable(tensor.dtype)}"
    else:
        return
    raise UnsupportedModelError(f"{file}: tensor '{printable(key)}' is {kind}; save it as a dense float tensor")


def _dtypes() -> frozenset[torch.dtype]:
    import torch

    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    signed = (torch.int64, torch.int32, torch.int16, torch.int8)
    return frozenset((*floats, *signed, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool))


def _require_inside(key: str, tensor: torch.Tensor, file: str) -> None:
    """Check with numbers that cannot overflow that every element lies in the tensor's storage."""
    shape, strides, offset = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
    if math.prod(shape) == 0:
        return
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    available = tensor.untyped_storage().nbytes() // tensor.element_size()
    if offset < 0 or min(strides, default=0) < 0 or last >= available:
        raise CorruptFileError(f"{file}: tensor '{printable(key)}' reaches outside the data stored for it")
