"""verify for models that are no image classifiers: outputs, agreement and CDA on arrays by input name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

import efrapq
from efrapq.cli.main import main
from efrapq.cli.verify import print_verification
from efrapq.data import Dataset
from efrapq.errors import DataError, InputError, UsageError
from efrapq.preprocess import Preprocess
from efrapq.verification import Requirements, verify
from efrapq.verification import arrays as arrays_module
from efrapq.verification import session as sessions_module
from efrapq.verification.distance import Distance
from efrapq.verification.session import Session, feeds_latency, open_session

F32 = np.float32
Arrays = dict[str, NDArray[Any]]
UNKNOWN = {"cosine": None, "relative_error": None}


def assembled(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, tuple[int, list[Any]]],
    constants: Arrays,
) -> onnx.ModelProto:
    for node in nodes:
        node.name = f"node_{node.output[0]}"
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def token_classifier() -> onnx.ModelProto:
    """ids (N, L) int64, weight (N, L) float and state (1, 16) float, the same for all samples → scores (N, 5)."""
    rng = np.random.default_rng(0)
    constants: Arrays = {
        "words": rng.standard_normal((30, 12)).astype(F32),
        "up.weight": rng.standard_normal((12, 16)).astype(F32) / 3,
        "head.weight": rng.standard_normal((16, 5)).astype(F32) / 4,
        "head.bias": rng.standard_normal(5).astype(F32) / 8,
        "last": np.array([2]),
    }
    make = helper.make_node
    nodes = [
        make("Gather", ["words", "ids"], ["embedded"]),
        make("Unsqueeze", ["weight", "last"], ["weight3"]),
        make("Mul", ["embedded", "weight3"], ["weighted"]),
        make("MatMul", ["weighted", "up.weight"], ["up"]),
        make("Relu", ["up"], ["hidden"]),
        make("ReduceMean", ["hidden"], ["mean"], axes=[1], keepdims=0),
        make("Add", ["mean", "state"], ["moved"]),
        make("Gemm", ["moved", "head.weight", "head.bias"], ["scores"]),
    ]
    return assembled(
        nodes,
        {
            "ids": (TensorProto.INT64, ["N", "L"]),
            "weight": (TensorProto.FLOAT, ["N", "L"]),
            "state": (TensorProto.FLOAT, [1, 16]),
        },
        {"scores": (TensorProto.FLOAT, ["N", 5])},
        constants,
    )


def sentences(count: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        "ids": rng.integers(0, 30, (count, 7)),
        "weight": rng.random((count, 7)).astype(F32),
        "state": np.random.default_rng(9).standard_normal((1, 16)).astype(F32),
    }


def frames(*, integers_first: bool = False) -> onnx.ModelProto:
    """x (4, 6, 8) float → y (4, 6, 3), with the positions of its largest values in front if asked for."""
    rng = np.random.default_rng(1)
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b.weight"], ["y"]),
    ]
    outputs: dict[str, tuple[int, list[Any]]] = {"y": (TensorProto.FLOAT, [4, 6, 3])}
    if integers_first:
        nodes.append(helper.make_node("ArgMax", ["y"], ["top"], axis=-1, keepdims=0))
        outputs = {"top": (TensorProto.INT64, [4, 6])} | outputs
    constants: Arrays = {
        "a.weight": rng.standard_normal((8, 16)).astype(F32),
        "b.weight": rng.standard_normal((16, 3)).astype(F32),
    }
    return assembled(nodes, {"x": (TensorProto.FLOAT, [4, 6, 8])}, outputs, constants)


def movements(count: int, seed: int = 0) -> Arrays:
    return {"x": np.random.default_rng(seed).standard_normal((count, 6, 8)).astype(F32)}


def defended(folder: Path, proto: onnx.ModelProto, calib: Arrays, **options: Any) -> tuple[Path, Path]:
    source, output = folder / "net.onnx", folder / "net.int4.onnx"
    source.write_bytes(proto.SerializeToString())
    efrapq.defend(source, output, bits=4, edge_bits=4, calib=calib, target="ort-x86", **options)
    return source, output


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The token classifier and its defended file."""
    return defended(tmp_path_factory.mktemp("tokens"), token_classifier(), sentences(64))


def stripped(path: Path, to: Path) -> Path:
    """The file without its records."""
    proto = onnx.load(path)
    del proto.metadata_props[:]
    to.write_bytes(proto.SerializeToString())
    return to


