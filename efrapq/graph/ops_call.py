"""What an op function is given besides its tensors, and the element types both sides agree on.

An op is a pure function ``op(call, *inputs)``: `call` is the node as far as arithmetic needs it, the inputs are
tensors, or None where the node leaves an optional input out. It returns one tensor, or a tuple with one tensor
for each output. What it cannot do it says with a ValueError; the executor adds the node's name.

Source of everything in the ``ops_*`` modules: the ONNX operator specification, opsets 7 to 22 (later versions
of these operators only add element types).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

__all__ = ["DTYPES", "NARROW", "Call", "Op", "Result", "as_tensor", "element_type", "ints", "normalized"]

Result = Tensor | tuple[Tensor, ...]
Op = Callable[..., Result]

# ONNX element type → the torch dtype that holds it. 2- and 4-bit integers are held one to a byte.
DTYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.INT4: torch.int8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.INT2: torch.int8,
    ir.DataType.UINT2: torch.uint8,
}

# What torch holds one to a byte.
NARROW = {ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2}
_ELEMENT_TYPES = {dtype: kind for kind, dtype in DTYPES.items() if kind not in NARROW}


@dataclass(frozen=True)
class Call:
    """One node, as its op function sees it.

    opset: the version of the node's domain. outputs: how many outputs are asked for (trailing unnamed ones left
    out). device: where new float tensors belong. input_types: the element type the graph declares for each
    input, None where it declares none; it tells int4 from int8, which torch holds alike.
    """

    attributes: Mapping[str, ir.Attr]
    opset: int
    outputs: int
    device: torch.device
    input_types: tuple[ir.DataType | None, ...]

    def integer(self, name: str, default: int) -> int:
        return self.attributes[name].as_int() if name in self.attributes else default

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.integer(name, int(default)))

    def integers(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.attributes[name].as_ints()) if name in self.attributes else None

    def real(self, name: str, default: float) -> float:
        return self.attributes[name].as_float() if name in self.attributes else default

    def text(self, name: str, default: str) -> str:
        return self.attributes[name].as_string() if name in self.attributes else default

    def required(self, name: str) -> ir.Attr:
        if name not in self.attributes:
            raise ValueError(f"the attribute {name} is missing")
        return self.attributes[name]

    def axes(self, given: Tensor | None, *, input_since: int) -> tuple[int, ...] | None:
        """The axes of a reduction, Squeeze or Unsqueeze: an attribute before opset `input_since`, then an input."""
        if self.opset < input_since:
            return self.integers("axes")
        return None if given is None else ints(given)


def ints(tensor: Tensor) -> tuple[int, ...]:
    """The numbers in a tensor that describes shapes, axes or indices."""
    return tuple(int(number) for number in tensor.reshape(-1).tolist())


def normalized(axis: int, rank: int) -> int:
    """A non-negative axis; ValueError for one that a tensor of that rank does not have."""
    if not -rank <= axis < max(rank, 1):
        raise ValueError(f"axis {axis} does not exist in a tensor of rank {rank}")
    return axis + rank if axis < 0 else axis


def element_type(tensor: Tensor) -> ir.DataType:
    """The ONNX element type of a torch tensor (int8 and uint8 for what may be narrower)."""
    if tensor.dtype not in _ELEMENT_TYPES:
        raise ValueError(f"ONNX has no element type for {tensor.dtype}")
    return _ELEMENT_TYPES[tensor.dtype]


def as_tensor(constant: ir.TensorProtocol) -> Tensor:
    """A copy of an ONNX tensor on the CPU; ValueError for element types that torch does not hold here."""
    if constant.dtype not in DTYPES:
        raise ValueError(f"tensors of type {constant.dtype.name} are not supported")
    array = constant.numpy()
    dtype = DTYPES[constant.dtype]
    if constant.dtype == ir.DataType.BFLOAT16:  # numpy has no bfloat16 of its own
        return torch.from_numpy(array.view(np.int16).copy()).view(dtype)
    if constant.dtype in NARROW:
        array = array.astype(np.int8 if dtype == torch.int8 else np.uint8)
    # ascontiguousarray would turn a scalar into a vector.
    return torch.from_numpy(np.array(array, order="C"))
