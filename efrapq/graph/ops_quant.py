"""Cast, CastLike, QuantizeLinear and DequantizeLinear.

Rounding is half to even, values past the range saturate, arithmetic is that of the scale's type. int4 and uint4
are held in int8 and uint8 tensors, one value a byte; the graph's declared types tell them apart.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from efrapq.graph.ops_call import DTYPES, NARROW, Call, Op, element_type, normalized

__all__ = ["CODE_RANGES", "QUANT_OPS", "aligned", "code_type"]

# Lowest and highest code of each type.
CODE_RANGES: dict[ir.DataType, tuple[int, int]] = {
    ir.DataType.INT2: (-2, 1),
    ir.DataType.UINT2: (0, 3),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-(2**15), 2**15 - 1),
    ir.DataType.UINT16: (0, 2**16 - 1),
}


def _cast(call: Call, x: Tensor) -> Tensor:
    return _converted(call, x, ir.DataType(call.required("to").as_int()))


def _cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor:
    return _converted(call, x, _declared(call, 1) or element_type(like))


def _converted(call: Call, x: Tensor, kind: ir.DataType) -> Tensor:
    if kind not in DTYPES:
        raise ValueError(f"casting to {kind.name} is not supported")
    dtype = DTYPES[kind]
    if kind in NARROW:  # the low bits are kept, as in every narrowing cast
        low, high = CODE_RANGES[kind]
        return ((x.to(torch.int32) - low) % (high - low + 1) + low).to(dtype)
    return x.to(call.device, dtype) if dtype.is_floating_point else x.to(dtype)


def code_type(call: Call, zero_point: Tensor | None) -> ir.DataType:
    """The type that a QuantizeLinear node quantizes to. Raises ValueError for one that holds no integers."""
    kind = ir.DataType(call.integer("output_dtype", 0))
    if kind == ir.DataType.UNDEFINED:
        kind = _declared(call, 2) or (ir.DataType.UINT8 if zero_point is None else element_type(zero_point))
    if kind not in CODE_RANGES:
        raise ValueError(f"quantizing to {kind.name} is not supported")
    return kind


def _quantize_linear(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """saturate(round(x / scale) + zero_point); x of any shape, one scale for all, an axis, or blocks of an axis."""
    kind = code_type(call, zero_point)
    x = x if x.is_floating_point() else x.to(torch.float32)
    codes = torch.round(x / aligned(call, scale, x).to(x.dtype))
    if zero_point is not None:
        codes = codes + aligned(call, zero_point, x).to(x.dtype)
    return codes.clamp(*CODE_RANGES[kind]).to(DTYPES[kind])


def _dequantize_linear(call: Call, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """(codes - zero_point) · scale, in the type of the scale."""
    difference = codes.to(torch.int32)
    if zero_point is not None:
        difference = difference - aligned(call, zero_point, codes).to(torch.int32)
    kind = ir.DataType(call.integer("output_dtype", 0))
    reals = difference.to(scale.dtype) * aligned(call, scale, codes)
    return reals if kind == ir.DataType.UNDEFINED else reals.to(DTYPES[kind])


def _declared(call: Call, index: int) -> ir.DataType | None:
    return call.input_types[index] if index < len(call.input_types) else None


def aligned(call: Call, parameter: Tensor, x: Tensor) -> Tensor:
    """A scale or zero point in a shape that broadcasts against x."""
    if parameter.numel() == 1 and parameter.dim() <= 1:
        return parameter.reshape(())
    axis = normalized(call.integer("axis", 1), x.dim())
    if parameter.dim() == 1:
        return parameter.reshape(-1, *(1,) * (x.dim() - axis - 1))
    block = call.integer("block_size", 0)
    if not block:
        raise ValueError(f"a scale or zero point of shape {tuple(parameter.shape)} without a block size")
    return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])


QUANT_OPS: dict[str, Op] = {
    "Cast": _cast,
    "CastLike": _cast_like,
    "DequantizeLinear": _dequantize_linear,
    "QuantizeLinear": _quantize_linear,
}
