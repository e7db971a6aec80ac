"""ONNX external data: files that a model names, read only from the model's own directory.

A path from a model is an order from a stranger. It may name a plain file below the model's directory and nothing
else: every component is looked at before it is opened, relative to the directory opened before it, and links of
either kind are refused. Each file is read from end to end and hashed when the model is loaded.

Small data go into the model, and nothing later follows a path for them. Where a model is too large for that, its
large initializers stay in their files (`FileTensor`) and are read again when they are needed, one at a time, always
into memory of our own: what was hashed is what is used, whoever writes to the file meanwhile. A memory map would show
such a change, and end the process when the file becomes shorter.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from efrapq.errors import CorruptFileError, InputError, LimitError, UnsafeFileError
from efrapq.io.limits import Limits
from efrapq.io.onnx_tensor import check_empty, raw_bytes
from efrapq.io.source import open_regular, stream_fd
from efrapq.io.text import printable

if TYPE_CHECKING:
    import onnx

__all__ = ["External", "FileTensor", "data_as_inputs", "in_own_file", "take_external"]

_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_FILE = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
# Windows cannot open relative to a directory.
_RELATIVE = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd
_CHUNK = 1 << 24


class _Holder(Protocol):
    """A file in which tensors lie. name: as messages call it."""

    @property
    def name(self) -> str: ...

    def open(self, wanted: Sequence[_Ranged]) -> int:
        """Its descriptor."""
        ...


class _Ranged(Protocol):
    """What wants the bytes of a file up to `end`."""

    @property
    def where(self) -> str: ...

    @property
    def end(self) -> int: ...


@dataclass(frozen=True)
class _Slice:
    tensor: Any
    where: str
    location: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True)
class FileTensor:
    """A tensor whose data stay in their file. data_type: of ONNX (TensorProto.DataType). length: bytes, packed as ONNX
    packs them. sha256: of these bytes when the model was loaded.
    """

    name: str
    data_type: int
    dims: tuple[int, ...]
    offset: int
    length: int
    sha256: str
    where: str
    _file: _Holder

    @property
    def end(self) -> int:
        return self.offset + self.length

    def read(self) -> NDArray[np.uint8]:
        """The bytes, in memory that is the caller's alone.

        Raises CorruptFileError if they are no longer those that were hashed, and what opening raises: the path is
        looked at as it was the first time.
        """
        name = self._file.name
        data = np.empty(self.length, np.uint8)
        view, found = data.data, hashlib.sha256()
        fd = self._file.open([self])
        with open(fd, "rb", buffering=0) as file:
            try:
                file.seek(self.offset)
                done = 0
                while done < self.length and (count := file.readinto(view[done : done + _CHUNK])):
                    found.update(view[done : done + count])
                    done += count
            except OSError as error:
                raise InputError(f"{name}: reading failed ({printable(error)}); check the disk") from None
        if done < self.length or found.hexdigest() != self.sha256:
            raise CorruptFileError(
                f"{name} changed since the model was loaded ({self.where}); start again when nobody writes to it"
            )
        return data


@dataclass(frozen=True)
class _DataFile:
    """A file of external data. directory: the model's. location: what the model says."""

    directory: Path
    location: str
    model: str

    @property
    def name(self) -> str:
        return f"{self.model}: {_shown(self.location)}"

    def open(self, wanted: Sequence[_Ranged], limit: int | None = None) -> int:
        """limit: bytes that it may have."""
        return _open(self.directory, self.location, wanted, self.name, limit)


@dataclass(frozen=True)
class _ModelFile:
    """The model's own file, which the user named: it may be a link."""

    path: Path
    name: str

    def open(self, wanted: Sequence[_Ranged]) -> int:
        return open_regular(self.path, self.name)


@dataclass(frozen=True)
class External:
    """files: location → SHA-256 of each file of external data, sorted. size: of all of them, bytes. outside: the
    initializers that stay in theirs, by name.
    """

    files: dict[str, str]
    size: int
    outside: dict[str, FileTensor]


def in_own_file(
    tensor: onnx.TensorProto, offset: int, data: memoryview, where: str, path: Path, name: str
) -> FileTensor:
    """An initializer whose `data` lie at this offset of the model's own file, and stay there.

    Raises CorruptFileError if it holds others besides.
    """
    check_empty(tensor, where, name)
    # A later change of the working directory must not lead to another file.
    own = _ModelFile(path.absolute(), name)
    sha256 = hashlib.sha256(data).hexdigest()
    return FileTensor(tensor.name, tensor.data_type, tuple(tensor.dims), offset, len(data), sha256, where, own)


