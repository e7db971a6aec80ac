"""Results written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from efrapq.errors import OutputError
from efrapq.io.text import printable

__all__ = ["check_output", "write_all", "write_atomic"]

_ADVICE = {
    errno.ENOSPC: "the disk is full; make room or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; make room or write elsewhere",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "no permission to write there; choose another directory",
    errno.EPERM: "no permission to write there; choose another directory",
    errno.ENOENT: "the directory does not exist; create it first",
    errno.ENOTDIR: "part of the path is a file, not a directory; choose another path",
    errno.EISDIR: "it is a directory; give the name of a file",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EFBIG: "the file system does not hold files of this size; write elsewhere",
}


def check_output(path: str | Path, inputs: Iterable[Path] = ()) -> None:
    """Raise OutputError if a result cannot go to `path`, before any work is done for it.

    It must not be one of `inputs` (by whatever name or link), a directory or a special file; its directory must
    exist and be writable.
    """
    path = Path(path)
    name = printable(path)
    with _as_output_error(name):
        for source in inputs:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samefile(path, source):
                    raise OutputError(f"{name}: this is the input file {printable(source)}; choose another output path")
        _require_replaceable(path, name)
        parent = path.parent
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"{name}: no permission to write in {printable(parent)}; choose another directory")


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that whoever looks, at any moment, finds the old file or the whole new one.

    Raises OutputError, with the old file in place and nothing else left behind, if it cannot be written.
    """
    write_all({path: data})


def write_all(files: Mapping[str | Path, bytes | Iterator[bytes | memoryview]]) -> None:
    """Write several files, of their bytes or of pieces made as they are needed: all of them, or after an error none.

    Everything is on the disk under temporary names before the first file appears; then they are renamed, in order.
    If a rename fails, those before it are undone. (A process killed between two renames leaves whole files, the
    first ones new and the rest old: give the file that vouches for the others last.)

    Raises OutputError if one cannot be written or if two paths are the same.
    """
    targets = [Path(path) for path in files]
    places = [os.path.normcase(os.path.join(os.path.realpath(t.parent), t.name)) for t in targets]
    if len(set(places)) != len(places):
        raise OutputError(f"{printable(targets[0])}: two results would go to the same file; give them different names")
    leftovers: list[Path] = []
    done: list[tuple[Path, Path | None]] = []
    try:
        staged = []
        for target, data in zip(targets, files.values(), strict=True):
            with _as_output_error(printable(target)):
                _require_replaceable(target, printable(target))
                staged.append(_stage(target, data, leftovers))
        for target, temporary in zip(targets, staged, strict=True):
            with _as_output_error(printable(target)):
                # One file needs no way back: a rename happens or does not.
                backup = _backup(target, leftovers) if len(targets) > 1 else None
                done.append((target, backup))  # first, so that an interrupt between the two is undone as well
                os.replace(temporary, target)
        for directory in {target.parent for target in targets}:
            with _as_output_error(printable(directory)):
                _sync_directory(directory)
    except BaseException:
        # Not only errors: Ctrl-C must leave nothing half done either.
        if len(targets) > 1:
            _undo(done)
        raise
    finally:
        for leftover in leftovers:
            with contextlib.suppress(OSError):
                leftover.unlink()


def _temporary(target: Path) -> Path:
    # In the same directory, for a rename does not cross file systems; hidden, and short whatever the target's name.
    return target.parent / f".efrapq-{secrets.token_hex(8)}.tmp"


def _stage(target: Path, data: bytes | Iterator[bytes | memoryview], leftovers: list[Path]) -> Path:
    temporary = _temporary(target)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    fd = os.open(temporary, flags, 0o666)  # the umask takes away what it should
    leftovers.append(temporary)
    with open(fd, "wb") as file:
        for part in [data] if isinstance(data, bytes) else data:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _backup(target: Path, leftovers: list[Path]) -> Path | None:
    if not target.exists():
        return None
    backup = _temporary(target)
    leftovers.append(backup)
    try:
        os.link(target, backup)
    except OSError:  # a file system without hard links
        shutil.copy2(target, backup)
    return backup


def _undo(done: list[tuple[Path, Path | None]]) -> None:
    for target, backup in reversed(done):
        with contextlib.suppress(OSError):
            if backup is None:
                target.unlink()
            else:
                os.replace(backup, target)


def _sync_directory(directory: Path) -> None:
    # The rename itself is safe from a power cut only once the directory is on the disk. Windows cannot do this.
    if not hasattr(os, "O_DIRECTORY"):
        return
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems do not sync directories; the files are there all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(fd)


def _require_replaceable(path: Path, name: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise OutputError(
                f"{name}: the directory {printable(path.parent)} does not exist; create it first"
            ) from None
        return
    if stat.S_ISLNK(mode):
        # A rename would replace the link, and the file behind it would stay as it is.
        raise OutputError(f"{name}: it is a symbolic link; give the path of the file itself")
    if stat.S_ISDIR(mode):
        raise OutputError(f"{name}: it is a directory; give the name of a file")
    if not stat.S_ISREG(mode):
        raise OutputError(f"{name}: it is a device or another special file; give the name of a file")


@contextlib.contextmanager
def _as_output_error(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        advice = _ADVICE.get(number or 0, f"{printable(error)}; choose another path")
        raise OutputError(f"{name}: {advice}") from None
