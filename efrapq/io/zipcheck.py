"""Zip archives that every program reads in the same way.

A zip archive says everything twice: in the header before each member and in the directory at the end.
Python believes one, torch's reader the other in places, and what lies between members neither looks at.
Here both must agree and fill the file without gaps, so that what was checked is what gets loaded.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from io import BytesIO
from typing import NamedTuple

from efrapq.errors import CorruptFileError, LimitError, UnsafeFileError
from efrapq.io.limits import Limits
from efrapq.io.text import listing, printable

__all__ = ["check_zip", "has_zip_tail", "zip_members"]

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCAL = struct.Struct("<4s5H3L2H")
_DIRECTORY_ENTRY_BYTES = 46
_AGAIN = "copy or download it again"
# A small archive may unpack to this much whatever the ratio.
_SLACK = 1 << 20

_ENCRYPTED = 0x1 | 0x40 | 0x2000
_DESCRIPTOR = 0x8
_UTF8 = 0x800


class _Directory(NamedTuple):
    offset: int
    size: int


def has_zip_tail(data: bytes) -> bool:
    """Whether a zip reader that looks for the directory from the end would take `data` for a zip archive."""
    start = data.rfind(b"PK\x05\x06", max(0, len(data) - _END.size - 0xFFFF))
    if start < 0 or start + _END.size > len(data):
        return False
    _, _, _, _, _, size, _, comment = _END.unpack_from(data, start)
    if start + _END.size + comment > len(data):
        return False
    # Between directory and end, zip64 puts two more records, which torch writes even where they are not needed.
    return (
        size == 0
        or (size <= start and data.startswith(b"PK\x01\x02", start - size))
        or (start >= _END64_LOCATOR.size and data.startswith(b"PK\x06\x07", start - _END64_LOCATOR.size))
    )


def zip_members(data: bytes, name: str, limits: Limits) -> list[zipfile.ZipInfo]:
    """Return the directory of the zip archive `data`, ordered by where the members lie.

    Only the directory is read here; `check_zip` proves the members. Raises CorruptFileError if it is cut off
    or inconsistent, UnsafeFileError if there is anything before or after the archive, LimitError if there are
    too many members.
    """
    directory = _find_directory(data, name)
    # zipfile builds an object for each entry, so the size is checked before it is asked.
    if directory.size > limits.max_zip_members * (_DIRECTORY_ENTRY_BYTES + 256):
        raise LimitError(f"{name}: the zip directory is too large; the limit is {limits.max_zip_members:,} members")
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, OverflowError) as error:
        raise CorruptFileError(f"{name}: damaged zip directory ({printable(error)}); {_AGAIN}") from None
    if len(members) > limits.max_zip_members:
        raise LimitError(f"{name}: {len(members):,} zip members; the limit is {limits.max_zip_members:,}")
    return sorted(members, key=lambda member: member.header_offset)


def check_zip(data: bytes, name: str, limits: Limits) -> list[zipfile.ZipInfo]:
    """Prove the zip archive `data` member by member, checksums included; return its directory.

    Raises CorruptFileError for what is damaged, duplicated or contradictory, UnsafeFileError for encrypted
    members and names that lead elsewhere, LimitError for a zip bomb.
    """
    members = zip_members(data, name, limits)
    _check_names(members, name)
    for member in members:
        shown = printable(member.filename)
        if member.flag_bits & _ENCRYPTED:
            raise UnsafeFileError(f"{name}: zip member '{shown}' is encrypted; ask for a file that is not")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CorruptFileError(
                f"{name}: zip member '{shown}' has compression method {member.compress_type}, which torch does not use"
            )
    total = sum(member.file_size for member in members)
    if total > limits.max_total_bytes or total > limits.max_zip_ratio * len(data) + _SLACK:
        raise LimitError(
            f"{name}: {len(data):,} bytes would unpack to {total:,}; a torch checkpoint is not compressed, "
            f"save the state_dict again with torch.save"
        )
    end, descriptor = 0, False
    for member in members:
        _check_gap(member.header_offset - end, descriptor, name)
        end = _check_local_header(data, member, name)
        descriptor = bool(member.flag_bits & _DESCRIPTOR)
    _check_gap(_find_directory(data, name).offset - end, descriptor, name)
    _check_sums(data, name)
    return members


def _find_directory(data: bytes, name: str) -> _Directory:
    end = len(data) - _END.size
    if end < 0 or not data.startswith(b"PK\x05\x06", end) or _END.unpack_from(data, end)[-1] != 0:
        if has_zip_tail(data):
            raise UnsafeFileError(f"{name}: there are bytes after the end of the zip archive; get a clean copy")
        raise CorruptFileError(f"{name}: the zip archive is cut off or has bytes after its end; {_AGAIN}")
    _, disk, first_disk, here, count, size, offset, _ = _END.unpack_from(data, end)
    directory_end = end
    locator = end - _END64_LOCATOR.size
    if locator >= 0 and data.startswith(b"PK\x06\x07", locator):
        _, disk64, directory_end, disks = _END64_LOCATOR.unpack_from(data, locator)
        if directory_end + _END64.size != locator or not data.startswith(b"PK\x06\x06", directory_end):
            raise CorruptFileError(f"{name}: damaged zip64 directory; {_AGAIN}")
        _, _, _, _, disk, first_disk, here, count, size64, offset64 = _END64.unpack_from(data, directory_end)
        # The short record may give up (all ones) but must not contradict the long one.
        if disk64 or disks != 1 or size not in (size64, 0xFFFFFFFF) or offset not in (offset64, 0xFFFFFFFF):
            raise CorruptFileError(f"{name}: the two zip directories contradict each other; {_AGAIN}")
        size, offset = size64, offset64
    if disk or first_disk or here != count:
        raise CorruptFileError(f"{name}: a zip archive in several parts; give the whole archive")
    if offset + size != directory_end:
        # The offsets count from the start of the archive: a difference is the length of what was put before it.
        raise UnsafeFileError(f"{name}: there are bytes before or inside the zip archive that are none of its own")
    return _Directory(offset, size)


def _check_names(members: list[zipfile.ZipInfo], name: str) -> None:
    # torch's reader does not tell upper from lower case, so neither may the archive.
    seen: set[str] = set()
    for member in members:
        raw = member.orig_filename
        if raw.lower() in seen:
            raise CorruptFileError(f"{name}: the zip archive holds '{printable(raw)}' twice; {_AGAIN}")
        seen.add(raw.lower())
    odd = [
        m.orig_filename
        for m in members
        if not m.orig_filename.isprintable()
        or "\\" in m.orig_filename
        or any(part in ("", "..") for part in m.orig_filename.rstrip("/").split("/"))
    ]
    if odd:
        raise UnsafeFileError(f"{name}: zip members with unsafe names: {listing(odd)}; get a clean copy")


def _check_local_header(data: bytes, member: zipfile.ZipInfo, name: str) -> int:
    """Compare a member's own header with the directory; return where its data end."""
    shown = printable(member.filename)
    start = member.header_offset
    if not (0 <= start <= len(data) - _LOCAL.size) or not data.startswith(b"PK\x03\x04", start):
        raise CorruptFileError(f"{name}: zip member '{shown}' is not where the directory says; {_AGAIN}")
    _, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack_from(data, start)
    raw = data[start + _LOCAL.size : start + _LOCAL.size + name_length]
    local_name = raw.decode("utf-8" if flags & _UTF8 else "cp437", errors="replace")
    later = flags & _DESCRIPTOR
    agree = (
        (flags, method, local_name) == (member.flag_bits, member.compress_type, member.orig_filename)
        and _same(crc, member.CRC, later, 0)
        and _same(packed, member.compress_size, later, 0xFFFFFFFF)
        and _same(size, member.file_size, later, 0xFFFFFFFF)
        and (method != zipfile.ZIP_STORED or member.compress_size == member.file_size)
    )
    end: int = start + _LOCAL.size + name_length + extra_length + member.compress_size
    if not agree or end > len(data):
        raise CorruptFileError(f"{name}: zip member '{shown}' and the directory contradict each other; {_AGAIN}")
    return end


def _same(local: int, central: int, later: int, escape: int) -> bool:
    # With a descriptor after the data, the header may leave its fields at 0; zip64 sets sizes to all ones.
    return local == central or (bool(later) and local == 0) or (escape != 0 and local == escape)


def _check_gap(gap: int, descriptor: bool, name: str) -> None:
    # Only the sizes and the checksum of a member that was written as a stream may stand behind it.
    if gap and not (descriptor and gap in (12, 16, 20, 24)):
        raise CorruptFileError(f"{name}: zip members overlap or have stray bytes between them; {_AGAIN}")


def _check_sums(data: bytes, name: str) -> None:
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, struct.error) as error:
        raise CorruptFileError(f"{name}: damaged zip archive ({printable(error)}); {_AGAIN}") from None
    if bad is not None:
        raise CorruptFileError(f"{name}: zip member '{printable(bad)}' fails its checksum; {_AGAIN}")