def take_external(
    tensors: Iterable[tuple[onnx.TensorProto, str]],
    may_stay: Callable[[onnx.TensorProto], bool],
    model_path: Path,
    model_bytes: int,
    name: str,
    limits: Limits,
) -> External:
    """Read and hash the external data of `tensors` (pairs of tensor and place).

    They are put into the tensors themselves, unless the model with all of them exceeds limits.max_inline_bytes: then
    those of at least limits.min_outside_bytes that `may_stay` stay outside. Such a tensor keeps its dimensions and
    that its data are external; where they lie it does not say any more, so that no other reader can follow it.

    Raises UnsafeFileError for locations outside the model's directory, links and special files; CorruptFileError for
    missing files, and offsets and lengths that do not fit the file or the tensor; LimitError if the data are more
    than the limits allow.
    """
    slices = [_parse(tensor, where, name, limits) for tensor, where in tensors]
    total = model_bytes + sum(s.length for s in slices)
    large = total > limits.max_inline_bytes
    outside = [large and s.length >= limits.min_outside_bytes and may_stay(s.tensor) for s in slices]
    inside = total - sum(s.length for s, stays in zip(slices, outside, strict=True) if stays)
    for size, limit in ((inside, limits.max_onnx_bytes), (total, limits.max_external_bytes)):
        if size > limit:
            raise LimitError(
                f"{name}: {size:,} bytes with its external data, over the limit of {limit:,}; use a smaller model"
            )
    by_location: dict[str, list[tuple[_Slice, bool]]] = {}
    for piece, stays in zip(slices, outside, strict=True):
        by_location.setdefault(piece.location, []).append((piece, stays))
    # A later change of the working directory must not lead to other files.
    directory = model_path.parent.absolute()
    hashes: dict[str, str] = {}
    size, kept = 0, {}
    for location, pieces in sorted(by_location.items()):
        limit = limits.max_external_bytes if any(stays for _, stays in pieces) else limits.max_onnx_bytes
        file = _DataFile(directory, location, name)
        hashes[location], count, data = _read(file, pieces, limit)
        size += count
        for (piece, stays), found in zip(pieces, data, strict=True):
            tensor = piece.tensor
            tensor.ClearField("external_data")
            if not stays:
                tensor.raw_data = bytes(found)
                tensor.ClearField("data_location")
                continue
            check_empty(tensor, piece.where, name)
            kept[tensor.name] = FileTensor(
                tensor.name, tensor.data_type, tuple(tensor.dims), piece.offset, piece.length, found.decode(),
                piece.where, file,
            )  # fmt: skip
    return External(hashes, size, kept)


