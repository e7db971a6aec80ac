"""One ONNX tensor: how many bytes it must have, and whether its numbers are numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from efrapq.errors import CorruptFileError, LimitError, UnsupportedModelError
from efrapq.io.limits import Limits
from efrapq.io.text import printable

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

__all__ = ["check_empty", "check_length", "check_stored", "non_finite", "raw_bytes"]

# Data type → bits of an element, the typed field that may hold it, and elements to an entry of that field
# (a complex number takes two entries, written as a negative count).
_TYPES: dict[str, tuple[int, str, int]] = {
    "FLOAT": (32, "float_data", 1),
    "DOUBLE": (64, "double_data", 1),
    "FLOAT16": (16, "int32_data", 1),
    "BFLOAT16": (16, "int32_data", 1),
    "COMPLEX64": (64, "float_data", -2),
    "COMPLEX128": (128, "double_data", -2),
    "INT64": (64, "int64_data", 1),
    "UINT64": (64, "uint64_data", 1),
    "INT32": (32, "int32_data", 1),
    "UINT32": (32, "uint64_data", 1),
    "INT16": (16, "int32_data", 1),
    "UINT16": (16, "int32_data", 1),
    "INT8": (8, "int32_data", 1),
    "UINT8": (8, "int32_data", 1),
    "BOOL": (8, "int32_data", 1),
    "INT4": (4, "int32_data", 2),
    "UINT4": (4, "int32_data", 2),
    "INT2": (2, "int32_data", 4),
    "UINT2": (2, "int32_data", 4),
    "FLOAT8E4M3FN": (8, "int32_data", 1),
    "FLOAT8E4M3FNUZ": (8, "int32_data", 1),
    "FLOAT8E5M2": (8, "int32_data", 1),
    "FLOAT8E5M2FNUZ": (8, "int32_data", 1),
    "FLOAT8E8M0": (8, "int32_data", 1),
    "FLOAT4E2M1": (4, "int32_data", 2),
    "STRING": (0, "string_data", 1),
}
_FIELDS = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data")
_CHUNK = 1 << 24


def raw_bytes(tensor: onnx.TensorProto, where: str, name: str, limits: Limits) -> int:
    """Return the bytes that the elements of `tensor` take, packed as ONNX packs them (0 for strings).

    Raises CorruptFileError for negative dimensions and unknown types, LimitError for too many elements,
    UnsupportedModelError for types that efrapq does not know.
    """
    bits, _, _ = _TYPES[_type_name(tensor, where, name)]
    return (_elements(tensor, where, name, limits) * bits + 7) // 8


def check_stored(tensor: onnx.TensorProto, where: str, name: str, limits: Limits) -> None:
    """Check that a tensor without external data holds exactly as much as its dimensions say.

    Raises as `raw_bytes`, and CorruptFileError where the data are too short, too long, or there twice.
    """
    type_name = _type_name(tensor, where, name)
    _, typed, per_entry = _TYPES[type_name]
    elements = _elements(tensor, where, name, limits)
    filled = [f for f in _FIELDS if len(getattr(tensor, f))]
    raw = tensor.HasField("raw_data")
    if tensor.HasField("segment"):
        raise CorruptFileError(f"{name}: {where} is stored in segments, which no ONNX version reads; export it again")
    if (raw and (filled or type_name == "STRING")) or len(filled) > 1 or (filled and filled != [typed]):
        raise CorruptFileError(f"{name}: {where} holds its data in a wrong field or more than once; export it again")
    if raw:
        check_length(tensor, len(tensor.raw_data), where, name, limits)
    else:
        expected = -elements * per_entry if per_entry < 0 else -(-elements // per_entry)
        _require_count(tensor, expected, len(getattr(tensor, typed)), "entries", where, name)


def check_length(tensor: onnx.TensorProto, length: int, where: str, name: str, limits: Limits) -> None:
    """Check that so many bytes of raw data are what the dimensions say; raises as `raw_bytes`, and CorruptFileError."""
    _require_count(tensor, raw_bytes(tensor, where, name, limits), length, "bytes", where, name)


def _require_count(tensor: Any, expected: int, actual: int, unit: str, where: str, name: str) -> None:
    if expected != actual:
        raise CorruptFileError(
            f"{name}: {where} of shape {_shape(tensor)} needs {expected:,} {unit} and has {actual:,}; export it again"
        )


def check_empty(tensor: onnx.TensorProto, where: str, name: str) -> None:
    """Check that a tensor whose data lie in a file holds none of its own; CorruptFileError if it does."""
    if tensor.HasField("segment") or tensor.HasField("raw_data") or any(len(getattr(tensor, f)) for f in _FIELDS):
        raise CorruptFileError(f"{name}: {where} holds its data in a wrong field or more than once; export it again")


def non_finite(tensor: onnx.TensorProto, data: NDArray[np.uint8] | None = None) -> str:
    """Return "NaN", "infinity" or "" for what is worst in a checked tensor of any type.

    data: its bytes, where it does not hold them itself.
    """
    import numpy as np
    import onnx

    formats: dict[int, tuple[str, int, int]] = {
        # Bit patterns make one rule for all: all exponent bits set is infinity, and any more is NaN.
        onnx.TensorProto.FLOAT: ("<u4", 0x7FFFFFFF, 0x7F800000),
        onnx.TensorProto.DOUBLE: ("<u8", 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
        onnx.TensorProto.FLOAT16: ("<u2", 0x7FFF, 0x7C00),
        onnx.TensorProto.BFLOAT16: ("<u2", 0x7FFF, 0x7F80),
    }
    if tensor.data_type not in formats:
        return ""
    dtype, magnitude, infinity = formats[tensor.data_type]
    if data is not None:
        bits = data.view(dtype)
    elif tensor.HasField("raw_data"):
        bits = np.frombuffer(tensor.raw_data, dtype=dtype)
    elif tensor.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
        bits = np.array(tensor.int32_data, dtype=np.int32).astype(dtype)
    elif tensor.data_type == onnx.TensorProto.FLOAT:
        bits = np.array(tensor.float_data, dtype="<f4").view(dtype)
    else:
        bits = np.array(tensor.double_data, dtype="<f8").view(dtype)
    largest = max((int((bits[i : i + _CHUNK] & magnitude).max()) for i in range(0, bits.size, _CHUNK)), default=0)
    return "" if largest < infinity else "infinity" if largest == infinity else "NaN"


def _type_name(tensor: Any, where: str, name: str) -> str:
    import onnx

    values: dict[int, str] = {number: key for key, number in onnx.TensorProto.DataType.items()}
    type_name = values.get(tensor.data_type, "UNDEFINED")
    if type_name == "UNDEFINED":
        raise CorruptFileError(f"{name}: {where} is of an unknown data type ({tensor.data_type}); export it again")
    if type_name not in _TYPES:
        raise UnsupportedModelError(f"{name}: {where} is of type {printable(type_name)}; export the model as float32")
    return type_name


def _elements(tensor: Any, where: str, name: str, limits: Limits) -> int:
    dims = list(tensor.dims)
    if any(d < 0 for d in dims):
        raise CorruptFileError(f"{name}: {where} has a negative dimension in {_shape(tensor)}; export it again")
    # Python's integers do not overflow, so a product made to wrap around to something small shows as what it is.
    if math.prod(d or 1 for d in dims) > limits.max_tensor_elements:
        raise LimitError(f"{name}: {where} of shape {_shape(tensor)} has too many elements; use a smaller model")
    return math.prod(dims)


def _shape(tensor: Any) -> str:
    return printable(list(tensor.dims), 80)
