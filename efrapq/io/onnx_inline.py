"""Large weights inside of an ONNX file, found in its bytes before protobuf would copy them.

Field numbers are those of onnx.proto; the encoding is protobuf's: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Place", "without_weights"]

_GRAPH, _INITIALIZER, _RAW_DATA, _DATA_LOCATION = 7, 5, 9, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEFAULT, _EXTERNAL = b"\x00", bytes([_DATA_LOCATION << 3 | _VARINT, 1])
# A graph of more fields is past every limit on nodes, a tensor of more holds its numbers in them, one by one.
_MOST_FIELDS, _MOST_TENSOR_FIELDS = 2_000_000, 64


class Place(NamedTuple):
    """Where the raw data of an initializer lie in the file."""

    offset: int
    length: int


class _Field(NamedTuple):
    """start and end: of the field. content: where what it says begins, behind its tag and length."""

    number: int
    wire: int
    start: int
    content: int
    end: int


class _NotPlainError(Exception):
    """The bytes are not encoded as protobuf's own writers do it, or not at all: protobuf itself is to read them."""


def without_weights(data: bytes, least: int) -> tuple[bytes, dict[int, Place]]:
    """An encoded ModelProto without the raw data of the initializers of its graph that have at least so many bytes.

    Each such initializer says instead that its data are external, and not where. With the new encoding come their
    places in `data`, by the position of the initializer in the graph. Tensors whose data are elsewhere already stay
    as they are, and so does a model that is encoded in an unusual way: then no place is named.
    """
    try:
        graphs = [field for field in _fields(data, 0, len(data)) if field.number == _GRAPH]
        if len(graphs) != 1 or graphs[0].wire != _BYTES:
            return data, {}
        graph = graphs[0]
        body, places = _thinned(data, graph, least)
    except _NotPlainError:
        return data, {}
    if not places:
        return data, {}
    view = memoryview(data)
    head: list[bytes | memoryview] = [
        view[: graph.start],
        bytes([_GRAPH << 3 | _BYTES]),
        _varint(sum(len(part) for part in body)),
    ]
    return b"".join([*head, *body, view[graph.end :]]), places


def _thinned(data: bytes, graph: _Field, least: int) -> tuple[list[bytes | memoryview], dict[int, Place]]:
    """The content of the graph in pieces, and the places of what they lack."""
    view = memoryview(data)
    parts: list[bytes | memoryview] = []
    places: dict[int, Place] = {}
    index, copied = -1, graph.content
    for field in _fields(data, graph.content, graph.end):
        if field.number != _INITIALIZER:
            continue
        if field.wire != _BYTES:
            raise _NotPlainError
        index += 1
        raw = _raw_data(data, field) if field.end - field.content >= least else None
        if raw is None or raw.end - raw.content < least:
            continue
        tensor: list[bytes | memoryview] = [view[field.content : raw.start], view[raw.end : field.end], _EXTERNAL]
        length = _varint(sum(len(part) for part in tensor))
        parts += [view[copied : field.start], bytes([_INITIALIZER << 3 | _BYTES]), length, *tensor]
        places[index] = Place(raw.content, raw.end - raw.content)
        copied = field.end
    return [*parts, view[copied : graph.end]], places


def _raw_data(data: bytes, tensor: _Field) -> _Field | None:
    """The one field of raw data; None if there is none, and for a tensor whose data are said to be elsewhere."""
    found = None
    for count, field in enumerate(_fields(data, tensor.content, tensor.end)):
        elsewhere = field.number == _DATA_LOCATION and data[field.content : field.end] != _DEFAULT
        if elsewhere or count == _MOST_TENSOR_FIELDS:
            return None
        if field.number == _RAW_DATA:
            if found is not None or field.wire != _BYTES:
                raise _NotPlainError
            found = field
    return found


def _fields(data: bytes, start: int, end: int) -> Iterator[_Field]:
    """The fields of a message."""
    at = start
    for _ in range(_MOST_FIELDS):
        if at == end:
            return
        tag, content = _read_varint(data, at, end)
        wire = tag & 7
        if wire == _BYTES:
            length, content = _read_varint(data, content, end)
            stop = content + length
        elif wire == _VARINT:
            _, stop = _read_varint(data, content, end)
        elif wire in (_FIXED64, _FIXED32):
            stop = content + (8 if wire == _FIXED64 else 4)
        else:
            raise _NotPlainError
        if stop > end:
            raise _NotPlainError
        yield _Field(tag >> 3, wire, at, content, stop)
        at = stop
    raise _NotPlainError


def _read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _NotPlainError


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
