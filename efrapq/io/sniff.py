"""What a file is, decided by its bytes alone. Extensions are never looked at."""

from __future__ import annotations

import enum
import re

from efrapq.errors import CorruptFileError, InputError, UnsafeFileError, UnsupportedFileError
from efrapq.io.limits import Limits
from efrapq.io.text import listing
from efrapq.io.zipcheck import has_zip_tail, zip_members

__all__ = ["Format", "sniff"]


class Format(enum.StrEnum):
    """The file types that efrapq reads."""

    ONNX = "onnx"
    TORCH_ZIP = "torch"
    SAFETENSORS = "safetensors"


_SAVE = "torch.save(model.state_dict(), 'model.pt')"
_RESAVE = f"load it where you trust it and save it again with {_SAVE}"
_READS = "efrapq reads .onnx, .pt state_dicts and .safetensors"

# What else a file may be: (offset, signature, error, description and advice).
_OTHERS: tuple[tuple[int, bytes, type[InputError], str], ...] = (
    (0, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", UnsafeFileError, f"a torch file from before 1.6; {_RESAVE}"),
    (0, b"\x89HDF\r\n\x1a\n", UnsupportedFileError, "an HDF5 (Keras) file; export the model to ONNX"),
    (4, b"TFL3", UnsupportedFileError, "a TensorFlow Lite model; export the original model to ONNX"),
    (4, b"ORTM", UnsupportedFileError, "an ONNX Runtime .ort model; give the .onnx file it was made from"),
    (0, b"GGUF", UnsupportedFileError, "a GGUF model; give the original .safetensors"),
    (0, b"\x93NUMPY", UnsupportedFileError, f"a NumPy array; {_READS}"),
    (0, b"\x1f\x8b", UnsupportedFileError, "a gzip file; unpack it first"),
    (0, b"BZh", UnsupportedFileError, "a bzip2 file; unpack it first"),
    (0, b"\xfd7zXZ\0", UnsupportedFileError, "an xz file; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", UnsupportedFileError, "a zstd file; unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", UnsupportedFileError, "a 7-Zip archive; unpack it first"),
    (257, b"ustar", UnsafeFileError, f"a tar archive, as torch wrote before 0.2; {_RESAVE}"),
    (0, b"version https://git-lfs", UnsupportedFileError, "a Git LFS pointer; fetch the file with 'git lfs pull'"),
    (0, b"<!DOCTYPE", UnsupportedFileError, "a web page; download the model file itself"),
    (0, b"<html", UnsupportedFileError, "a web page; download the model file itself"),
)

_TEXT_PICKLE = re.compile(rb"\(*(c[\w.]+\n[\w.]+\n|i[\w.]+\n[\w.]+\n|[dl]p?\d*\n)")

# Members that only one kind of zip archive has, below its top folder.
_TORCHSCRIPT = re.compile(r"(constants\.pkl|bytecode\.pkl|code/.*)")
_EXPORTED = re.compile(r"(archive_format|models/.*|serialized_exported_program\.json|data/aotinductor/.*)")

_SAFETENSORS_MAX_HEADER = 100_000_000

# ModelProto: field number → wire type.
_MODEL_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
_MAX_FIELDS_LOOKED_AT = 1000


def sniff(data: bytes, name: str = "the file", limits: Limits | None = None) -> Format:
    """Return what the bytes of a file are; `name` is what messages call it.

    Raises UnsupportedFileError for every other file type, by its name where it is known; UnsafeFileError
    for pickles, for TorchScript and for files that are two things at once; CorruptFileError for an
    empty or cut-off file; LimitError for a zip archive with too many members.
    """
    if not data:
        raise CorruptFileError(f"{name}: the file is empty; copy or download it again")
    if data.startswith(b"PK\x03\x04"):
        return _sniff_zip(data, name, limits or Limits())
    if has_zip_tail(data):
        raise UnsafeFileError(
            f"{name}: a zip archive with other content before it, which programs read in different ways; "
            f"get a clean copy, or {_RESAVE}"
        )
    for offset, signature, error, description in _OTHERS:
        if data.startswith(signature, offset):
            raise error(f"{name}: {description}")
    if (data[0] == 0x80 and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) or _TEXT_PICKLE.match(data[:256]):
        raise UnsafeFileError(f"{name}: a bare pickle, which can run code when it is loaded; {_RESAVE}")
    # In tars of the oldest kind only the name of the first member tells.
    if data[:100].rstrip(b"\0") in (b"sys_info", b"pickle", b"storages", b"tensors"):
        raise UnsafeFileError(f"{name}: a tar archive, as torch wrote before 0.2; {_RESAVE}")
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= _SAFETENSORS_MAX_HEADER:
        return Format.SAFETENSORS
    if _looks_like_onnx(data):
        return Format.ONNX
    raise UnsupportedFileError(f"{name}: not a model file of a known kind; {_READS}")


def _sniff_zip(data: bytes, name: str, limits: Limits) -> Format:
    members = zip_members(data, name, limits)
    names = [member.filename for member in members]
    tops = {n.partition("/")[0] for n in names}
    inside = [n.partition("/")[2] or n for n in names]
    if any(map(_EXPORTED.fullmatch, inside)):
        raise UnsupportedFileError(f"{name}: a torch.export program (.pt2); export the model to ONNX or save {_SAVE}")
    if any(map(_TORCHSCRIPT.fullmatch, inside)):
        raise UnsafeFileError(f"{name}: a TorchScript archive, which carries code; {_RESAVE}, or export it to ONNX")
    if names and all(n.endswith(".npy") for n in names):
        raise UnsupportedFileError(f"{name}: a NumPy .npz archive, which is data and not a model; {_READS}")
    if "config.json" in names and "model.weights.h5" in names:
        raise UnsupportedFileError(f"{name}: a Keras archive; export the model to ONNX")
    if len(tops) == 1 and inside.count("data.pkl") == 1:
        return Format.TORCH_ZIP
    raise UnsupportedFileError(
        f"{name}: a zip archive that is not a torch checkpoint (it holds {listing(names, 3) or 'nothing'}); "
        f"unpack it and give the model file itself"
    )


def _looks_like_onnx(data: bytes) -> bool:
    """Whether the outermost protobuf fields are those of a ModelProto, as far as the data goes.

    Nearly every writer puts ir_version first; with it a file counts as ONNX even where it is cut off, so
    that the reader can say so. Without it, all the fields must fit.
    """
    starts_with_version = data[0] == 0x08 and data[1:2] != b"\0" and data[1:2] < b"\x80"
    position, seen = 0, set()
    for _ in range(_MAX_FIELDS_LOOKED_AT):
        if position == len(data):
            break
        tag, position = _varint(data, position)
        field, wire = tag >> 3, tag & 7
        if _MODEL_FIELDS.get(field) != wire:
            # A cut can fall inside a tag; then there is nothing left after it.
            return starts_with_version and (7 in seen or position >= len(data))
        seen.add(field)
        value, position = _varint(data, position)
        if wire == 2:
            position += value
        if position > len(data):
            return starts_with_version
    return starts_with_version or {1, 7} <= seen


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the number at `position` and where it ends (past the end of the data if it is cut off)."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            return value, len(data) + 1
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    return -1, len(data) + 1
