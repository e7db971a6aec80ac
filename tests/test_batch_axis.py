"""Models that carry the batch behind the first axis of an input, as the state of a recurrent network is laid out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import efrapq
from efrapq.calibration.arrays import CHUNK_VALUES
from efrapq.errors import DataError, UnsupportedModelError
from efrapq.graph.layers import Layer, find_layers
from efrapq.graph.prepare import prepare
from efrapq.stream.walk import _joined
from efrapq.verification import verify
from efrapq.verification.kernels import report_kernels
from efrapq.verification.session import open_session
from efrapq.verification.shapes import graph_shapes

F32 = np.float32
Arrays = dict[str, NDArray[Any]]
HIDDEN = 8


def recurrent_net(*, batch_first: bool = False, state_first: bool = False, names: bool = True) -> onnx.ModelProto:
    """One step of a network with two states: x (N, 6), state (2, N, 8) → y (N, 4), next (2, N, 8).

    batch_first: the state is (N, 2, 8) and the network transposes it. state_first: it is the first input. names: of
    the dynamic dimensions.
    """
    rng = np.random.default_rng(0)
    constants: Arrays = {
        "in.weight": rng.standard_normal((6, HIDDEN)).astype(F32) / 2,
        "in.bias": rng.standard_normal(HIDDEN).astype(F32) / 8,
        "state.weight": rng.standard_normal((HIDDEN, HIDDEN)).astype(F32) / 3,
        "head.weight": rng.standard_normal((HIDDEN, 4)).astype(F32) / 3,
        "head.bias": rng.standard_normal(4).astype(F32) / 8,
        "one": np.array(1),
    }
    make = helper.make_node
    nodes = [
        make("Gemm", ["x", "in.weight", "in.bias"], ["read"]),
        make("MatMul", ["held", "state.weight"], ["moved"]),
        make("Add", ["moved", "read"], ["sum"]),
        make("Relu", ["sum"], ["next"]),
        make("Gather", ["next", "one"], ["last"], axis=0),
        make("Gemm", ["last", "head.weight", "head.bias"], ["y"]),
    ]
    if batch_first:
        nodes.insert(
            0,
            make(
                "Transpose",
                [
                    "state",
                ],
                ["held"],
                perm=[1, 0, 2],
            ),
        )
    else:
        for node in nodes:
            node.input[:] = ["state" if name == "held" else name for name in node.input]
    for node in nodes:
        node.name = f"node_{node.output[0]}"
    n = "N" if names else None
    info = helper.make_tensor_value_info
    inputs = [
        info("x", TensorProto.FLOAT, [n, 6]),
        info("state", TensorProto.FLOAT, [n, 2, HIDDEN] if batch_first else [2, n, HIDDEN]),
    ]
    graph = helper.make_graph(
        nodes,
        "step",
        inputs[::-1] if state_first else inputs,
        [info("y", TensorProto.FLOAT, [n, 4]), info("next", TensorProto.FLOAT, [2, n, HIDDEN])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def steps(count: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((count, 6)).astype(F32),
        "state": np.maximum(rng.standard_normal((2, count, HIDDEN)), 0).astype(F32),
    }


def batch_first(arrays: Arrays) -> Arrays:
    return arrays | {"state": np.ascontiguousarray(arrays["state"].transpose(1, 0, 2))}


def saved(path: Path, proto: onnx.ModelProto) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(tmp_path / "step.onnx", recurrent_net())


def run(data: bytes, feeds: Arrays) -> list[NDArray[np.float32]]:
    return list(open_session(data).raw.run(None, feeds))


@pytest.mark.parametrize("bits", [8, 4])
def test_every_layer_is_solved_as_if_the_batch_came_first(file: Path, tmp_path: Path, bits: int) -> None:
    """A network that transposes the state itself meets the same rows, so its codes are the same numbers."""
    other = saved(tmp_path / "first.onnx", recurrent_net(batch_first=True))
    arrays = steps(300)
    made, expected = (
        efrapq.defend(path, bits=bits, calib=calib, calib_size=200, seed=3)
        for path, calib in ((file, arrays), (other, batch_first(arrays)))
    )
    assert [layer.name for layer in made.quantized.layers] == ["in", "state", "head"]
    assert made.quantized.digest == expected.quantized.digest
    for name, grid in made.quantized.activations.items():
        assert expected.quantized.activations[name] == grid
    assert made.evidence["calibration"] == {
        "kind": "arrays",
        "source": "calibration",
        "samples": 200,
        "inputs": {"x": [1, 6], "state": [2, 1, HIDDEN]},
    }


@pytest.mark.parametrize("names", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("state_first", [True, False], ids=["state first", "x first"])
def test_the_file_keeps_its_batch_and_runs_on_integers(tmp_path: Path, names: bool, state_first: bool) -> None:
    source = saved(tmp_path / "step.onnx", recurrent_net(names=names, state_first=state_first))
    made = efrapq.defend(source, bits=8, calib=steps(200))
    before, after = (onnx.load_from_string(d) for d in (source.read_bytes(), made.data))
    assert list(after.graph.input) == list(before.graph.input)
    session = open_session(made.data)
    assert report_kernels(session.optimized).integer == 3
    for count in (1, 2, 7):
        feeds = steps(count, seed=1)
        for found, expected in zip(run(made.data, feeds), run(source.read_bytes(), feeds), strict=True):
            assert found.shape == expected.shape
            assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize("state_first", [True, False], ids=["state first", "x first"])
def test_costs_are_of_one_sample(tmp_path: Path, state_first: bool) -> None:
    """The first size of a state is no number of samples."""
    source = saved(tmp_path / "step.onnx", recurrent_net(state_first=state_first))
    output = tmp_path / "out.onnx"
    efrapq.defend(source, output, bits=8, calib=steps(64))
    proto, optimized = onnx.load(output), open_session(output.read_bytes()).optimized
    shapes = graph_shapes(proto, optimized, {"x": [1, 6], "state": [2, 1, HIDDEN]})
    assert shapes.batch == 1
    assert report_kernels(optimized, shapes).macs == 6 * HIDDEN + 2 * HIDDEN**2 + HIDDEN * 4
    assert verify(output, data=steps(20), float_model=source).document["kernels"]["macs"] == 208


def test_activations_that_go_through_files_give_the_same_bytes(file: Path) -> None:
    made = efrapq.defend(file, bits=4, calib=steps(150))
    assert efrapq.defend(file, bits=4, calib=steps(150), memory=1000).data == made.data


def test_the_relaxed_solver_takes_chunks_of_different_sizes(file: Path, tmp_path: Path) -> None:
    """150 samples make a chunk of 128 and one of 22, on the second axis of the state."""
    assert CHUNK_VALUES // 16 > 128
    made = efrapq.defend(file, bits=4, calib=steps(150), solver="relaxed", steps=200)
    nearest = efrapq.defend(file, bits=4, calib=steps(150), solver="nearest")
    differ = {
        name: np.abs(made.quantized.weights[name].codes.astype(int) - weight.codes)
        for name, weight in nearest.quantized.weights.items()
    }
    assert all(d.max() <= 1 for d in differ.values())
    assert differ["state"].sum() > 0
    feeds = steps(5, seed=1)
    for found, expected in zip(run(made.data, feeds), run(file.read_bytes(), feeds), strict=True):
        assert np.abs(found - expected).max() < 0.35 * np.abs(expected).max()


def test_chunks_are_joined_as_samples_or_as_rows(make_model: Any) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Conv", ["m", "k"], ["c"])]
    constants = {"w": np.ones((4, 4), F32), "k": np.ones((2, 3, 1), F32)}
    layers: dict[str, Layer] = {
        layer.op_type: layer
        for layer in find_layers(prepare(make_model(nodes, {"x": ("N", 3, 4)}, {"c": None}, constants)).graph)[0]
    }
    a, b = torch.arange(24.0).view(2, 3, 4), torch.arange(24.0, 60.0).view(3, 3, 4)
    assert torch.equal(_joined(layers["MatMul"], [a, b]), torch.cat([a, b]))
    assert torch.equal(_joined(layers["Conv"], [a, b]), torch.cat([a, b]))
    c = b.transpose(0, 1)[:, :1]  # (3, 1, 4)
    assert torch.equal(_joined(layers["MatMul"], [a, c]), torch.cat([a.reshape(6, 4), c.reshape(3, 4)]))
    with pytest.raises(UnsupportedModelError, match="needs its samples on the first axis"):
        _joined(layers["Conv"], [a, c])


# verify.


def relative_error(source: Path, output: Path, runs: list[Arrays]) -> float:
    expected, found = (
        np.concatenate([run(path.read_bytes(), feeds)[0] for feeds in runs]).astype(np.float64)
        for path in (source, output)
    )
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_verify_compares_all_samples(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    efrapq.defend(file, output, bits=4, edge_bits=4, calib=steps(100))
    arrays = steps(150, seed=2)
    classes = run(file.read_bytes(), arrays)[0].argmax(1)
    document = verify(output, data=arrays | {"labels": classes}, float_model=file).document
    assert document["samples"]["clean"] == 150
    assert document["outputs"]["defended"]["relative_error"] == pytest.approx(
        relative_error(file, output, [arrays]), abs=2e-6
    )
    right = 100 * float((run(output.read_bytes(), arrays)[0].argmax(1) == classes).mean())
    assert document["cda"]["float"] == 100
    assert document["cda"]["defended"] == pytest.approx(right, abs=1e-3)
    assert document["latency_ms"]["defended"] > 0


@pytest.mark.parametrize("state_first", [True, False], ids=["state first", "x first"])
def test_a_file_with_its_batch_fixed_takes_the_same_data(tmp_path: Path, state_first: bool) -> None:
    source = saved(tmp_path / "step.onnx", recurrent_net(state_first=state_first))
    output, fixed = tmp_path / "out.onnx", tmp_path / "fixed.onnx"
    efrapq.defend(source, output, bits=4, edge_bits=4, calib=steps(100))
    efrapq.export(output, fixed, target="qnn")
    taken = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(fixed).graph.input}
    assert taken == {"x": [1, 6], "state": [2, 1, HIDDEN]}
    arrays = steps(9, seed=4)
    one_by_one = [{"x": arrays["x"][i : i + 1], "state": arrays["state"][:, i : i + 1]} for i in range(9)]
    document = verify(fixed, data=arrays, float_model=source).document
    assert document["samples"]["clean"] == 9
    assert document["outputs"]["defended"]["relative_error"] == pytest.approx(
        relative_error(source, fixed, one_by_one), abs=2e-6
    )


@pytest.mark.parametrize("target", ["ort-arm", "portable", "openvino"])
def test_other_targets(file: Path, tmp_path: Path, target: str, run_exactly: Any) -> None:
    output = tmp_path / "out.onnx"
    made = efrapq.defend(file, output, bits=4, calib=steps(60))
    written = efrapq.export(output, tmp_path / "other.onnx", target=target)
    assert written.codes_sha256 == made.quantized.digest
    feeds = steps(3, seed=1)
    for found, expected in zip(run_exactly(written.data, feeds), run_exactly(made.data, feeds), strict=True):
        assert np.abs(found - expected).max() < 0.05


# What is refused.


def test_it_says_where_the_samples_lie(file: Path) -> None:
    with pytest.raises(DataError) as refused:
        efrapq.defend(file)
    assert str(refused.value).endswith(
        "pass --calib data.npz with one array per input, first axis the samples (of 'state' axis 1): "
        "'x' float32 (N, 6), 'state' float32 (2, N, 8)"
    )
    with pytest.raises(DataError, match="different numbers of samples: 'x' 30, 'state' 1"):
        efrapq.defend(file, calib=steps(30) | {"state": np.zeros((2, 1, HIDDEN), F32)})
    with pytest.raises(DataError, match=r"axis 0 has 30, not 2; the model takes \(2, N, 8\), axis 1 the samples"):
        efrapq.defend(file, calib=batch_first(steps(30)))
