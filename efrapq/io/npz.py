"""Arrays in an `.npz` file of unknown origin."""

from __future__ import annotations

import math
import os
import stat
import tokenize
import zipfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from efrapq.errors import CorruptFileError, DataError, LimitError, UnsafeFileError
from efrapq.io.limits import Limits
from efrapq.io.source import read_fd
from efrapq.io.text import printable
from efrapq.io.zipcheck import zip_members

__all__ = ["MAX_ARRAY_BYTES", "ArrayFile"]

NPZ_LIMITS = Limits(max_zip_members=1000)
MAX_ARRAY_BYTES = 4 << 30
# Pictures do not shrink 64-fold; below the free size nobody cares.
MAX_ARRAY_RATIO = 64
FREE_ARRAY_BYTES = 256 << 20
_ADVICE = "save plain arrays with numpy.savez(images=…, labels=…)"


class ArrayFile:
    """The arrays of an `.npz` file; none gets memory before its own header and the archive agree on its size."""

    def __init__(self, path: Path) -> None:
        """Read the file, once. Raises DataError, CorruptFileError, UnsafeFileError or LimitError."""
        self.name = printable(path)
        self._data = _read_file(path, self.name)
        if not self._data.startswith(b"PK"):
            kind = "is a single array" if self._data.startswith(b"\x93NUMPY") else "is not an .npz file"
            raise DataError(f"{self.name}: {kind}; {_ADVICE}")
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in zip_members(self._data, self.name, NPZ_LIMITS):
            key = member.filename.removesuffix(".npy")
            if key in self._members:
                raise CorruptFileError(f"{self.name}: holds the array '{printable(key)}' twice; {_ADVICE}")
            self._members[key] = member

    @property
    def keys(self) -> set[str]:
        return set(self._members)

    def __getitem__(self, key: str) -> NDArray[Any]:
        """Unpack one array. Raises what the constructor raises; KeyError if there is none of that name."""
        member = self._members[key]
        where = f"{self.name}: array '{printable(key)}'"
        if member.flag_bits & 0x1:
            raise UnsafeFileError(f"{where} is encrypted; {_ADVICE}")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CorruptFileError(f"{where} is packed by a method that NumPy does not use; {_ADVICE}")
        if member.file_size > MAX_ARRAY_BYTES:
            raise LimitError(f"{where} has {member.file_size:,} bytes, over the limit of {MAX_ARRAY_BYTES:,}")
        if member.file_size > FREE_ARRAY_BYTES and member.file_size > MAX_ARRAY_RATIO * member.compress_size:
            raise LimitError(f"{where} would unpack from {member.compress_size:,} bytes to {member.file_size:,}")
        try:
            with zipfile.ZipFile(BytesIO(self._data)) as archive:
                with archive.open(member) as stream:
                    _check_header(stream, member.file_size, where)
                with archive.open(member) as stream:
                    return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
        except MemoryError:
            raise LimitError(f"{where} does not fit in memory; use fewer images") from None
        except (
            *(zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError),
            *(ValueError, TypeError, SyntaxError, RecursionError, tokenize.TokenError),
        ) as exc:
            raise CorruptFileError(f"{where} is damaged ({printable(exc, 80)}); copy or download it again") from exc


def _read_file(path: Path, name: str) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{name}: is not a regular file; {_ADVICE}")
        if status.st_size > NPZ_LIMITS.max_file_bytes:
            raise LimitError(
                f"{name}: {status.st_size:,} bytes, over the limit of {NPZ_LIMITS.max_file_bytes:,}; "
                "use fewer images, or a folder of image files"
            )
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except (OSError, ValueError) as exc:
        raise DataError(f"{name}: cannot be opened ({printable(getattr(exc, 'strerror', None) or exc)})") from exc
    return read_fd(fd, name, NPZ_LIMITS.max_file_bytes)


def _check_header(stream: BinaryIO | Any, size: int, where: str) -> None:
    """Refuse an array that is not plain numbers, or whose header promises other than the `size` bytes there are."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    reader = readers.get(np.lib.format.read_magic(stream))
    if reader is None:
        raise DataError(f"{where} is of a version for structured arrays; {_ADVICE}")
    try:
        shape, _, dtype = reader(stream)
    except MemoryError:  # Python's parser says so of expressions that are nested too deep
        raise CorruptFileError(f"{where} has an unreadable header; copy or download it again") from None
    if dtype.hasobject:
        raise DataError(f"{where} holds Python objects; {_ADVICE}")
    if dtype.kind not in "biufc":
        raise DataError(f"{where} holds {printable(dtype, 40)}, not numbers; {_ADVICE}")
    promised = stream.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or promised != size:
        raise CorruptFileError(
            f"{where} says that it is {printable(dtype)} {printable(shape, 80)}, "
            f"but the archive holds {size:,} bytes of it"
        )