def ran(path: Path, feeds: Arrays, output: str) -> NDArray[np.float64]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([output], feeds)[0], np.float64)


def distance(expected: NDArray[np.float64], found: NDArray[np.float64]) -> dict[str, float]:
    a, b = expected.ravel(), found.ravel()
    return {
        "cosine": pytest.approx(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), abs=2e-6),
        "relative_error": pytest.approx(float(np.linalg.norm(b - a) / np.linalg.norm(a)), abs=2e-6),
    }


def shown(document: dict[str, Any]) -> str:
    printed = StringIO()
    print_verification(document, Console(width=200, file=printed))
    return printed.getvalue()


# What is measured.


def test_a_classifier_of_tokens(files: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = files
    arrays = sentences(150, seed=1)
    expected, found = ran(source, arrays, "scores"), ran(output, arrays, "scores")
    labels = expected.argmax(1)
    labels[::10] = (labels[::10] + 1) % 5
    data = tmp_path / "test.npz"
    np.savez(data, **arrays, labels=labels)

    document = verify(output, data=data, float_model=source, requirements=Requirements(max_drop=60)).document
    assert document["schema"] == "efrapq.verify/1"
    assert document["agreement"] == pytest.approx(100 * float((expected.argmax(1) == found.argmax(1)).mean()), abs=1e-3)
    assert document["cda"]["float"] == 90
    assert document["cda"]["defended"] == pytest.approx(100 * float((found.argmax(1) == labels).mean()), abs=1e-3)
    assert document["asr"] == dict.fromkeys(("float", "nearest", "defended", "float_activations"))
    assert document["trigger"] is None
    assert document["samples"] == {"clean": 150, "triggered": 0}
    assert document["outputs"]["defended"] == distance(expected, found)
    assert 0 < document["outputs"]["defended"]["relative_error"] < 0.5
    assert document["codes"]["match"] is True
    assert document["codes"]["recorded"] is True
    assert document["codes"]["compared_with_float"] is True
    assert document["codes"]["flipped"] > 0
    assert document["kernels"]["integer"] + document["kernels"]["float"] == 2
    # One sample is 7 tokens of 12×16 and one row of 16×5.
    assert document["kernels"]["macs"] == 7 * 12 * 16 + 16 * 5
    assert min(document["latency_ms"].values()) > 0
    assert document["verdict"] == "pass"

    nearest = tmp_path / "nearest.onnx"
    efrapq.defend(source, nearest, bits=4, edge_bits=4, calib=sentences(64), target="ort-x86", solver="nearest")
    by_hand = ran(nearest, arrays, "scores")
    assert document["outputs"]["nearest"] == distance(expected, by_hand)
    assert document["outputs"]["nearest"] != document["outputs"]["defended"]
    assert document["cda"]["nearest"] == pytest.approx(100 * float((by_hand.argmax(1) == labels).mean()), abs=1e-3)


def test_the_data_may_lie_in_memory_in_a_file_or_in_a_folder(files: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = files
    arrays = sentences(60, seed=2)
    np.savez(tmp_path / "all.npz", **arrays)
    folder = tmp_path / "parts"
    folder.mkdir()
    for index in range(3):
        part = {k: v[20 * index : 20 * index + 20] if len(v) == 60 else v for k, v in arrays.items()}
        np.savez(folder / f"{index}.npz", **part)
    given: list[Path | Arrays] = [arrays, tmp_path / "all.npz", folder]
    documents = [verify(output, data=data, float_model=source).document for data in given]
    for document in documents[1:]:
        assert document["samples"] == {"clean": 60, "triggered": 0}
        assert document["outputs"] == documents[0]["outputs"]
        assert document["agreement"] == documents[0]["agreement"] > 0
        assert document["cda"] == {"float": None, "nearest": None, "defended": None}


def test_without_data_the_file_itself_is_checked(files: tuple[Path, Path]) -> None:
    source, output = files
    result = verify(output, float_model=source)
    document = result.document
    assert document["codes"]["match"] is True
    assert document["kernels"]["macs"] == 7 * 12 * 16 + 16 * 5  # the sizes that the file records
    assert document["outputs"] == {"nearest": UNKNOWN, "defended": UNKNOWN}
    assert document["agreement"] is None
    assert document["latency_ms"] == {"float": None, "defended": None}
    assert document["slower"] is None
    assert document["samples"] == {"clean": 0, "triggered": 0}
    assert result.passed
    assert any("pass --data with 'ids' int64 (N, L)" in note for note in result.notes)
    text = shown(document)
    assert "outputs  " not in text
    assert "latency, one sample" in text


def test_without_the_float_model_nothing_is_compared(files: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "alone.onnx"
    output.write_bytes(files[1].read_bytes())
    arrays = sentences(30)
    labels = ran(output, arrays, "scores").argmax(1)
    document = verify(output, data=arrays | {"labels": labels}).document
    assert document["outputs"] == {"nearest": UNKNOWN, "defended": UNKNOWN}
    assert document["agreement"] is None
    assert document["cda"] == {"float": None, "nearest": None, "defended": 100}
    assert document["latency_ms"]["float"] is None
    assert document["latency_ms"]["defended"] > 0
    assert document["codes"]["match"] is True
    assert document["codes"]["compared_with_float"] is False


@pytest.mark.parametrize("integers_first", [False, True])
def test_a_fixed_batch_of_outputs_that_are_no_classes(tmp_path: Path, integers_first: bool) -> None:
    source, output = defended(tmp_path, frames(integers_first=integers_first), movements(40))
    arrays = movements(18, seed=3)
    filled = {"x": np.concatenate([arrays["x"], arrays["x"][-2:]])}
    whole = [
        np.concatenate([ran(path, {"x": filled["x"][at : at + 4]}, "y") for at in range(0, 20, 4)])[:18]
        for path in (source, output)
    ]
    result = verify(output, data=arrays | {"labels": np.zeros((18, 6), np.int64)}, float_model=source)
    assert result.document["outputs"]["defended"] == distance(*whole)
    assert result.document["agreement"] is None
    assert result.document["cda"] == {"float": None, "nearest": None, "defended": None}
    assert result.document["samples"]["clean"] == 18
    assert min(result.document["latency_ms"].values()) > 0
    assert any("accuracy is not measured: labels are int64 (18, 6)" in note for note in result.notes)
    fewer = verify(output, data=movements(3), float_model=source).document
    assert fewer["samples"]["clean"] == 3
    assert fewer["outputs"]["defended"]["relative_error"] > 0


def test_a_file_with_its_batch_fixed_takes_the_same_data(files: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = files
    fixed = tmp_path / "fixed.onnx"
    efrapq.export(output, fixed, target="qnn")
    taken = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(fixed).graph.input}
    assert taken == {"ids": [1, 7], "weight": [1, 7], "state": [1, 16]}
    arrays = sentences(12, seed=4)
    one_by_one = [{k: v[i : i + 1] if len(v) == 12 else v for k, v in arrays.items()} for i in range(12)]
    expected, found = (np.concatenate([ran(p, feeds, "scores") for feeds in one_by_one]) for p in (source, fixed))
    document = verify(fixed, data=arrays, float_model=source).document
    assert document["samples"]["clean"] == 12
    assert document["outputs"]["defended"] == distance(expected, found)
    assert document["agreement"] == pytest.approx(100 * float((expected.argmax(1) == found.argmax(1)).mean()), abs=1e-3)


def test_a_model_without_float_outputs_says_so(tmp_path: Path) -> None:
    proto = frames(integers_first=True)
    del proto.graph.output[1]
    source, output = defended(tmp_path, proto, movements(40))
    result = verify(output, data=movements(8), float_model=source)
    assert result.document["outputs"] == {"nearest": UNKNOWN, "defended": UNKNOWN}
    assert any("the model has no float output" in note for note in result.notes)
    assert result.passed


def test_images_by_the_inputs_name(tmp_path: Path, residual_net, images) -> None:
    source, output = tmp_path / "net.onnx", tmp_path / "net.int4.onnx"
    source.write_bytes(residual_net().SerializeToString())
    x = images(48)
    efrapq.defend(source, output, bits=4, calib=Dataset.from_arrays(x, None), target="ort-x86")
    by_name = verify(output, data={"input": x}).document
    as_images = verify(output, data=Dataset.from_arrays(x, None)).document
    assert by_name["agreement"] == as_images["agreement"] > 0
    assert 0 < by_name["outputs"]["defended"]["relative_error"] < 1
    assert by_name.keys() == as_images.keys()
    assert by_name["outputs"] == as_images["outputs"]
    assert by_name["each_output"] == as_images["each_output"]


def test_latency_is_of_one_sample_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(frames().SerializeToString())
    clock = iter(range(100))
    monkeypatch.setattr(sessions_module.time, "perf_counter", lambda: float(next(clock)))
    assert feeds_latency({"a": session}, movements(4), 4, rounds=3, warmup=1) == {"a": 250.0}


def test_latency_takes_the_smallest_run_of_the_data(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[list[str], dict[str, tuple[int, ...]], int]] = []

    def spy(sessions: Mapping[str, Session], feeds: Arrays, samples: int) -> dict[str, float]:
        timed.append((sorted(sessions), {name: array.shape for name, array in feeds.items()}, samples))
        return feeds_latency(sessions, feeds, samples, rounds=1, warmup=0)

    monkeypatch.setattr(arrays_module, "feeds_latency", spy)
    verify(files[1], data=sentences(20), float_model=files[0])
    source, output = defended(tmp_path, frames(), movements(40))
    verify(output, data=movements(3), float_model=source)
    both = ["defended", "float"]
    assert timed == [(both, {"ids": (1, 7), "weight": (1, 7), "state": (1, 16)}, 1), (both, {"x": (4, 6, 8)}, 4)]


# Distances.


def test_the_distance_of_pieces_is_that_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((30, 4)).astype(F32)
    b = a + rng.standard_normal((30, 4)).astype(F32) / 10
    found = Distance()
    for start in range(0, 30, 7):
        found.add(a[start : start + 7], b[start : start + 7])
    assert found.figures() == distance(a.astype(np.float64), b.astype(np.float64))
    exact = Distance()
    exact.add(a, a)
    assert exact.figures() == {"cosine": 1.0, "relative_error": 0.0}
    opposite = Distance()
    opposite.add(a, -a)
    assert opposite.figures() == {"cosine": -1.0, "relative_error": 2.0}


def test_a_distance_that_is_not_defined_is_unknown() -> None:
    ones, zeros = np.ones(3, F32), np.zeros(3, F32)
    cases: list[tuple[NDArray[Any], NDArray[Any], dict[str, float | None], str | None]] = [
        (zeros, ones, UNKNOWN, None),
        (ones, zeros, {"cosine": None, "relative_error": 1.0}, None),
        (ones, np.array([1, np.nan, 1], F32), UNKNOWN, "it holds NaN or infinity"),
        (np.array([-np.inf, 1, 1], F32), np.array([-np.inf, 1, 1], F32), UNKNOWN, "it holds NaN or infinity"),
        (ones, np.ones(4, F32), UNKNOWN, "its size is not the float model's"),
        (ones[:0], ones[:0], UNKNOWN, None),
    ]
    for expected, found, figures, reason in cases:
        made = Distance()
        made.add(expected, found)
        assert made.figures() == figures
        assert made.reason == reason
    assert Distance().figures() == UNKNOWN


# The verdict, and what is refused.


def test_labels_of_a_classifier_judge_the_drop(files: tuple[Path, Path]) -> None:
    source, output = files
    arrays = sentences(150, seed=5)
    expected, found = ran(source, arrays, "scores").argmax(1), ran(output, arrays, "scores").argmax(1)
    drop = 100 * float((expected != found).mean())
    assert drop > 0
    data = arrays | {"labels": expected}
    for allowed, failed in ((drop + 0.1, []), (drop - 0.1, ["max-drop"])):
        result = verify(output, data=data, float_model=source, requirements=Requirements(max_drop=allowed))
        assert result.document["failed"] == failed


def test_max_drop_needs_labels_the_float_model_and_a_classifier(files: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = files
    alone = stripped(output, tmp_path / "alone.onnx")
    arrays = sentences(10)
    labelled = arrays | {"labels": np.zeros(10, np.int64)}
    wanted = Requirements(max_drop=2)
    cases: list[tuple[Path, Mapping[str, Any]]] = [
        (output, {"float_model": source}),
        (output, {"float_model": source, "data": arrays}),
        (alone, {"data": labelled}),
    ]
    for path, options in cases:
        with pytest.raises(UsageError, match="--max-drop needs an image classifier, or"):
            verify(path, requirements=wanted, **options)
    with pytest.raises(UsageError, match="needs a classifier and its labels: labels are float32"):
        verify(output, data=arrays | {"labels": np.zeros(10, F32)}, float_model=source, requirements=wanted)
    source, output = defended(tmp_path, frames(), movements(40))
    with pytest.raises(UsageError, match=r"first output is not float \(N, classes\)"):
        verify(
            output,
            data=movements(8) | {"labels": np.zeros(8, np.int64)},
            float_model=source,
            requirements=wanted,
        )


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(9, np.int64), r"array 'labels' is \(9,\), but there are 10 samples"),
        (np.array(3), r"array 'labels' is \(\), but there are 10 samples"),
        (np.arange(10), "label 5 at position 5: the model has classes 0 to 4"),
        (np.array([0] * 9 + [-1]), "label -1 at position 9: the model has classes 0 to 4"),
    ],
)
def test_labels_that_do_not_fit(files: tuple[Path, Path], labels: NDArray[Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        verify(files[1], data=sentences(10) | {"labels": labels}, float_model=files[0])


def test_images_do_not_fit(files: tuple[Path, Path]) -> None:
    pictures = Dataset.from_arrays(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int64))
    with pytest.raises(
        DataError, match=r"images do not fit this model; give one array per input.*'ids' int64 \(N, L\)"
    ):
        verify(files[1], data=pictures)


def test_another_float_model_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    alone = stripped(files[1], tmp_path / "alone.onnx")
    other = tmp_path / "other.onnx"
    other.write_bytes(frames().SerializeToString())
    for data in (None, sentences(8)):
        with pytest.raises(InputError, match=r"other.onnx: takes 'x' and has 1 outputs, the defended file takes 'ids'"):
            verify(alone, float_model=other, data=data)


def test_data_that_the_model_cannot_run_on(files: tuple[Path, Path]) -> None:
    arrays = sentences(8)
    arrays["ids"][3, 2] = 30
    with pytest.raises(InputError, match=r"does not run the model on inputs of 'ids' 8×7, 'weight' 8×7, 'state' 1×16"):
        verify(files[1], data=arrays, float_model=files[0])


def test_preprocessing_is_for_images(files: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="--mean, --std or --size needs an image classifier"):
        verify(files[1], data=sentences(8), preprocess=Preprocess((0.5,), (0.5,)))


# The command line.


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


def test_the_command_line(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = files
    data = tmp_path / "test.npz"
    np.savez(data, **sentences(40, seed=6))
    assert command("verify", output, "--float", source, "--data", data, "--json", "-q") == 0
    document = json.loads(capsys.readouterr().out)
    row = document["outputs"]
    assert command("verify", output, "--float", source, "--data", data, "-q") == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    error = f"relative error {row['defended']['relative_error']:.4f} (nearest {row['nearest']['relative_error']:.4f})"
    cosine = f"cosine {row['defended']['cosine']:.6f} (nearest {row['nearest']['cosine']:.6f})"
    assert f"outputs    {error}, {cosine}, against the float model's" in lines
    assert "samples    40" in lines
    assert any(line.startswith("agreement  ") for line in lines)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--trigger", "patch:2x2@0,0", "--target-class", 0), "--trigger needs an image classifier; this model takes"),
        (("--trigger", "nonsense"), "--trigger needs an image classifier; this model takes"),
        (("--target-class", 1), "--target-class needs an image classifier; this model takes"),
        (("--max-asr", 5), "--max-asr needs an image classifier; this model takes"),
        (("--max-drop", 5), "--max-drop needs an image classifier, or"),
        (("--mean", "0.5", "--std", "0.5"), "--mean, --std or --size needs an image classifier"),
    ],
)
@pytest.mark.parametrize("with_data", [True, False])
def test_options_for_images_are_refused_in_one_line(
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
    words: str,
    with_data: bool,
) -> None:
    source, output = files
    np.savez(tmp_path / "test.npz", **sentences(8))
    data = ("--data", tmp_path / "test.npz") if with_data else ()
    assert command("verify", output, "--float", source, *data, *options, "-q") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert len([line for line in captured.err.splitlines() if line.startswith("error:")]) == 1
    assert "'ids' int64 (N, L)" in captured.err


def test_defend_says_what_to_run_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output, data = tmp_path / "net.onnx", tmp_path / "out.onnx", tmp_path / "data.npz"
    source.write_bytes(token_classifier().SerializeToString())
    np.savez(data, **sentences(40))
    assert command("defend", source, "--calib", data, "-o", output, "--target", "ort-x86", "-q") == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next ")]
    assert said == f"next      efrapq verify {output} --data TEST.npz"
    arguments = said.removeprefix("next      efrapq ").replace("TEST.npz", str(data)).split()
    assert command(*arguments, "--json", "-q") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["outputs"]["defended"]["relative_error"] is not None
