"""What a model takes: its inputs by name, with their types and dimensions, and which of them hold samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from efrapq.errors import UnsupportedModelError
from efrapq.io.text import printable

if TYPE_CHECKING:
    import onnx

__all__ = ["ModelInput", "fixed_batch", "holds_samples", "model_inputs", "signature_words", "takes_images"]

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
}


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
    """Whether the model takes one float batch (N, C, H, W) and nothing else."""
    return len(inputs) == 1 and inputs[0].dtype == np.float32 and len(inputs[0].dims or ()) == 4


def fixed_batch(inputs: Sequence[ModelInput]) -> int | None:
    """The number of samples that the model takes at once; None if that is dynamic.

    Where no input has a dynamic first axis, it is the first size that most of them share.
    """
    first = [i.dims[0] if i.dims else None for i in inputs if i.dims != ()]
    if not first or not all(isinstance(d, int) for d in first):
        return None
    counted = Counter(d for d in first if isinstance(d, int))
    return counted.most_common(1)[0][0]


def holds_samples(given: ModelInput, batch: int | None) -> bool:
    """Whether the first axis of an input counts samples. batch: the model's `fixed_batch`.

    Other inputs are the same for all samples: a scalar such as a sampling rate, a state whose first axis is another.
    """
    if given.dims is None:
        return True
    if not given.dims:
        return False
    return given.dims[0] == batch if batch is not None else not isinstance(given.dims[0], int)


def signature_words(inputs: Sequence[ModelInput]) -> str:
    """All inputs, as messages show them."""
    return ", ".join(given.words() for given in inputs[:10]) + (", …" if len(inputs) > 10 else "")
