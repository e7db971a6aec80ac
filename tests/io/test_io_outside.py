"""Initializers that stay in their files: what is promised when somebody writes to these."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import efrapq.io.external as external
import efrapq.io.source as reading
from efrapq.errors import BadWeightsError, CorruptFileError, LimitError, UnsafeFileError
from efrapq.io import Limits, Source, data_as_inputs, load_onnx

SMALL = Limits(max_inline_bytes=200, min_outside_bytes=64)
WEIGHT = np.arange(32, dtype=np.float32).reshape(4, 8)
OTHER = WEIGHT.T.copy() - 7
BIAS = np.linspace(0, 1, 4, dtype=np.float32)


def outside(name: str, array: np.ndarray, offset: int, location: str = "m.data") -> TensorProto:
    tensor = TensorProto(
        name=name,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        dims=array.shape,
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", location), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model(*initializers: TensorProto, nodes: list[Any] | None = None) -> onnx.ModelProto:
    nodes = nodes or [helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1, name="first")]
    graph = helper.make_graph(
        [*nodes, helper.make_node("MatMul", ["h", "v"], ["y"], name="second")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        list(initializers),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


CONTENT = b"head" + WEIGHT.tobytes() + BIAS.tobytes() + OTHER[:, :4].tobytes()


def plain() -> onnx.ModelProto:
    """w and v in one file with the bias between them, which is too small to stay there."""
    return model(outside("w", WEIGHT, 4), outside("b", BIAS, 132), outside("v", OTHER[:4, :4], 148))


@pytest.fixture
def load(tmp_path: Path, as_source: Callable[..., Source]) -> Callable[..., Any]:
    (tmp_path / "m.data").write_bytes(CONTENT)

    def run(proto: onnx.ModelProto, limits: Limits = SMALL) -> Any:
        return load_onnx(as_source(proto.SerializeToString(), tmp_path / "model.onnx"), limits=limits)

    return run


def array_of(loaded: Any, name: str) -> np.ndarray:
    held = loaded.outside[name]
    found: np.ndarray = held.read().view(helper.tensor_dtype_to_np_dtype(held.data_type)).reshape(held.dims)
    return found


@pytest.mark.parametrize("chunk", [1 << 24, 7], ids=["one piece", "many pieces"])
def test_large_ones_stay_and_small_ones_are_read(load: Any, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(reading, "_CHUNK", chunk)
    monkeypatch.setattr(external, "_CHUNK", chunk)
    loaded = load(plain())
    assert loaded.external == {"m.data": hashlib.sha256(CONTENT).hexdigest()}
    assert loaded.external_bytes == len(CONTENT)
    assert sorted(loaded.outside) == ["v", "w"]
    np.testing.assert_array_equal(array_of(loaded, "w"), WEIGHT)
    np.testing.assert_array_equal(array_of(loaded, "v"), np.frombuffer(CONTENT, np.float32, 16, 148).reshape(4, 4))
    w, b, v = loaded.model.graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(b), BIAS)
    for tensor in (w, v):
        # No reader of the proto can follow a path any more.
        assert tensor.data_location == TensorProto.EXTERNAL
        assert not tensor.external_data
        assert not tensor.raw_data


def test_a_model_within_the_limit_is_read_whole(load: Any) -> None:
    total = len(plain().SerializeToString()) + WEIGHT.nbytes + BIAS.nbytes + 64
    assert not load(plain(), Limits(max_inline_bytes=total, min_outside_bytes=64)).outside
    assert load(plain(), Limits(max_inline_bytes=total - 1, min_outside_bytes=64)).outside
    assert not load(plain(), Limits()).outside


def test_pieces_may_overlap(load: Any) -> None:
    proto = model(outside("w", WEIGHT, 4), outside("b", BIAS, 132), outside("v", OTHER[:4, :4], 4))
    loaded = load(proto)
    np.testing.assert_array_equal(array_of(loaded, "w"), WEIGHT)
    np.testing.assert_array_equal(array_of(loaded, "v"), WEIGHT.reshape(-1)[:16].reshape(4, 4))


def test_what_is_no_initializer_of_the_graph_is_read(load: Any) -> None:
    constant = helper.make_node("Constant", [], ["w"], value=outside("w", WEIGHT, 4), name="constant")
    gemm = helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1, name="first")
    loaded = load(model(outside("b", BIAS, 132), outside("v", OTHER[:4, :4], 148), nodes=[constant, gemm]))
    assert sorted(loaded.outside) == ["v"]
    held = next(n for n in loaded.model.graph.node if n.name == "constant").attribute[0].t
    np.testing.assert_array_equal(numpy_helper.to_array(held), WEIGHT)


# Somebody writes to the file meanwhile.


@pytest.mark.parametrize("change", ["first byte", "last byte", "truncated", "rewritten in place"])
def test_a_change_after_loading_is_an_error(load: Any, tmp_path: Path, change: str) -> None:
    loaded, path = load(plain()), tmp_path / "m.data"
    status = path.stat()
    content = bytearray(CONTENT)
    if change == "first byte":
        content[4] ^= 1
    elif change == "last byte":
        content[131] ^= 1
    elif change == "truncated":
        del content[100:]
    else:
        content[40:80] = bytes(40)
    with path.open("r+b") as file:
        file.write(content)
        file.truncate(len(content))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # a time stamp can be set back: it proves nothing
    with pytest.raises(CorruptFileError, match=r"m\.data'"):
        loaded.outside["w"].read()


def test_only_the_tensor_that_changed_is_refused(load: Any, tmp_path: Path) -> None:
    loaded = load(plain())
    changed = bytearray(CONTENT)
    changed[200] ^= 1
    (tmp_path / "m.data").write_bytes(changed)
    np.testing.assert_array_equal(array_of(loaded, "w"), WEIGHT)
    with pytest.raises(CorruptFileError, match=r"changed since the model was loaded \(initializer 'v'\)"):
        loaded.outside["v"].read()


def test_what_was_read_does_not_change_with_the_file(load: Any, tmp_path: Path) -> None:
    loaded = load(plain())
    found = array_of(loaded, "w")
    with (tmp_path / "m.data").open("r+b") as file:
        file.write(bytes(len(CONTENT)))
    np.testing.assert_array_equal(found, WEIGHT)


def test_a_link_in_the_place_of_the_file_is_refused(load: Any, tmp_path: Path) -> None:
    loaded = load(plain())
    (tmp_path / "m.data").rename(tmp_path / "same")
    (tmp_path / "m.data").symlink_to("same")
    with pytest.raises(UnsafeFileError, match="symbolic link"):
        loaded.outside["w"].read()
    (tmp_path / "m.data").unlink()
    with pytest.raises(CorruptFileError, match="is missing"):
        loaded.outside["w"].read()


def test_another_working_directory_leads_to_the_same_file(
    tmp_path: Path, as_source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "m.data").write_bytes(CONTENT)
    (tmp_path / "there" / "m.data").write_bytes(bytes(len(CONTENT)))
    monkeypatch.chdir(tmp_path / "here")
    loaded = load_onnx(as_source(plain().SerializeToString(), Path("model.onnx")), limits=SMALL)
    monkeypatch.chdir(tmp_path / "there")
    np.testing.assert_array_equal(array_of(loaded, "w"), WEIGHT)


# Bad data and limits.


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_numbers_are_found_outside(load: Any, tmp_path: Path, value: float) -> None:
    bad = WEIGHT.copy()
    bad[2, 5] = value
    (tmp_path / "m.data").write_bytes(CONTENT.replace(WEIGHT.tobytes(), bad.tobytes()))
    with pytest.raises(BadWeightsError, match="NaN or infinity in 'w'"):
        load(plain())


@pytest.mark.parametrize("field", ["float_data", "int32_data", "segment"])
def test_data_in_two_places_are_refused(load: Any, field: str) -> None:
    proto = plain()
    tensor = proto.graph.initializer[0]
    if field == "segment":
        tensor.segment.begin = 0
    else:
        getattr(tensor, field).extend([1] * 32)
    with pytest.raises(CorruptFileError, match="initializer 'w'"):
        load(proto)


def test_limits(load: Any) -> None:
    proto = plain()
    written = len(proto.SerializeToString())
    with pytest.raises(LimitError, match="with its external data"):
        load(proto, Limits(max_inline_bytes=200, min_outside_bytes=64, max_external_bytes=written + 207))
    assert load(proto, Limits(max_inline_bytes=200, min_outside_bytes=64, max_external_bytes=written + 208)).outside
    # What is not outside has to fit as ever.
    with pytest.raises(LimitError, match="with its external data"):
        load(proto, Limits(max_inline_bytes=200, min_outside_bytes=64, max_onnx_bytes=written + 15))


def test_a_large_file_is_refused_before_it_is_read(load: Any, tmp_path: Path) -> None:
    with (tmp_path / "m.data").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(LimitError, match=r"m\.data': 1,099,511,627,776 bytes, over the limit"):
        load(plain())


def test_data_as_inputs(load: Any) -> None:
    loaded = load(plain())
    before = loaded.model.SerializeToString(deterministic=True)
    made = data_as_inputs(loaded.model)
    assert loaded.model.SerializeToString(deterministic=True) == before
    assert [i.name for i in made.graph.input] == ["x", "w", "v"]
    assert [d.dim_value for d in made.graph.input[1].type.tensor_type.shape.dim] == [4, 8]
    assert [t.name for t in made.graph.initializer] == ["b"]
    onnx.checker.check_model(made, full_check=True)
    whole = load(plain(), Limits()).model
    assert data_as_inputs(whole) is whole
