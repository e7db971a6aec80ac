"""Models that take anything but one batch of images: several inputs, integers, any rank, inputs without samples."""

from __future__ import annotations

import json
import os
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
from efrapq.cli.main import main
from efrapq.data import Dataset
from efrapq.errors import AlreadyQuantizedError, DataError, UsageError
from efrapq.verification.kernels import report_kernels
from efrapq.verification.session import open_session

F32 = np.float32
Arrays = dict[str, NDArray[Any]]


def mixed_net() -> onnx.ModelProto:
    """features (N, 5, 12) float, kind (N,) int32, keep (N, 5) bool, state (2, 1, 8) float and rate () int64 → (N, 4).

    The mean of the state's product is added to what each sample gives, with a sign that the rate chooses.
    """
    rng = np.random.default_rng(0)
    constants: dict[str, NDArray[Any]] = {
        "in.weight": rng.standard_normal((12, 8)).astype(F32) / 3,
        "kinds": rng.standard_normal((4, 8)).astype(F32),
        "state.weight": rng.standard_normal((8, 8)).astype(F32) / 3,
        "head.weight": rng.standard_normal((8, 4)).astype(F32) / 3,
        "head.bias": rng.standard_normal(4).astype(F32),
        "axes1": np.array([1]),
        "axes2": np.array([2]),
        "none": np.array(0, F32),
        "most": np.array(1000),
        "one": np.array(1, F32),
        "minus": np.array(-1, F32),
    }
    make = helper.make_node
    nodes = [
        make("MatMul", ["features", "in.weight"], ["h"]),
        make("Unsqueeze", ["keep", "axes2"], ["keep3"]),
        make("Where", ["keep3", "h", "none"], ["kept"]),
        make("ReduceMean", ["kept"], ["mean"], axes=[1], keepdims=0),
        make("Gather", ["kinds", "kind"], ["offset"]),
        make("Add", ["mean", "offset"], ["sum"]),
        make("MatMul", ["state", "state.weight"], ["moved"]),
        make("ReduceMean", ["moved"], ["rows"], keepdims=0),
        make("Greater", ["rate", "most"], ["fast"]),
        make("Where", ["fast", "one", "minus"], ["sign"]),
        make("Mul", ["rows", "sign"], ["shift"]),
        make("Add", ["sum", "shift"], ["shifted"]),
        make("Relu", ["shifted"], ["r"]),
        make("Gemm", ["r", "head.weight", "head.bias"], ["y"]),
    ]
    for node in nodes:
        node.name = f"node_{node.output[0]}"
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "mixed",
        [
            info("features", TensorProto.FLOAT, ["N", 5, 12]),
            info("kind", TensorProto.INT32, ["N"]),
            info("keep", TensorProto.BOOL, ["N", 5]),
            info("state", TensorProto.FLOAT, [2, 1, 8]),
            info("rate", TensorProto.INT64, []),
        ],
        [info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples(count: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        "features": rng.standard_normal((count, 5, 12)).astype(F32),
        "kind": rng.integers(0, 4, count).astype(np.int32),
        "keep": rng.random((count, 5)) < 0.8,
        "state": np.random.default_rng(99).standard_normal((2, 1, 8)).astype(F32),
        "rate": np.array(16_000),
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mixed.onnx"
    path.write_bytes(mixed_net().SerializeToString())
    return path


def run(data: bytes, feeds: Arrays) -> NDArray[np.float32]:
    found: NDArray[np.float32] = open_session(data).raw.run(None, feeds)[0]
    return found


def test_a_model_of_five_inputs(file: Path) -> None:
    made = efrapq.defend(file, file.with_name("out.onnx"), bits=8, calib=samples(300))
    assert [layer.name for layer in made.quantized.layers] == ["in", "state", "head"]
    assert made.evidence["calibration"] == {
        "kind": "arrays",
        "source": "calibration",
        "samples": 300,
        "inputs": {"features": [1, 5, 12], "kind": [1], "keep": [1, 5], "state": [2, 1, 8], "rate": []},
    }
    grids = made.quantized.activations
    assert {"features", "state"} <= grids.keys()
    assert grids.keys().isdisjoint({"kind", "keep", "rate"})
    state = samples(1)["state"]
    assert grids["state"].scale == pytest.approx((state.max() - state.min()) / 255, rel=1e-6)
    session = open_session(made.data)
    assert {i.name: i.type for i in session.raw.get_inputs()} == {
        "features": "tensor(float)",
        "kind": "tensor(int32)",
        "keep": "tensor(bool)",
        "state": "tensor(float)",
        "rate": "tensor(int64)",
    }
    assert report_kernels(session.optimized).integer == 3
    for count in (300, 1):
        feeds = {k: v[:count] if v.ndim and len(v) == 300 else v for k, v in samples(300).items()}
        expected = run(file.read_bytes(), feeds)
        assert np.abs(run(made.data, feeds) - expected).max() < 0.03 * np.abs(expected).max()
    assert made.path is not None
    assert made.path.read_bytes() == made.data


def test_the_data_may_lie_in_memory_in_a_file_or_in_a_folder(file: Path, tmp_path: Path) -> None:
    arrays = samples(60)
    np.savez(tmp_path / "all.npz", **arrays)
    folder = tmp_path / "parts"
    folder.mkdir()
    for index in range(3):
        part = {k: v[20 * index : 20 * index + 20] if v.ndim and len(v) == 60 else v for k, v in arrays.items()}
        np.savez(folder / f"{index}.npz", **part)
    made = [
        efrapq.defend(file, bits=4, calib=calib, calib_size=40, seed=5)
        for calib in (arrays, tmp_path / "all.npz", folder)
    ]
    assert len({m.quantized.digest for m in made}) == 1
    assert [m.evidence["calibration"]["source"] for m in made] == ["calibration", "all.npz", "parts"]
    assert [m.evidence["calibration"]["samples"] for m in made] == [40] * 3
    chosen = np.sort(np.random.default_rng(5).permutation(60)[:40])
    by_hand = arrays | {k: arrays[k][chosen] for k in ("features", "kind", "keep")}
    assert efrapq.defend(file, bits=4, calib=by_hand, seed=5).quantized.digest == made[0].quantized.digest
    other = efrapq.defend(file, bits=4, calib=arrays, calib_size=40, seed=6)
    assert other.quantized.digest != made[0].quantized.digest


def test_activations_that_go_through_files_give_the_same_bytes(file: Path) -> None:
    made = efrapq.defend(file, bits=4, calib=samples(60))
    assert efrapq.defend(file, bits=4, calib=samples(60), memory=1000).data == made.data


@pytest.mark.parametrize("solver", ["relaxed", "nearest"])
def test_other_solvers(file: Path, solver: str) -> None:
    made = efrapq.defend(file, bits=4, calib=samples(60), solver=solver, steps=20)
    assert np.isfinite(run(made.data, samples(3))).all()


def test_a_run_that_was_stopped_goes_on_with_the_same_arrays_only(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from efrapq.stream import Journal

    output = tmp_path / "out.onnx"
    whole = efrapq.defend(file, bits=4, calib=samples(60)).data
    put = Journal.put

    def stopped(journal: Journal, name: str, *rest: Any) -> None:
        put(journal, name, *rest)
        if name == "state":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "put", stopped)
        with pytest.raises(KeyboardInterrupt):
            efrapq.defend(file, output, bits=4, calib=samples(60))
    changed = samples(60) | {"rate": np.array(16_001)}
    with pytest.raises(UsageError, match="was begun with another model, other data"):
        efrapq.defend(file, output, bits=4, calib=changed, resume=True)
    assert efrapq.defend(file, output, bits=4, calib=samples(60), resume=True).data == whole


@pytest.mark.parametrize("target", ["portable", "ort-arm", "qnn"])
def test_the_file_is_written_for_other_targets(file: Path, tmp_path: Path, target: str, run_exactly: Any) -> None:
    source = tmp_path / "out.onnx"
    made = efrapq.defend(file, source, bits=4, calib=samples(60))
    written = efrapq.export(source, tmp_path / "other.onnx", target=target)
    assert written.codes_sha256 == made.quantized.digest
    if target == "qnn":
        sizes = [[d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(written.path).graph.input]
        assert sizes == [[1, 5, 12], [1], [1, 5], [2, 1, 8], []]
    feeds = samples(1)
    found, expected = (run_exactly(data, feeds)[0] for data in (written.data, made.data))
    assert np.abs(found - expected).max() < 0.05


def test_images_by_the_inputs_name_are_the_same_inputs(
    residual_net: Callable[..., onnx.ModelProto], images: Callable[..., NDArray[np.float32]], tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(residual_net().SerializeToString())
    x = images(64)
    by_name = efrapq.defend(path, bits=4, calib={"input": x})
    as_images = efrapq.defend(path, bits=4, calib=Dataset.from_arrays(x, None))
    assert by_name.quantized.activations == as_images.quantized.activations
    assert by_name.quantized.weights.keys() == as_images.quantized.weights.keys()
    stress = [made.evidence["calibration"].pop("stress") for made in (as_images, by_name)]
    assert stress[0] == stress[1]
    assert as_images.evidence["calibration"] == {"kind": "data", "source": "array", "images": 64, "input": [3, 8, 8]}


def test_a_fixed_batch_and_one_flat_input(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["row", "w.weight"], ["y"], name="g")],
        "flat",
        [info("row", TensorProto.FLOAT, [4, 6])],
        [info("y", TensorProto.FLOAT, [4, 3])],
        [numpy_helper.from_array(rng.standard_normal((6, 3)).astype(F32), "w.weight")],
    )
    path = tmp_path / "flat.onnx"
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(proto.SerializeToString())
    rows = rng.standard_normal((18, 6)).astype(F32)
    made = efrapq.defend(path, bits=8, calib={"row": rows})
    assert made.evidence["calibration"]["samples"] == 16
    np.testing.assert_allclose(run(made.data, {"row": rows[:4]}), run(path.read_bytes(), {"row": rows[:4]}), atol=0.1)


# What is refused, in one line.


def test_without_data_it_says_what_to_pass(file: Path) -> None:
    words = (
        "mixed.onnx: calibration inputs cannot be made for it; pass --calib data.npz with one array per input, first "
        "axis the samples: 'features' float32 (N, 5, 12), 'kind' int32 (N,), 'keep' bool (N, 5), 'state' float32 "
        "(2, 1, 8), 'rate' int64 ()"
    )
    with pytest.raises(DataError, match=re.escape(words)):
        efrapq.defend(file)
    with pytest.raises(DataError, match="images do not fit this model; pass --calib data"):
        efrapq.defend(file, calib=Dataset.from_arrays(np.zeros((4, 8, 8, 3), np.uint8), None))


def test_a_defended_file_is_refused_before_data_are_asked_for(file: Path, tmp_path: Path) -> None:
    efrapq.defend(file, tmp_path / "out.onnx", bits=4, calib=samples(20))
    with pytest.raises(AlreadyQuantizedError):
        efrapq.defend(tmp_path / "out.onnx")


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


def test_the_command_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = tmp_path / "data.npz", tmp_path / "out.onnx"
    np.savez(data, **samples(60), labels=np.arange(60))
    assert command("defend", file, "--calib", data, "-o", output, "--bits", 4, "--target", "ort-x86") == 0
    assert f"efrapq verify {output} --data TEST.npz\n" in capsys.readouterr().out
    assert json.loads(output.with_suffix(".json").read_text())["calibration"]["samples"] == 60

    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    bad: Arrays = samples(60) | {"kind": np.zeros(59, np.int32)}
    np.savez(tmp_path / "bad.npz", **bad)
    for arguments, words in (
        (("--calib", tmp_path / "bad.npz"), "the arrays hold different numbers of samples"),
        (("--calib", f"{data}:train"), "no such file or folder"),
        (("--calib", data, "--mean", "0.5", "--std", "0.5"), "--mean, --std and --size are for images"),
        ((), "pass --calib data.npz with one array per input"),
    ):
        assert command("defend", file, *arguments, "-o", tmp_path / "none.onnx", "-q") == 2
        shown = capsys.readouterr()
        assert words in " ".join(shown.err.split())
        assert "Traceback" not in shown.err
    assert command("defend", file, "--calib", data, "-o", data, "-q") == 2
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.name != "bad.npz"} == before


def test_verify_ends_in_one_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, data = tmp_path / "out.onnx", tmp_path / "data.npz"
    efrapq.defend(file, output, bits=4, calib=samples(60))
    np.savez(data, **samples(60), labels=np.arange(60) % 4)
    code = command("verify", output, "--float", file, "--data", data, "-q")
    shown = capsys.readouterr()
    assert code in (0, 1, 2)
    assert "Traceback" not in shown.err
    if code == 2:
        assert len([line for line in shown.err.split(os.linesep) if line.startswith("error:")]) == 1
