"""What a model takes: its inputs by name, with their types and dimensions, and which of them hold samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from efrapq.errors import UnsupportedModelError
from efrapq.io.text import printable
from efrapq.preprocess import Layout, layout_of

if TYPE_CHECKING:
    import onnx

__all__ = [
    "ModelInput",
    "fixed_batch",
    "image_layout",
    "layout_words",
    "model_inputs",
    "sample_axes",
    "signature_words",
    "takes_images",
]

# ONNX element types that inputs may have (TensorProto.DataType), as NumPy knows them.
ELEMENT_TYPES: dict[int, np.dtype[np.generic]] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    4: np.dtype(np.uint16),
    5: np.dtype(np.int16),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    9: np.dtype(np.bool_),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    # NumPy has no bfloat16: a model that takes it is quantized as one that takes float32 (see `efrapq.graph.widen`).
    16: np.dtype(np.float32),
}
IMAGE_TYPES = (np.float32, np.float16)


@dataclass(frozen=True)
class ModelInput:
    """One input. dims: its sizes, names of dynamic ones, None for those without a name; None if not even the rank is
    known.
    """

    name: str
    dtype: np.dtype[np.generic]
    dims: tuple[int | str | None, ...] | None

    @property
    def is_float(self) -> bool:
        return self.dtype.kind == "f"

    def words(self) -> str:
        """As messages show it: 'ids' int64 (N, 128)."""
        return f"'{printable(self.name)}' {self.dtype} {self.dims_words()}"

    def dims_words(self) -> str:
        if self.dims is None:
            return "of any shape"
        shown = ["any" if d is None else printable(d, 40) for d in self.dims]
        return f"({', '.join(shown)}{',' if len(shown) == 1 else ''})"


def model_inputs(proto: onnx.ModelProto, name: str) -> list[ModelInput]:
    """The inputs that a caller has to give. Raises UnsupportedModelError for none, and for those that are no tensors
    of numbers.
    """
    constants = {t.name for t in proto.graph.initializer}
    found = []
    for value in proto.graph.input:
        if value.name in constants:
            continue
        kind = value.type.tensor_type
        dtype = ELEMENT_TYPES.get(kind.elem_type) if value.type.HasField("tensor_type") else None
        if dtype is None:
            raise UnsupportedModelError(
                f"{name}: its input '{printable(value.name)}' is not a tensor of float, integer or bool numbers"
            )
        dims = None
        if kind.HasField("shape"):
            dims = tuple(d.dim_value if d.dim_value > 0 else d.dim_param.strip("?") or None for d in kind.shape.dim)
        found.append(ModelInput(value.name, dtype, dims))
    if not found:
        raise UnsupportedModelError(f"{name}: has no inputs: there is nothing to calibrate on")
    return found


def takes_images(inputs: Sequence[ModelInput]) -> bool:
    """Whether the model takes one float batch (N, C, H, W) or (N, H, W, C) and nothing else."""
    return len(inputs) == 1 and inputs[0].dtype in IMAGE_TYPES and len(inputs[0].dims or ()) == 4


def image_layout(inputs: Sequence[ModelInput]) -> Layout:
    """The layout of a model's images: see `efrapq.preprocess.layout_of`. inputs: of a model that takes images."""
    return layout_of(inputs[0].dims or ())


def fixed_batch(inputs: Sequence[ModelInput]) -> int | None:
    """The number of samples that the model takes at once; None if that is dynamic.

    Where no input has a dynamic first axis, it is the first size that most of them share.
    """
    first = [i.dims[0] if i.dims else None for i in inputs if i.dims != ()]
    if not first or not all(isinstance(d, int) for d in first):
        return None
    counted = Counter(d for d in first if isinstance(d, int))
    return counted.most_common(1)[0][0]


def sample_axes(inputs: Sequence[ModelInput]) -> dict[str, int | None]:
    """Input name → the axis that counts samples, None where there is none.

    It is the first axis. Inputs in which that has another size are the same for all samples (a scalar such as a
    sampling rate, the state of a model with a fixed batch), unless the batch is dynamic and they carry it further
    behind, as the state of a recurrent network: see `_inner_axis`.
    """
    batch = fixed_batch(inputs)
    if batch is not None:
        return {given.name: 0 if given.dims and given.dims[0] == batch else None for given in inputs}
    first = [given for given in inputs if given.dims is None or (given.dims and not isinstance(given.dims[0], int))]
    return {given.name: 0 if given in first else _inner_axis(given, first) for given in inputs}


def _inner_axis(given: ModelInput, first: Sequence[ModelInput]) -> int | None:
    """The axis behind the first on which an input carries the dynamic batch; None where that is not certain.

    first: the inputs with the batch in front. The axis is the one with a name of theirs, or else the only dynamic one,
    unless it has a name and that says otherwise.
    """
    dims = given.dims or ()
    dynamic = [axis for axis, dim in enumerate(dims) if not isinstance(dim, int)]
    batch = {other.dims[0] for other in first if other.dims} - {None}
    named = [axis for axis in dynamic if dims[axis] in batch]
    if len(named) == 1:
        return named[0]
    if len(dynamic) != 1:
        return None
    name = dims[dynamic[0]]
    elsewhere = {dim for other in first if other.dims for dim in other.dims[1:]}
    return dynamic[0] if name is None or (not batch and name not in elsewhere) else None


def signature_words(inputs: Sequence[ModelInput]) -> str:
    """All inputs, as messages show them."""
    return ", ".join(given.words() for given in inputs[:10]) + (", …" if len(inputs) > 10 else "")


def layout_words(inputs: Sequence[ModelInput]) -> str:
    """All inputs and where their samples are counted, behind "one array per input, "."""
    inner = [f"of '{printable(name)}' axis {axis}" for name, axis in sample_axes(inputs).items() if axis]
    but = f" ({', '.join(inner[:10])})" if inner else ""
    return f"first axis the samples{but}: {signature_words(inputs)}"
