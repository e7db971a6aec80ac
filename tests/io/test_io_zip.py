from __future__ import annotations

import io
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import pytest

from efrapq.errors import CorruptFileError, EfrapqError, LimitError, UnsafeFileError
from efrapq.io.limits import Limits
from efrapq.io.zipcheck import check_zip, zip_members

NAME = "model.pt"


def archive(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about duplicate names
        with zipfile.ZipFile(buffer, "w", compression) as file:
            for name, content in members:
                file.writestr(name, content)
    return buffer.getvalue()


GOOD = archive(("a/data.pkl", b"pickle" * 10), ("a/data/0", b"weights" * 10), ("a/version", b"3\n"))


def directory_start(data: bytes) -> int:
    return int(struct.unpack_from("<L", data, len(data) - 6)[0])


def patched(data: bytes, position: int, new: bytes) -> bytes:
    return data[:position] + new + data[position + len(new) :]


def refused(data: bytes, error: type[EfrapqError], match: str, limits: Limits | None = None) -> None:
    with pytest.raises(error, match=match) as caught:
        check_zip(data, NAME, limits or Limits())
    assert str(caught.value).startswith(NAME)


def test_good_archives_pass(torch_bytes: Callable[..., bytes], state: Any) -> None:
    assert [m.filename for m in check_zip(GOOD, NAME, Limits())] == ["a/data.pkl", "a/data/0", "a/version"]
    assert check_zip(torch_bytes(state), NAME, Limits())
    assert check_zip(archive(("a/b", b"x" * 500), compression=zipfile.ZIP_DEFLATED), NAME, Limits())


def test_streamed_archive_passes() -> None:
    class Stream(io.RawIOBase):
        def __init__(self) -> None:
            self.data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.data += bytes(data)
            return len(data)

    stream = Stream()
    with zipfile.ZipFile(stream, "w") as file:  # type: ignore[arg-type]
        file.writestr("a/data.pkl", b"one")
        file.writestr("a/data/0", b"two")
    assert len(check_zip(stream.data, NAME, Limits())) == 2


def test_zip64_archive_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    data = archive(("a/data.pkl", b"one"), ("a/data/0", b"two"))
    assert b"PK\x06\x06" in data
    assert len(check_zip(data, NAME, Limits())) == 2
    end = data.index(b"PK\x06\x06")
    refused(patched(data, end + 48, b"\x07"), CorruptFileError, "contradict")
    refused(patched(data, end, b"PK\x09\x09"), CorruptFileError, "zip64")


def test_bad_checksum() -> None:
    position = GOOD.index(b"weights")
    refused(patched(GOOD, position, b"W"), CorruptFileError, "'a/data/0' fails its checksum")


@pytest.mark.parametrize("second", ["a/data.pkl", "a/DATA.PKL"])
def test_duplicate_members(second: str) -> None:
    refused(archive(("a/data.pkl", b"good"), (second, b"evil")), CorruptFileError, "twice")


def test_encrypted_flag() -> None:
    start = directory_start(GOOD)
    data = patched(patched(GOOD, start + 8, b"\x01"), 6, b"\x01")
    refused(data, UnsafeFileError, "encrypted")


def test_unknown_compression() -> None:
    refused(archive(("a/data.pkl", b"x" * 100), compression=zipfile.ZIP_LZMA), CorruptFileError, "compression")


@pytest.mark.parametrize(
    ("offset", "new"),
    [
        (0, b"PK\x09\x09"),
        (6, b"\x02"),
        (8, b"\x08"),
        (14, b"\x01\x02\x03\x04"),
        (18, b"\x01"),
        (22, b"\x01"),
        (30, b"b"),
    ],
    ids=["signature", "flags", "method", "crc", "packed", "size", "name"],
)
def test_local_header_that_contradicts_the_directory(offset: int, new: bytes) -> None:
    refused(patched(GOOD, offset, new), CorruptFileError, "contradict|not where|overlap|damaged")


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a\\b", "a//b", "a/\x1b[2Jb", "a/../b"])
def test_unsafe_member_names(name: str) -> None:
    refused(archive((name, b"x")), UnsafeFileError, "unsafe names")


def test_name_with_nul() -> None:
    data = archive(("a/data.pklXevil", b"x")).replace(b"pklX", b"pkl\0")
    refused(data, UnsafeFileError, "unsafe names")


def test_overlapping_members() -> None:
    start = directory_start(GOOD)
    entry = GOOD[start : start + 46 + len("a/data.pkl")].replace(b"a/data.pkl", b"a/data.xyz")
    end = len(GOOD) - 22
    count, size = struct.unpack_from("<HL", GOOD, end + 10)
    record = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count + 1, count + 1, size + len(entry), start, 0)
    refused(GOOD[:end] + entry + record, CorruptFileError, "contradict|overlap")


def test_stray_bytes_between_members_and_directory() -> None:
    start, end = directory_start(GOOD), len(GOOD) - 22
    record = struct.pack("<L", start + 16)
    data = GOOD[:start] + bytes(16) + GOOD[start:end] + patched(GOOD[end:], 16, record)
    refused(data, CorruptFileError, "stray")


def test_zip_bomb() -> None:
    bomb = archive(("a/data.pkl", b"x"), ("a/data/0", bytes(200 << 20)), compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 1 << 20
    refused(bomb, LimitError, "would unpack")


def test_member_that_lies_about_its_size() -> None:
    bomb = archive(("a/data.pkl", bytes(1 << 20)), compression=zipfile.ZIP_DEFLATED)
    small = struct.pack("<L", 10)
    data = patched(patched(bomb, 22, small), directory_start(bomb) + 24, small)
    refused(data, CorruptFileError, "checksum|damaged")


def test_too_many_members() -> None:
    data = archive(*((f"a/{i}", b"") for i in range(20)))
    refused(data, LimitError, "members", Limits(max_zip_members=10))
    with pytest.raises(LimitError, match="directory is too large"):
        zip_members(data, NAME, Limits(max_zip_members=1))


def test_archive_in_parts() -> None:
    refused(patched(GOOD, len(GOOD) - 18, b"\x01"), CorruptFileError, "several parts")


@pytest.mark.parametrize("sixteenths", range(1, 16))
def test_truncated(sixteenths: int) -> None:
    refused(GOOD[: len(GOOD) * sixteenths // 16], CorruptFileError, "cut off")


def test_no_single_byte_makes_it_crash() -> None:
    for position in range(len(GOOD)):
        data = patched(GOOD, position, bytes([GOOD[position] ^ 0xFF]))
        try:
            check_zip(data, NAME, Limits())
        except EfrapqError:
            continue
