"""Large weights inside of an ONNX file: cut out before the parser sees them, and read where they lie."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from efrapq.errors import BadWeightsError, CorruptFileError, LimitError, UnsafeFileError
from efrapq.io import Limits, Source, load_onnx
from efrapq.io.onnx_inline import without_weights

SMALL = Limits(max_inline_bytes=1, min_outside_bytes=64)
WEIGHT = np.arange(32, dtype=np.float32).reshape(4, 8)
OTHER = WEIGHT[:, :4].copy() - 7
BIAS = np.linspace(0, 1, 4, dtype=np.float32)
RAW = bytes([9 << 3 | 2])


def model(*initializers: TensorProto) -> onnx.ModelProto:
    held = initializers or tuple(numpy_helper.from_array(a, n) for a, n in ((WEIGHT, "w"), (BIAS, "b"), (OTHER, "v")))
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1, name="first"),
        helper.make_node("MatMul", ["h", "v"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        list(held),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, doc_string="after")


def expected(proto: onnx.ModelProto, least: int) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in copy.graph.initializer:
        if len(tensor.raw_data) >= least and tensor.data_location != TensorProto.EXTERNAL:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
    return copy


def parsed(data: bytes) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(data)


@pytest.fixture
def load(tmp_path: Path, as_source: Callable[..., Source]) -> Callable[..., Any]:
    def load(content: onnx.ModelProto | bytes, limits: Limits = SMALL) -> Any:
        path = tmp_path / "m.onnx"
        data = content if isinstance(content, bytes) else content.SerializeToString()
        path.write_bytes(data)
        return load_onnx(as_source(data, path), limits=limits)

    return load


# The bytes.


@given(
    st.lists(st.tuples(st.integers(0, 300), st.sampled_from([None, 0, 1])), min_size=1, max_size=6),
    st.integers(1, 200),
    st.integers(0, 3),
)
def test_what_is_left_is_the_model_without_them(tensors: list[tuple[int, int | None]], least: int, typed: int) -> None:
    rng = np.random.default_rng(0)
    held = []
    for index, (size, location) in enumerate(tensors):
        tensor = TensorProto(name=f"t{index}", data_type=TensorProto.UINT8, dims=[size])
        tensor.raw_data = rng.integers(0, 256, size, np.uint8).tobytes()
        if location is not None:
            tensor.data_location = location
        held.append(tensor)
    held += [helper.make_tensor(f"f{n}", TensorProto.FLOAT, [90], list(range(90))) for n in range(typed)]
    proto = model(*held)
    data = proto.SerializeToString()
    left, places = without_weights(data, least)
    assert parsed(left) == expected(proto, least)
    cut = [i for i, t in enumerate(held) if len(t.raw_data) >= least and t.data_location != TensorProto.EXTERNAL]
    assert list(places) == cut
    for index, place in places.items():
        assert data[place.offset : place.offset + place.length] == held[index].raw_data


def test_nothing_large_leaves_the_bytes_alone() -> None:
    data = model().SerializeToString()
    assert without_weights(data, 1000) == (data, {})


def field(number: int, content: bytes, wire: int = 2) -> bytes:
    """A field whose length takes more bytes than it needs, as no writer encodes it, and every reader takes it."""
    length = bytes([len(content) & 0x7F | 0x80, len(content) >> 7 & 0x7F | 0x80, len(content) >> 14])
    return bytes([number << 3 | wire]) + length + content


def test_longer_lengths_than_needed_are_read() -> None:
    tensor = numpy_helper.from_array(WEIGHT, "w")
    raw = tensor.raw_data
    tensor.ClearField("raw_data")
    graph = field(5, tensor.SerializeToString() + field(9, raw))
    data = bytes([1 << 3, 8]) + field(7, graph)
    left, places = without_weights(data, 64)
    (place,) = places.values()
    assert data[place.offset : place.offset + place.length] == raw
    tensor.data_location = TensorProto.EXTERNAL
    assert list(parsed(left).graph.initializer) == [tensor]
    assert parsed(left).ir_version == 8


@pytest.mark.parametrize(
    "odd",
    [
        lambda graph, tensor: field(7, graph) + field(7, field(5, tensor)),
        lambda graph, tensor: field(7, field(5, tensor + field(9, WEIGHT.tobytes()))),
        lambda graph, tensor: field(7, field(5, tensor) + bytes([20 << 3 | 3, 20 << 3 | 4])),
        lambda graph, tensor: field(7, field(5, tensor) + bytes([5 << 3, 1])),
        lambda graph, tensor: bytes([7 << 3, 1]) + field(7, field(5, tensor)),
        lambda graph, tensor: field(7, field(5, tensor))[:-1],
        lambda graph, tensor: field(7, field(5, tensor)) + b"\xff" * 11,
        lambda graph, tensor: field(7, field(5, tensor)) + bytes([15 << 3 | 5, 0, 0]),
        lambda graph, tensor: b"",
    ],
    ids=[
        "two graphs", "two data", "a group", "an initializer that is a number", "a graph that is a number", "cut off",
        "a number without end", "half a number", "empty",
    ],
)  # fmt: skip
def test_unusual_bytes_are_left_to_the_parser(odd: Callable[[bytes, bytes], bytes]) -> None:
    tensor = numpy_helper.from_array(WEIGHT, "w").SerializeToString()
    data = odd(field(5, tensor), tensor)
    assert without_weights(data, 64) == (data, {})


def test_a_tensor_of_very_many_fields_is_left_to_the_parser() -> None:
    tensor = bytes([1 << 3, 1]) * 70 + numpy_helper.from_array(WEIGHT.reshape(-1), "w").SerializeToString()
    data = field(7, field(5, tensor))
    assert without_weights(data, 64) == (data, {})
    assert parsed(data).graph.initializer[0].raw_data == WEIGHT.tobytes()


# The model.


def test_large_weights_stay_in_the_file(load: Callable[..., Any]) -> None:
    found = load(model())
    assert (found.external, found.external_bytes) == ({}, 0)
    assert list(found.outside) == ["w", "v"]
    assert found.outside["w"].read().tobytes() == WEIGHT.tobytes()
    assert found.outside["v"].read().tobytes() == OTHER.tobytes()
    assert (found.outside["w"].dims, found.outside["w"].data_type) == ((4, 8), TensorProto.FLOAT)
    assert found.model == expected(model(), 64)


def test_a_small_model_is_read_whole(load: Callable[..., Any]) -> None:
    found = load(model(), Limits(min_outside_bytes=64))
    assert not found.outside
    assert found.model == model()


def test_they_are_read_through_a_link_and_from_another_folder(
    tmp_path: Path, as_source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user named the file, and what he names may be a link, as in a cache of downloads."""
    (tmp_path / "cache").mkdir()
    data = model().SerializeToString()
    (tmp_path / "cache" / "blob").write_bytes(data)
    (tmp_path / "m.onnx").symlink_to(tmp_path / "cache" / "blob")
    monkeypatch.chdir(tmp_path)
    found = load_onnx(as_source(data, Path("m.onnx")), limits=SMALL)
    monkeypatch.chdir(tmp_path / "cache")
    assert found.outside["w"].read().tobytes() == WEIGHT.tobytes()