def data_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which initializers without their data are inputs of the graph, for tools that would want to read
    them; the model itself where there are none.
    """
    from onnx import ModelProto, TensorProto, helper

    if not any(t.data_location == TensorProto.EXTERNAL for t in model.graph.initializer):
        return model
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    fed = {value.name for value in graph.input}
    outside = [i for i, t in enumerate(graph.initializer) if t.data_location == TensorProto.EXTERNAL]
    for index in outside:
        tensor = graph.initializer[index]
        if tensor.name not in fed:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    for index in reversed(outside):
        del graph.initializer[index]
    return copy


def _parse(tensor: Any, where: str, name: str, limits: Limits) -> _Slice:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) != len(tensor.external_data):
        raise CorruptFileError(f"{name}: {where} describes its external data twice; export the model again")
    location = entries.get("location", "")
    problem = _location_problem(location)
    if problem:
        raise UnsafeFileError(
            f"{name}: {where} wants its data from '{printable(location)}', {problem}; efrapq reads only plain files "
            f"in the model's own directory"
        )
    expected = raw_bytes(tensor, where, name, limits)
    if tensor.data_type == tensor.STRING or tensor.HasField("raw_data"):
        raise CorruptFileError(f"{name}: {where} cannot have external data; export the model again")
    offset = _number(entries.get("offset", "0"), "offset", where, name)
    length = _number(entries.get("length", str(expected)), "length", where, name)
    if length != expected:
        raise CorruptFileError(
            f"{name}: {where} needs {expected:,} bytes and names {length:,} bytes of external data; export it again"
        )
    return _Slice(tensor, where, location, offset, length)


def _location_problem(location: str) -> str:
    if not location:
        return "which is no path"
    if not location.isprintable():
        return "which has control characters in it"
    if "\\" in location or ":" in location:
        return "which is a path of another system or a URL"
    if location.startswith("/"):
        return "which is an absolute path"
    if ".." in location.split("/"):
        return "which leads out of the model's directory"
    if any(part in ("", ".") for part in location.split("/")) or len(location) > 1024:
        return "which is not a plain path"
    return ""


def _number(text: str, key: str, where: str, name: str) -> int:
    # int() would take signs, spaces, underscores and other alphabets' digits.
    if not (text.isascii() and text.isdigit()) or len(text) > 19:
        raise CorruptFileError(
            f"{name}: {where} has the {key} '{printable(text, 40)}' in its external data, not a size"
        )
    return int(text)


def _read(
    file: _DataFile, pieces: Sequence[tuple[_Slice, bool]], limit: int
) -> tuple[str, int, list[bytes | bytearray]]:
    """One pass over a file: its SHA-256, its size, and of each piece the bytes, or the SHA-256 as text where it stays
    outside.
    """
    slices = [piece for piece, _ in pieces]
    hashes = [hashlib.sha256() if stays else None for _, stays in pieces]
    buffers = [bytearray() for _ in pieces]
    waiting = sorted(range(len(pieces)), key=lambda i: slices[i].offset, reverse=True)
    active: list[int] = []
    whole, position = hashlib.sha256(), 0
    fd = file.open(slices, limit)
    with open(fd, "rb", buffering=0):
        for chunk in stream_fd(fd, file.name, limit):
            whole.update(chunk)
            view, end = memoryview(chunk), position + len(chunk)
            while waiting and slices[waiting[-1]].offset < end:
                active.append(waiting.pop())
            for i in active:
                part = view[max(slices[i].offset - position, 0) : slices[i].end - position]
                found = hashes[i]
                if found is None:
                    buffers[i] += part
                else:
                    found.update(part)
            active = [i for i in active if slices[i].end > end]
            position = end
    _check_range(position, slices, file.name)
    data = [buffer if h is None else h.hexdigest().encode() for buffer, h in zip(buffers, hashes, strict=True)]
    return whole.hexdigest(), position, data


def _shown(location: str) -> str:
    return f"external data '{printable(location)}'"


def _open(directory: Path, location: str, wanted: Sequence[_Ranged], name: str, limit: int | None = None) -> int:
    """Open a file below `directory`; return its descriptor. limit: bytes that it may have."""
    try:
        return _open_below(directory, location.split("/"), wanted, name, limit)
    except FileNotFoundError:
        raise CorruptFileError(f"{name} is missing; put it beside the model") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be opened ({printable(error)}); check its permissions") from None


def _open_below(directory: Path, parts: list[str], wanted: Sequence[_Ranged], name: str, limit: int | None) -> int:
    """Component by component."""
    if not _RELATIVE:
        for depth in range(1, len(parts)):
            _require_directory(os.lstat(directory.joinpath(*parts[:depth])), name)
        path = directory.joinpath(*parts)
        return _open_checked(path, None, wanted, name, limit)
    # The directory that the user gave may be reached through links; what the model adds to it may not.
    at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            _require_directory(os.stat(part, dir_fd=at, follow_symlinks=False), name)
            below = os.open(part, _DIRECTORY, dir_fd=at)
            os.close(at)
            at = below
        return _open_checked(parts[-1], at, wanted, name, limit)
    finally:
        os.close(at)


def _open_checked(path: str | Path, at: int | None, wanted: Sequence[_Ranged], name: str, limit: int | None) -> int:
    before = os.stat(path, dir_fd=at, follow_symlinks=False)
    _require_plain(before, name)
    _check_range(before.st_size, wanted, name)
    if limit is not None and before.st_size > limit:
        raise LimitError(f"{name}: {before.st_size:,} bytes, over the limit of {limit:,}; use a smaller model")
    fd = os.open(path, _FILE, dir_fd=at)
    after = os.fstat(fd)
    if (before.st_dev, before.st_ino, after.st_nlink) != (after.st_dev, after.st_ino, 1):
        os.close(fd)
        raise UnsafeFileError(f"{name} was exchanged while it was opened; use a directory that nobody else writes to")
    return fd


def _require_directory(status: os.stat_result, name: str) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise UnsafeFileError(f"{name} goes through a symbolic link; copy the files themselves beside the model")
    if not stat.S_ISDIR(status.st_mode):
        raise CorruptFileError(f"{name} is missing; put it beside the model")


def _require_plain(status: os.stat_result, name: str) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise UnsafeFileError(f"{name} is a symbolic link; copy the file itself beside the model")
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeFileError(f"{name} is not a regular file; put a plain file beside the model")
    if status.st_nlink != 1:
        raise UnsafeFileError(f"{name} has several names (hard links); put a copy of it beside the model")


def _check_range(size: int, wanted: Sequence[_Ranged], name: str) -> None:
    for piece in wanted:
        if piece.end > size:
            raise CorruptFileError(
                f"{name} has {size:,} bytes, and {piece.where} wants those up to {piece.end:,}; copy it again"
            )
