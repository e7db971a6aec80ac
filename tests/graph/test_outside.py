"""Weights in files are prepared as weights in the model are, and read one at a time."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from efrapq.graph import constants as const
from efrapq.graph.executor import Executor
from efrapq.graph.inputs_first import inputs_first
from efrapq.graph.layers import find_layers, weight_array
from efrapq.graph.outside import put_outside, set_aside, take_back
from efrapq.graph.prepare import prepare
from efrapq.io import Limits, OnnxFile, load_onnx, read_source

rng = np.random.default_rng(0)


def array(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return (rng.standard_normal(shape) / 4).astype(dtype)


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[..., tuple[OnnxFile, OnnxFile]]:
    """(proto, bytes from which on a tensor stays outside) → the model read whole, and with its weights outside."""

    def make(proto: onnx.ModelProto, least: int) -> tuple[OnnxFile, OnnxFile]:
        copy = onnx.ModelProto.FromString(proto.SerializeToString())
        path = tmp_path / "m.onnx"
        onnx.save(copy, path, save_as_external_data=True, location="m.data", size_threshold=0)
        source = read_source(path)
        limits = Limits(max_inline_bytes=1, min_outside_bytes=least)
        return load_onnx(source), load_onnx(source, limits=limits)

    return make


def written(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def moves() -> tuple[list[Any], dict[str, np.ndarray]]:
    """Weights behind operators that onnxsim folds, one that two layers share, factors of a Gemm."""
    nodes = [
        helper.make_node("Transpose", ["w0"], ["w0t"], perm=[1, 0], name="transpose"),
        helper.make_node("MatMul", ["x", "w0t"], ["h0"], name="m0"),
        helper.make_node("Add", ["h0", "b0"], ["h1"], name="a0"),
        helper.make_node("Cast", ["w1"], ["w1f"], to=TensorProto.FLOAT, name="cast"),
        helper.make_node("Gemm", ["h1", "w1f", "b1"], ["h2"], alpha=0.5, beta=2.0, name="g1"),
        helper.make_node("Reshape", ["w2", "square"], ["w2s"], name="reshape"),
        helper.make_node("MatMul", ["h2", "w2s"], ["h3"], name="m2"),
        helper.make_node("Unsqueeze", ["w3", "axis"], ["w3u"], name="unsqueeze"),
        helper.make_node("Squeeze", ["w3u", "axis"], ["w3s"], name="squeeze"),
        helper.make_node("MatMul", ["h3", "w3s"], ["h4"], name="m3"),
        helper.make_node("MatMul", ["h4", "w3"], ["y"], name="m4"),
    ]
    constants = {
        "w0": array(8, 16), "b0": array(8), "w1": array(8, 12, dtype=np.float16), "b1": array(12), "w2": array(144),
        "square": np.array([12, -1], np.int64), "axis": np.array([0], np.int64), "w3": array(12, 12),
    }  # fmt: skip
    return nodes, constants


@pytest.mark.parametrize("least", [1, 200], ids=["all outside", "weights outside"])
@pytest.mark.parametrize("opset", [17, 13])
def test_prepared_alike(residual_net: Any, loaded: Any, least: int, opset: int) -> None:
    whole, apart = loaded(residual_net(opset=opset), least)
    assert {"c1.weight", "c2.weight", "c3.weight"} <= set(apart.outside)
    assert written(prepare(apart.model, apart.outside)) == written(prepare(whole.model))


def test_folded_moves_are_alike(make_model: Any, loaded: Any) -> None:
    nodes, constants = moves()
    whole, apart = loaded(make_model(nodes, {"x": ["N", 16]}, {"y": ["N", 12]}, constants), 100)
    assert sorted(apart.outside) == ["w0", "w1", "w2", "w3"]
    model, expected = prepare(apart.model, apart.outside), prepare(whole.model)
    assert [n.op_type for n in model.graph] == ["Gemm", "Gemm", "MatMul", "MatMul", "MatMul"]
    ours, theirs = find_layers(model.graph)[0], find_layers(expected.graph)[0]
    assert [layer.name for layer in ours] == [layer.name for layer in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert isinstance(model.graph.initializers[a.weight].const_value, ir.LazyTensor)
        np.testing.assert_array_equal(weight_array(model.graph, a), weight_array(expected.graph, b))


@pytest.mark.parametrize("samples", ["N", 3], ids=["dynamic", "fixed"])
def test_a_matrix_over_rows_becomes_a_gemm(make_model: Any, loaded: Any, run_ort: Any, samples: Any) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h0"], name="m0"),
        helper.make_node("Add", ["h0", "b0"], ["h1"], name="a0"),
        helper.make_node("Relu", ["h1"], ["r"], name="r0"),
        helper.make_node("MatMul", ["r", "w1"], ["h2"], name="m1"),
        helper.make_node("Add", ["b1", "h2"], ["y"], name="a1"),
    ]
    constants = {"w0": array(6, 10), "b0": array(10), "w1": array(10, 4), "b1": array(4)}
    shape = [samples, 5, 6]
    whole, apart = loaded(make_model(nodes, {"x": shape}, {"y": [samples, 5, 4]}, constants), 100)
    model, expected = prepare(apart.model, apart.outside), prepare(whole.model)
    assert Counter(node.op_type for node in model.graph) == {"Reshape": 4, "Gemm": 2, "Relu": 1}
    # Of fixed sizes onnxsim needs fewer Reshapes; they cost nothing.
    assert Counter(n.op_type for n in expected.graph if n.op_type != "Reshape") == {"Gemm": 2, "Relu": 1}
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    x = array(3, 5, 6)
    (actual,), (wanted,) = run_ort(proto, x, optimized=False), run_ort(whole.model, x, optimized=False)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-6)
    assert proto.graph.output[0].name == "y"


@pytest.mark.parametrize("dims", [["A", "B", 6], ["A", 0, 6]], ids=["two dynamic sizes", "an empty axis"])
def test_a_matrix_over_rows_that_are_not_known_stays(make_model: Any, loaded: Any, dims: list[Any]) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h0"], name="m0"),
        helper.make_node("Add", ["h0", "b0"], ["y"], name="a0"),
    ]
    proto = make_model(nodes, {"x": dims}, {"y": [*dims[:2], 10]}, {"w0": array(6, 10), "b0": array(10)})
    _, apart = loaded(proto, 100)
    assert [node.op_type for node in prepare(apart.model, apart.outside).graph] == ["MatMul", "Add"]


def test_what_is_computed_of_a_weight_in_a_file_stays_in_the_graph(make_model: Any, loaded: Any) -> None:
    nodes = [
        helper.make_node("Mul", ["w", "two"], ["w2"], name="mul"),
        helper.make_node("MatMul", ["x", "w2"], ["y"], name="m"),
    ]
    constants = {"w": array(6, 10), "two": np.float32([2.0])}
    whole, apart = loaded(make_model(nodes, {"x": ["N", 6]}, {"y": ["N", 10]}, constants), 100)
    assert [n.op_type for n in prepare(whole.model).graph] == ["MatMul"]
    model = prepare(apart.model, apart.outside)
    assert [n.op_type for n in model.graph] == ["Mul", "MatMul"]
    layers, skipped = find_layers(model.graph)
    assert not layers
    assert "run time" in skipped[0].reason
    x = torch.from_numpy(array(4, 6))
    result = Executor(model).run({"x": x})["y"]
    np.testing.assert_allclose(result.numpy(), x.numpy() @ (2 * constants["w"]), rtol=0, atol=1e-6)


def test_an_initializer_that_is_an_input_too(make_model: Any, loaded: Any) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")]
    proto = make_model(nodes, {"x": ["N", 6], "w": [6, 10]}, {"y": ["N", 10]}, {"w": array(6, 10)}, ir_version=3)
    whole, apart = loaded(proto, 100)
    model = prepare(apart.model, apart.outside)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert written(model) == written(prepare(whole.model))


# One at a time.


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[np.ndarray]]:
    """What was read from files, as long as somebody has it."""
    from efrapq.io import FileTensor

    found: list[weakref.ref[np.ndarray]] = []
    honest = FileTensor.read

    def read(self: FileTensor) -> np.ndarray:
        gc.collect()
        assert sum(held() is not None for held in found) <= 1, "more than one tensor is in memory"
        data = honest(self)
        found.append(weakref.ref(data))
        return data

    monkeypatch.setattr(FileTensor, "read", read)
    return found


def test_nothing_is_kept(residual_net: Any, loaded: Any, images: Any, reads: list[Any]) -> None:
    _, apart = loaded(residual_net(), 200)
    model = prepare(apart.model, apart.outside)
    layers, _ = find_layers(model.graph)
    for layer in layers:
        weight_array(model.graph, layer)
    executor = Executor(model)
    with torch.no_grad():
        executor.run({"input": torch.from_numpy(images(2))})
    gc.collect()
    assert len(reads) > len(layers)
    assert sum(held() is not None for held in reads) <= 1


def test_the_executor_reads_a_constant_once_for_one_node_after_the_other(
    make_model: Any, loaded: Any, reads: list[Any]
) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "i"], ["rows"], name="gather"),
        helper.make_node("MatMul", ["rows", "w"], ["y"], name="m"),
    ]
    constants = {"table": array(20, 6), "w": array(6, 10), "i": np.arange(4, dtype=np.int64)}
    nodes.append(helper.make_node("Add", ["y", "x"], ["z"], name="add"))
    _, apart = loaded(make_model(nodes, {"x": ["N", 10]}, {"z": ["N", 10]}, constants), 100)
    executor = Executor(prepare(apart.model, apart.outside))
    before = len(reads)
    for _ in range(3):
        table = executor.constants["table"]
    np.testing.assert_array_equal(table.numpy(), constants["table"])
    assert len(reads) == before + 1
    assert "table" in executor.constants
    assert len(reads) == before + 1
    assert set(executor.constants) >= {"table", "w"}
    assert len(executor.constants) == len(list(executor.constants))


# Aside and back.


def test_set_aside_and_taken_back(residual_net: Any, loaded: Any) -> None:
    _, apart = loaded(residual_net(), 200)
    model = prepare(apart.model, apart.outside)
    before = written(model)
    order = list(model.graph.initializers)
    aside = set_aside(model.graph)
    assert sorted(aside) == sorted(layer + ".weight" for layer in ("c1", "c2", "c3")) + ["logits.weight"] * (
        "logits.weight" in aside
    )
    slim = ir.to_proto(model)
    assert not {t.name for t in slim.graph.initializer} & set(aside)
    back = ir.from_proto(slim)
    take_back(back, aside)
    assert sorted(back.graph.initializers) == sorted(order)
    take_back(model, aside)
    after = {t.name: numpy_helper.to_array(t) for t in ir.to_proto(model).graph.initializer}
    for tensor in onnx.ModelProto.FromString(before).graph.initializer:
        np.testing.assert_array_equal(after[tensor.name], numpy_helper.to_array(tensor))


def test_put_outside_keeps_the_data(monkeypatch: pytest.MonkeyPatch, make_model: Any) -> None:
    import ml_dtypes

    monkeypatch.setattr("efrapq.graph.outside.LARGE", 16)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")]
    model = ir.from_proto(make_model(nodes, {"x": ["N", 6]}, {"y": ["N", 10]}, {"w": array(6, 10)}))
    codes = rng.integers(-8, 8, (5, 9)).astype(ml_dtypes.int4)
    strided = array(8, 6).T
    for name, data in (("codes", codes), ("turned", strided), ("small", array(3))):
        const.initializer(model.graph, name, data)
    expected = {t.name: t.raw_data for t in ir.to_proto(model).graph.initializer}
    sources = put_outside(model.graph)
    assert sorted(sources) == ["codes", "turned", "w"]
    for name, source in sources.items():
        data = source.read()
        assert (data.dtype, data.ndim, source.length) == (np.uint8, 1, data.size)
        assert data.tobytes() == expected[name]
    for tensor in ir.to_proto(model).graph.initializer:
        assert (tensor.data_location == TensorProto.EXTERNAL) == (tensor.name in sources)


def test_a_weight_in_a_file_is_turned(make_model: Any, loaded: Any) -> None:
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1, name="g")]
    weight = array(10, 6)
    _, apart = loaded(make_model(nodes, {"x": ["N", 6]}, {"y": ["N", 10]}, {"w": weight}), 100)
    model = prepare(apart.model, apart.outside)
    assert inputs_first(model.graph, find_layers(model.graph)[0][0])
    (layer,), _ = find_layers(model.graph)
    assert isinstance(model.graph.initializers["w"].const_value, ir.LazyTensor)
    np.testing.assert_array_equal(weight_array(model.graph, layer), weight.T)