def change(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize("kind", ["changed", "shorter", "gone", "a folder"])
def test_a_file_that_is_not_what_it_was_is_refused(load: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    found = load(model())
    path = tmp_path / "m.onnx"
    if kind == "changed":
        change(path, OTHER.tobytes(), (OTHER + 1).tobytes())
        assert found.outside["w"].read().tobytes() == WEIGHT.tobytes()
    elif kind == "shorter":
        os.truncate(path, found.outside["v"].end - 1)
    else:
        path.unlink()
        if kind == "a folder":
            path.mkdir()
    words = {"gone": "no such file", "a folder": "a directory, not a regular file"}
    with pytest.raises(Exception, match=words.get(kind, "changed since the model was loaded")) as refusal:
        found.outside["v"].read()
    assert isinstance(refusal.value, CorruptFileError) == (kind in ("changed", "shorter"))


def test_what_is_wrong_with_them_is_still_seen(load: Callable[..., Any]) -> None:
    def changed(**fields: Any) -> onnx.ModelProto:
        proto = model()
        for name, value in fields.items():
            if name == "dims":
                del proto.graph.initializer[0].dims[:]
                proto.graph.initializer[0].dims.extend(value)
            else:
                setattr(proto.graph.initializer[0], name, value)
        return proto

    with pytest.raises(CorruptFileError, match=r"initializer 'w' of shape \[4, 7\] needs 112 bytes and has 128"):
        load(changed(dims=[4, 7]))
    with pytest.raises(CorruptFileError, match="negative dimension"):
        load(changed(dims=[-4, -8]))
    with pytest.raises(LimitError, match="too many elements"):
        load(changed(dims=[1 << 33, 8]))
    with pytest.raises(CorruptFileError, match="unknown data type"):
        load(changed(data_type=99))
    with pytest.raises(CorruptFileError):
        load(changed(data_type=TensorProto.STRING))
    with pytest.raises(CorruptFileError, match="without a name"):
        load(changed(name=""))
    with pytest.raises(CorruptFileError, match="defined twice"):
        load(changed(name="v"))
    with pytest.raises(BadWeightsError, match="NaN or infinity in 'w'"):
        load(changed(raw_data=np.where(WEIGHT == 5, np.nan, WEIGHT).astype(np.float32).tobytes()))
    both = changed()
    both.graph.initializer[0].float_data.append(1.0)
    with pytest.raises(CorruptFileError, match="wrong field or more than once"):
        load(both)


def test_a_tensor_that_names_no_file_is_not_taken_for_one_of_them(load: Callable[..., Any]) -> None:
    proto = expected(model(), 64)
    with pytest.raises(UnsafeFileError, match="which is no path"):
        load(proto)


def test_names_of_files_beside_the_data_mean_nothing(load: Callable[..., Any]) -> None:
    proto = model()
    proto.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")
    found = load(proto)
    assert not found.model.graph.initializer[0].external_data
    assert found.outside["w"].read().tobytes() == WEIGHT.tobytes()


def test_beside_a_file_of_external_data(load: Callable[..., Any], tmp_path: Path) -> None:
    proto = model()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="m.data")
    (tmp_path / "m.data").write_bytes(WEIGHT.tobytes())
    found = load(proto)
    assert sorted(found.outside) == ["v", "w"]
    assert found.external_bytes == WEIGHT.nbytes
    assert list(found.external) == ["m.data"]
    assert found.outside["w"].read().tobytes() == WEIGHT.tobytes()
    assert found.outside["v"].read().tobytes() == OTHER.tobytes()
