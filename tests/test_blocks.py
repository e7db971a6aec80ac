"""Weight-only files with one scale per block of inputs: MatMulNBits in ONNX Runtime, and codes that come back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import efrapq
from efrapq.errors import UnsupportedModelError, UsageError
from efrapq.exporters import read_quantized
from efrapq.graph.prepare import prepare
from efrapq.graph.quantized import QuantizedWeight, codes_digest
from efrapq.pipeline import Defended
from efrapq.progress import Silent
from efrapq.stream import Journal
from efrapq.verification.codes import compare_codes, nearest_twin
from efrapq.verification.kernels import report_kernels
from efrapq.verification.session import open_session

F32 = np.float32
BLOCK = 32


def matrices(activation: str = "Tanh") -> onnx.ModelProto:
    """rows (N, 3, 64) → MatMul, MatMul and Add → mean over 3 → Gemm transB, square and not → Gemm of 40 inputs."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(F32)

    constants = {
        "first.weight": weight(64, 96),
        "second.weight": weight(96, 64),
        "second.bias": weight(64),
        "square.weight": weight(64, 64),  # (outputs, inputs): only its axis says which is which
        "square.bias": weight(64),
        "narrow.weight": weight(40, 64),
        "head.weight": weight(5, 40),
        "head.bias": weight(5),
    }
    make = helper.make_node
    nodes = [
        make("MatMul", ["rows", "first.weight"], ["a"]),
        make(activation, ["a"], ["b"]),
        make("MatMul", ["b", "second.weight"], ["c"]),
        make("Add", ["c", "second.bias"], ["d"]),
        make("ReduceMean", ["d"], ["e"], axes=[1], keepdims=0),
        make("Gemm", ["e", "square.weight", "square.bias"], ["f"], transB=1),
        make(activation, ["f"], ["g"]),
        make("Gemm", ["g", "narrow.weight"], ["h"], transB=1),
        make("Gemm", ["h", "head.weight", "head.bias"], ["y"], transB=1),
    ]
    for node in nodes:
        node.name = f"node_{node.output[0]}"
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "matrices",
        [info("rows", TensorProto.FLOAT, ["N", 3, 64])],
        [info("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def rows(count: int = 200, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    return {"rows": np.random.default_rng(seed).standard_normal((count, 3, 64)).astype(F32)}


def by_hand(made: Defended, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """The network in float64 NumPy with the weights that the codes stand for."""
    held = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in matrices().graph.initializer}
    real = {}
    for name, weight in made.quantized.weights.items():
        scale = np.repeat(weight.scale, BLOCK, 0) if weight.block else weight.scale[:, None]
        real[name] = weight.codes.astype(np.float64) * scale
    hidden = np.tanh(x @ real["first"]) @ real["second"] + held["second.bias"]
    squared = np.tanh(hidden.mean(1) @ real["square"] + held["square.bias"])
    result: NDArray[np.float64] = squared @ real["narrow"] @ real["head"].T + held["head.bias"]
    return result


class Recorder(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blocks") / "matrices.onnx"
    path.write_bytes(matrices().SerializeToString())
    return path


def defend(file: Path, output: Path | None = None, **options: Any) -> Defended:
    given: dict[str, Any] = {"act_bits": 32, "block": BLOCK, "calib": rows(), "target": "ort-x86"} | options
    return efrapq.defend(file, output, **given)


@pytest.fixture(scope="module")
def made(file: Path) -> Defended:
    return defend(file, reporter=Recorder())


def test_scales_run_along_the_inputs(made: Defended) -> None:
    found = {n: (w.codes.shape, w.scale.shape, w.axis, w.block) for n, w in made.quantized.weights.items()}
    assert found == {
        "first": ((64, 96), (2, 96), 1, BLOCK),
        "second": ((96, 64), (3, 64), 1, BLOCK),
        "square": ((64, 64), (2, 64), 1, BLOCK),
        "narrow": ((64, 40), (2, 40), 1, BLOCK),
        "head": ((5, 40), (5,), 0, 0),
    }
    float_weights = {t.name: numpy_helper.to_array(t) for t in matrices().graph.initializer}
    for name, weight in made.quantized.weights.items():
        if not weight.block:
            continue
        real = float_weights[f"{name}.weight"]
        real = real if name in ("first", "second") else real.T
        qmax = 7 if weight.bits == 4 else 127
        absmax = np.abs(real.reshape(-1, BLOCK, real.shape[1])).max(1)
        np.testing.assert_array_equal(weight.scale, (absmax / F32(qmax)).astype(F32))
        assert np.abs(weight.dequantized() - real).max() <= weight.scale.max()


def test_layers_that_do_not_fit_keep_their_channels_and_it_is_said(file: Path) -> None:
    recorder = Recorder()
    made = defend(file, reporter=recorder)
    (note,) = [n for n in recorder.notes if "keeps one scale per output channel" in n]
    assert note.startswith("head keeps one scale per output channel: it has 40 inputs, blocks of 32")
    assert [layer.get("block", 0) for layer in made.evidence["layers"]] == [BLOCK] * 4 + [0]
    assert made.evidence["settings"]["block"] == BLOCK


def test_convolutions_keep_their_channels(
    residual_net: Callable[..., onnx.ModelProto], images: Callable[..., NDArray[np.float32]], tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(residual_net().SerializeToString())
    options: dict[str, Any] = {"act_bits": 32, "calib": {"input": images(32)}, "target": "ort-x86"}
    recorder = Recorder()
    made = efrapq.defend(path, block=BLOCK, reporter=recorder, **options)
    assert made.quantized.digest == efrapq.defend(path, **options).quantized.digest
    notes = [n for n in recorder.notes if "keeps one scale" in n]
    assert [("is a Conv" in n, "has 8 inputs" in n) for n in notes] == [(True, False)] * 3 + [(False, True)]


@pytest.mark.parametrize("target", ["ort-x86", "ort-arm", "portable"])
@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_runtime_runs_it_as_matmulnbits(file: Path, bits: int, target: str) -> None:
    made = defend(file, bits=bits, edge_bits=bits, target=target)
    session = open_session(made.data)
    report = report_kernels(session.optimized)
    kinds = [u.op for u in report.unfused]
    assert sorted(kinds) == ["Gemm", *["MatMulNBits"] * 4]  # Gemm: the head, with its scales by channel
    nbits = [node for node in session.optimized.graph.node if node.op_type == "MatMulNBits"]
    assert {a.i for node in nbits for a in node.attribute if a.name == "bits"} == {bits}
    assert {a.i for node in nbits for a in node.attribute if a.name == "block_size"} == {BLOCK}
    feeds = rows(50, seed=1)
    simulated = by_hand(made, feeds["rows"])
    actual = session.raw.run(None, feeds)[0]
    # MatMulNBits quantizes the activations of each block to 8 bits on its own.
    assert np.abs(actual - simulated).max() < 0.02 * np.abs(simulated).max()


def test_a_relu_behind_a_matrix_keeps_onnx_runtime_from_fusing_it(tmp_path: Path) -> None:
    """What ONNX Runtime does, not what is wanted: where this fails, a release has mended it."""
    path = tmp_path / "relu.onnx"
    path.write_bytes(matrices("Relu").SerializeToString())
    session = open_session(defend(path, solver="nearest").data)
    kinds = [u.op for u in report_kernels(session.optimized).unfused]
    assert sorted(kinds) == ["FusedGemm", "Gemm", "MatMul", "MatMulNBits", "MatMulNBits"]
    expected = open_session(path.read_bytes()).raw.run(None, rows(50))[0]
    assert np.abs(session.raw.run(None, rows(50))[0] - expected).max() < 0.3 * np.abs(expected).max()


def test_the_file_holds_one_scale_a_block(made: Defended) -> None:
    proto = onnx.load_from_string(made.data)
    onnx.checker.check_model(proto, full_check=True)
    assert [o.version for o in proto.opset_import if o.domain == ""] == [21]
    constants = {t.name: t for t in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            attributes = {a.name: a.i for a in node.attribute}
            codes, scale, zero_point = (constants[name] for name in node.input)
            found[node.output[0]] = (codes.data_type, list(scale.dims), list(zero_point.dims), attributes)
    four, eight = TensorProto.INT4, TensorProto.INT8
    assert found["second.weight"] == (four, [3, 64], [3, 64], {"axis": 0, "block_size": BLOCK})
    assert found["square.weight"] == (four, [2, 64], [2, 64], {"axis": 0, "block_size": BLOCK})
    assert found["first.weight"] == (eight, [2, 96], [2, 96], {"axis": 0, "block_size": BLOCK})
    assert found["head.weight"] == (eight, [5], [5], {"axis": 0})


def test_codes_come_back_and_are_neighbours_of_the_float_weights(made: Defended, tmp_path: Path) -> None:
    back = read_quantized(onnx.load_from_string(made.data))
    assert back.digest == made.quantized.digest
    assert {n: w.block for n, w in back.weights.items()} == {n: w.block for n, w in made.quantized.weights.items()}
    reference = prepare(matrices())
    compared = compare_codes(back, reference)
    assert compared is not None
    assert compared.neighbours
    assert len(compared.each) == 5
    assert compared.flipped == pytest.approx(made.evidence["flipped"], abs=0.01)
    twin = nearest_twin(back, reference)
    assert twin is not None
    nearest = compare_codes(twin, reference)
    assert nearest is not None
    assert nearest.flipped == 0
    assert defend_nearest_digest(made) == twin.digest
    for target in ("portable", "ort-arm"):
        path = tmp_path / "source.onnx"
        path.write_bytes(made.data)
        written = efrapq.export(path, tmp_path / f"{target}.onnx", target=target)
        assert written.codes_sha256 == made.quantized.digest


def defend_nearest_digest(made: Defended) -> str:
    """The digest of rounding to nearest, by hand."""
    float_weights = {t.name: numpy_helper.to_array(t) for t in matrices().graph.initializer}
    codes = {}
    for name, weight in made.quantized.weights.items():
        real = float_weights[f"{name}.weight"]
        real = real.T if name in ("square", "narrow") else real
        scale = np.repeat(weight.scale, BLOCK, 0) if weight.block else weight.scale[:, None]
        qmax = 2 ** (weight.bits - 1) - 1
        codes[name] = weight.replace_codes(np.clip(np.rint(real / scale), -qmax, qmax).astype(np.int8))
    return codes_digest(codes)


def test_a_flipped_code_and_a_strange_one_are_noticed(made: Defended) -> None:
    reference = prepare(matrices())
    for name in ("second", "square"):
        weight = made.quantized.weights[name]
        strange = weight.codes.copy()
        strange[40, 3] = -7 if strange[40, 3] > 0 else 7
        changed = made.quantized.weights | {name: weight.replace_codes(strange)}
        assert codes_digest(changed) != made.quantized.digest
        quantized = type(made.quantized)(
            made.quantized.model, made.quantized.layers, changed, made.quantized.activations, {}
        )
        compared = compare_codes(quantized, reference)
        assert compared is not None
        assert compared.strangers == (name,)


def test_the_digest_tells_blocks_from_channels() -> None:
    codes, scale = np.zeros((32, 2), np.int8), np.ones((1, 2), F32)
    digests = {
        codes_digest({"w": QuantizedWeight(codes, scale, 1, 4, 32)}),
        codes_digest({"w": QuantizedWeight(codes, scale[0], 1, 4)}),
        codes_digest({"w": QuantizedWeight(codes, np.ones((2, 2), F32), 1, 4, 16)}),
    }
    assert len(digests) == 3


def test_the_same_bytes_again_and_after_a_stop(file: Path, made: Defended, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    put = Journal.put

    def stopped(journal: Journal, name: str, *rest: Any) -> None:
        put(journal, name, *rest)
        if name == "square":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Journal, "put", stopped)
        with pytest.raises(KeyboardInterrupt):
            defend(file, output)
    with pytest.raises(UsageError, match="was begun with another model, other data, settings"):
        defend(file, output, block=16, resume=True)
    assert defend(file, output, resume=True).data == made.data


@pytest.mark.parametrize("solver", ["relaxed", "nearest"])
def test_other_solvers_and_searched_scales(file: Path, solver: str) -> None:
    made = defend(file, solver=solver, steps=5, scale="mse", block=64, calib=rows(32))
    assert [w.block for w in made.quantized.weights.values()] == [64, 0, 64, 64, 0]
    compared = compare_codes(read_quantized(onnx.load_from_string(made.data)), prepare(matrices()))
    assert compared is not None
    assert compared.neighbours
    if solver == "nearest":
        assert compared.flipped == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"act_bits": 8}, "--block is for float activations: add --act-bits 32"),
        ({"block": 24}, "--block must be one of 16, 32, 64, 128, 256"),
        ({"block": -32}, "--block must be one of"),
        ({"scale": "refit"}, "--scale refit has one scale per output channel"),
    ],
)
def test_options_that_do_not_go_together(file: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        defend(file, **options)


@pytest.mark.parametrize("target", ["qnn", "tensorrt"])
def test_targets_without_blocks_say_so(file: Path, target: str) -> None:
    with pytest.raises(UnsupportedModelError, match="its weight has scales by block"):
        defend(file, target=target, solver="nearest")


def test_foreign_blocks_that_do_not_fit_are_refused(made: Defended) -> None:
    def change(edit: Callable[[onnx.NodeProto, dict[str, onnx.TensorProto]], None]) -> onnx.ModelProto:
        proto = onnx.load_from_string(made.data)
        (node,) = [n for n in proto.graph.node if n.output[0] == "second.weight"]
        edit(node, {t.name: t for t in proto.graph.initializer})
        return proto

    def attribute(name: str, value: int) -> Callable[..., None]:
        def edit(node: onnx.NodeProto, _: Any) -> None:
            (found,) = [a for a in node.attribute if a.name == name]
            found.i = value

        return edit

    def fewer_scales(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
        constants[node.input[1]].CopyFrom(numpy_helper.from_array(np.ones((2, 64), F32), node.input[1]))

    for edit, words in (
        (attribute("block_size", 36), "blocks of 36 do not divide a weight of shape (96, 64)"),
        (attribute("block_size", -32), "blocks of -32 do not divide"),
        (attribute("block_size", 48), "scales of shape (3, 64) do not fit blocks of 48"),
        (attribute("axis", 5), "blocks of 32 do not divide"),
        (attribute("axis", 1), "scales of shape (3, 64) do not fit blocks of 32"),
        (fewer_scales, "scales of shape (2, 64) do not fit blocks of 32"),
    ):
        with pytest.raises(UnsupportedModelError, match=re.escape(words)):
            read_quantized(change(edit))


def test_the_settings_are_recorded_only_where_they_are_used(file: Path, made: Defended) -> None:
    metadata = {p.key: p.value for p in onnx.load_from_string(made.data).metadata_props}
    assert json.loads(metadata["efrapq.settings"])["block"] == BLOCK
    plain = defend(file, block=0)
    assert "block" not in plain.evidence["settings"]
    assert all("block" not in layer for layer in plain.evidence["layers"])
    assert "block" not in json.loads(
        {p.key: p.value for p in onnx.load_from_string(plain.data).metadata_props}["efrapq.settings"]
    )
