"""Large initializers of a model, written as one file of external data beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

__all__ = ["DataSource", "OnnxParts"]

# A multiple of every page size in use, so that readers can map each tensor by itself.
ALIGNMENT = 65536


class DataSource(Protocol):
    """The data of one initializer, packed as ONNX packs them. length: bytes."""

    @property
    def length(self) -> int: ...

    def read(self) -> NDArray[np.uint8]:
        """All of them."""
        ...


@dataclass(frozen=True)
class OnnxParts:
    """A model for one or two files. graph: all of it but the data of the initializers in `outside`, by name; these
    are external there, and do not say where they lie.
    """

    graph: onnx.ModelProto
    outside: Mapping[str, DataSource]

    def located(self, location: str) -> onnx.ModelProto:
        """The model with its data in the file `location` beside it, as `data` makes it."""
        from onnx import ModelProto

        copy = ModelProto()
        copy.CopyFrom(self.graph)
        end = 0
        for tensor in copy.graph.initializer:
            if tensor.name in self.outside:
                length = self.outside[tensor.name].length
                offset = _aligned(end)
                end = offset + length
                tensor.ClearField("external_data")
                for key, value in (("location", location), ("offset", offset), ("length", length)):
                    tensor.external_data.add(key=key, value=str(value))
        return copy

    def data(self) -> Iterator[bytes | memoryview]:
        """The content of that file, piece by piece: initializers in the model's order, one in memory at a time."""
        end = 0
        for tensor in self.graph.graph.initializer:
            if tensor.name in self.outside:
                offset = _aligned(end)
                yield bytes(offset - end)
                end = offset + self.outside[tensor.name].length
                yield self.outside[tensor.name].read().data

    def write(self, path: Path, location: str) -> Path:
        """Write both files, into a folder of our own: the model to `path`, its data beside it. Raises OSError."""
        with open(path.with_name(location), "wb") as file:
            for part in self.data():
                file.write(part)
        path.write_bytes(self.located(location).SerializeToString(deterministic=True))
        return path


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
