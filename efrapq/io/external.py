"""ONNX external data: files that a model names, read only from the model's own directory.

A path from a model is an order from a stranger. It may name a plain file below the model's directory and nothing
else: every component is looked at before it is opened, relative to the directory opened before it, and links of
either kind are refused. The file is read once and put into the model, so that nothing later follows a path.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efrapq.errors import CorruptFileError, InputError, LimitError, UnsafeFileError
from efrapq.io.limits import Limits
from efrapq.io.onnx_tensor import raw_bytes
from efrapq.io.source import read_fd
from efrapq.io.text import printable

if TYPE_CHECKING:
    import onnx

__all__ = ["inline_external"]

_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_FILE = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
# Windows cannot open relative to a directory.
_RELATIVE = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd


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


def inline_external(
    tensors: Iterable[tuple[onnx.TensorProto, str]], model_path: Path, model_bytes: int, name: str, limits: Limits
) -> dict[str, str]:
    """Read the external data of `tensors` (pairs of tensor and place) into the tensors themselves.

    Returns location → SHA-256 of the files read, sorted by location. Raises UnsafeFileError for locations outside
    the model's directory, links and special files; CorruptFileError for missing files, and offsets and lengths that
    do not fit the file or the tensor; LimitError if the model would grow past what protobuf can hold.
    """
    slices = [_parse(tensor, where, name, limits) for tensor, where in tensors]
    total = model_bytes + sum(s.length for s in slices)
    if total > limits.max_onnx_bytes:
        raise LimitError(
            f"{name}: {total:,} bytes with its external data, over the limit of {limits.max_onnx_bytes:,}; "
            f"use a smaller model"
        )
    by_location: dict[str, list[_Slice]] = {}
    for piece in slices:
        by_location.setdefault(piece.location, []).append(piece)
    hashes: dict[str, str] = {}
    for location, pieces in sorted(by_location.items()):
        data = _read(model_path.parent, location, pieces, name, limits)
        hashes[location] = hashlib.sha256(data).hexdigest()
        for piece in pieces:
            piece.tensor.raw_data = data[piece.offset : piece.end]
            piece.tensor.ClearField("external_data")
            piece.tensor.ClearField("data_location")
    return hashes


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


def _read(directory: Path, location: str, pieces: list[_Slice], name: str, limits: Limits) -> bytes:
    shown = f"external data '{printable(location)}'"
    try:
        fd = _open(directory, location.split("/"), pieces, f"{name}: {shown}")
    except FileNotFoundError:
        raise CorruptFileError(f"{name}: {shown} is missing; put it beside the model") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {shown} cannot be opened ({printable(error)}); check its permissions") from None
    data = read_fd(fd, f"{name}: {shown}", limits.max_onnx_bytes)
    _check_range(len(data), pieces, f"{name}: {shown}")
    return data


def _open(directory: Path, parts: list[str], pieces: list[_Slice], name: str) -> int:
    """Open a file below `directory` component by component; return its descriptor."""
    if not _RELATIVE:
        for depth in range(1, len(parts)):
            _require_directory(os.lstat(directory.joinpath(*parts[:depth])), name)
        path = directory.joinpath(*parts)
        return _open_checked(path, None, pieces, name)
    # The directory that the user gave may be reached through links; what the model adds to it may not.
    at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            _require_directory(os.stat(part, dir_fd=at, follow_symlinks=False), name)
            below = os.open(part, _DIRECTORY, dir_fd=at)
            os.close(at)
            at = below
        return _open_checked(parts[-1], at, pieces, name)
    finally:
        os.close(at)


def _open_checked(path: str | Path, at: int | None, pieces: list[_Slice], name: str) -> int:
    before = os.stat(path, dir_fd=at, follow_symlinks=False)
    _require_plain(before, name)
    _check_range(before.st_size, pieces, name)
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


def _check_range(size: int, pieces: list[_Slice], name: str) -> None:
    for piece in pieces:
        if piece.end > size:
            raise CorruptFileError(
                f"{name} has {size:,} bytes, and {piece.where} wants those up to {piece.end:,}; copy it again"
            )
