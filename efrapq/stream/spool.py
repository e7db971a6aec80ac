"""Activations by name and chunk: in memory up to a limit, in temporary files past it.

A file holds exactly what memory would have, so the limit decides where the numbers lie and never what they are. Nor
what comes of them: strides and alignment can decide in which order a product is summed, so all tensors are kept the
way that one out of a file lies.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from efrapq.errors import OutputError
from efrapq.io.text import printable

__all__ = ["Spool"]

# Bytes: what torch allocates on the CPU starts at a multiple of it.
ALIGNMENT = 64


class _Filed:
    """A plain tensor in a file of its own."""

    def __init__(self, path: Path, tensor: Tensor) -> None:
        self.path, self.shape, self.dtype, self.device = path, tensor.shape, tensor.dtype, tensor.device
        with open(path, "wb") as file:  # not tofile, which does not always notice that the disk is full
            file.write(tensor.cpu().flatten().numpy().data)

    def read(self) -> Tensor:
        flat = torch.empty(self.shape.numel(), dtype=self.dtype)
        with open(self.path, "rb") as file:
            if file.readinto(flat.numpy().data) != flat.nbytes:
                raise OSError(f"{self.path}: is shorter than what was written")
        return flat.view(self.shape).to(self.device)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor row by row, aligned as torch aligns its own; itself where it is so."""
    if tensor.data_ptr() % ALIGNMENT or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.flatten().view(tensor.shape)  # the strides of dimensions of one, too


class Spool:
    """Lists of tensors under names. A context manager: what it put on the disk goes when it is left.

    limit: bytes kept in memory, None for no limit. What comes in past it goes to a file: the pass reads all chunks
    of a value in order, again and again, and then the first ones are worth more than the last.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.held = 0
        self.filed = 0
        self._values: dict[str, list[Tensor | _Filed | None]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._values.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def names(self) -> set[str]:
        """The names under which anything is kept."""
        return set(self._values)

    def chunks(self, name: str) -> int:
        """How many tensors there are under a name."""
        return len(self._values.get(name, ()))

    def get(self, name: str, chunk: int) -> Tensor:
        """One tensor, as it was put in."""
        found = self._values[name][chunk]
        if found is None:
            raise KeyError(f"chunk {chunk} of {name} is gone")
        return found.read() if isinstance(found, _Filed) else found

    def start(self, name: str) -> None:
        """Begin an empty list under a name, in place of what was there."""
        self.drop(name)
        self._values[name] = []

    def append(self, name: str, tensor: Tensor) -> None:
        """Add the next chunk. Raises OutputError where a file cannot hold it."""
        self._values[name].append(self._placed(tensor))

    def release(self, name: str, chunk: int) -> None:
        """Forget one chunk, keeping the places of the others."""
        self._forget(self._values[name][chunk])
        self._values[name][chunk] = None

    def drop(self, name: str) -> None:
        """Forget a name and all its chunks."""
        for held in self._values.pop(name, []):
            self._forget(held)

    def _placed(self, tensor: Tensor) -> Tensor | _Filed:
        tensor = _plain(tensor)
        size = tensor.numel() * tensor.element_size()
        if self.limit is None or self.held + size <= self.limit:
            self.held += size
            return tensor
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="efrapq-")
            self._count += 1
            filed = _Filed(Path(self._folder.name) / str(self._count), tensor)
        except OSError as exc:
            raise OutputError(
                f"{printable(tempfile.gettempdir())}: activations cannot be kept there ({exc.strerror or exc}); "
                "point TMPDIR elsewhere, or use a larger --memory or a smaller --calib-size"
            ) from exc
        self.filed += size
        return filed

    def _forget(self, held: Tensor | _Filed | None) -> None:
        if isinstance(held, _Filed):
            with contextlib.suppress(FileNotFoundError):
                held.path.unlink()
        elif held is not None:
            self.held -= held.numel() * held.element_size()
