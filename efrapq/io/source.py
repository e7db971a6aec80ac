"""A file from outside: read once, hashed as it was read, and known by its content."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from efrapq.errors import CorruptFileError, InputError, LimitError, UnsupportedFileError
from efrapq.io.limits import Limits
from efrapq.io.sniff import Format, sniff
from efrapq.io.text import printable

__all__ = ["Source", "open_regular", "read_fd", "read_source", "stream_fd"]

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Source:
    """What was in a file at the moment it was read. The file is not opened again."""

    path: Path
    data: bytes = field(repr=False)
    sha256: str
    format: Format

    @property
    def name(self) -> str:
        """The path as it may be shown in a message."""
        return printable(self.path)


def read_source(path: str | Path, limits: Limits | None = None) -> Source:
    """Read a model file into memory, once, and tell by its bytes what it is.

    Raises InputError if the file cannot be read, UnsupportedFileError for anything that is not a
    regular file and for file types that efrapq does not read, LimitError if it is too large,
    CorruptFileError if it is cut off or changes under the reader, UnsafeFileError for archives that
    other programs would see differently.
    """
    limits = limits or Limits()
    path = Path(path)
    name = printable(path)
    data = read_fd(open_regular(path, name), name, limits.max_file_bytes)
    return Source(path=path, data=data, sha256=hashlib.sha256(data).hexdigest(), format=sniff(data, name, limits))


def open_regular(path: Path, name: str) -> int:
    """The descriptor of a file that the user named. Raises InputError if it cannot be opened, UnsupportedFileError if
    it is not a regular file.
    """
    try:
        # Looking comes before opening: to open a device can have effects of its own.
        _require_regular(os.stat(path), name)
        # Should a FIFO take the file's place between the two, O_NONBLOCK keeps open() from waiting.
        return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise InputError(f"{name}: there is no such file; check the path") from None
    except PermissionError:
        raise InputError(f"{name}: not readable by this user; check the file's permissions") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be opened ({_reason(error)}); check the path") from None


def read_fd(fd: int, name: str, max_bytes: int) -> bytes:
    """Read the whole regular file behind the descriptor `fd`, and close it.

    Raises UnsupportedFileError if it is not a regular file, LimitError past `max_bytes`, CorruptFileError
    if its length is not what the file system says, InputError if reading fails.
    """
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        _require_regular(status, name)
        if status.st_size > max_bytes:
            raise LimitError(f"{name}: {status.st_size:,} bytes, over the limit of {max_bytes:,}; use a smaller model")
        try:
            # One byte more than expected shows a file that grows; no file can make this read on for ever.
            data = file.read(status.st_size + 1)
        except OSError as error:
            raise InputError(f"{name}: reading failed ({_reason(error)}); check the disk") from None
        if len(data) != status.st_size:
            raise CorruptFileError(f"{name}: the file changed while it was read; wait until it is complete and retry")
    return data


def stream_fd(fd: int, name: str, max_bytes: int) -> Iterator[bytes]:
    """Yield the whole regular file behind the descriptor `fd`, piece by piece; the descriptor stays open.

    Raises as `read_fd`; that the length was not what the file system says shows only at the end.
    """
    status = os.fstat(fd)
    _require_regular(status, name)
    if status.st_size > max_bytes:
        raise LimitError(f"{name}: {status.st_size:,} bytes, over the limit of {max_bytes:,}; use a smaller model")
    left = status.st_size + 1  # one byte more than expected shows a file that grows
    while left:
        try:
            data = os.read(fd, min(left, _CHUNK))
        except OSError as error:
            raise InputError(f"{name}: reading failed ({_reason(error)}); check the disk") from None
        if not data:
            break
        left -= len(data)
        yield data
    if left != 1:
        raise CorruptFileError(f"{name}: the file changed while it was read; wait until it is complete and retry")


def _require_regular(status: os.stat_result, name: str) -> None:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    if not stat.S_ISREG(status.st_mode):
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a special file")
        raise UnsupportedFileError(f"{name}: {kind}, not a regular file; give the path of a model file")


def _reason(error: Exception) -> str:
    return printable(getattr(error, "strerror", None) or error)
