"""verify for models of images that are no classifiers: segmenters, detectors, embeddings, label maps."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image
from rich.console import Console

import efrapq
from efrapq.cli.main import main
from efrapq.cli.verify import print_verification
from efrapq.data import Dataset
from efrapq.errors import InputError, UsageError
from efrapq.preprocess import Preprocess
from efrapq.verification import Requirements, verify
from efrapq.verification import images as measuring

F32 = np.float32
NOTHING = {"float": None, "nearest": None, "defended": None}
FIGURES = ("cosine", "relative_error", "error_of_spread", "agreement")
SIZE = 12

Build = Callable[[Any], onnx.ModelProto]


def finished(n: Any, outputs: dict[str, int]) -> onnx.ModelProto:
    """The net with these outputs, name → element type; their shapes as inferred, and open where they are not."""
    proto = n.model(next(iter(outputs)))
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items())
    inferred = onnx.shape_inference.infer_shapes(proto)
    for given, found in zip(proto.graph.output, inferred.graph.output, strict=True):
        given.CopyFrom(found)
    return proto


def backbone(net: Any) -> tuple[Any, str]:
    n = net(3, size=SIZE)
    a = n.op("Relu", n.batchnorm(n.conv("input", "c1", 3, 8, bias=False), "bn1", 8), "a1")
    return n, n.op("Relu", n.conv(a, "c2", 8, 8), "a2")


def segmenter(net: Any) -> onnx.ModelProto:
    """(N, 4, 12, 12) scores at half the size, resized."""
    n, features = backbone(net)
    pooled = n.op("MaxPool", features, "pooled", kernel_shape=[2, 2], strides=[2, 2])
    scales = n.constant("scales", np.array([1, 1, 2, 2], F32))
    low = n.conv(pooled, "head", 8, 4, k=1)
    return finished(n, {n.op("Resize", [low, "", scales], "scores", mode="linear"): TensorProto.FLOAT})


def label_maps(net: Any) -> onnx.ModelProto:
    """(N, 12, 12) int64 classes, and nothing else."""
    n, features = backbone(net)
    n.conv(features, "head", 8, 4, k=1)
    return finished(n, {n.op("ArgMax", "head", "labels", axis=1, keepdims=0): TensorProto.INT64})


def detector(net: Any) -> onnx.ModelProto:
    """boxes (N, 6·6, 4) in 0–1 and scores (N, 6·6, 5): two heads, rows of places."""
    n, features = backbone(net)
    pooled = n.op("MaxPool", features, "pooled", kernel_shape=[2, 2], strides=[2, 2])
    for name, channels in (("boxes", 4), ("scores", 5)):
        rows = n.constant(f"{name}.rows", np.array([0, channels, -1], np.int64))
        flat = n.op("Reshape", [n.conv(pooled, f"{name}.conv", 8, channels, k=1), rows], f"{name}.flat")
        n.op("Transpose", flat, f"{name}.raw", perm=[0, 2, 1])
    n.op("Sigmoid", "boxes.raw", "boxes")
    n.op("Softmax", "scores.raw", "scores", axis=-1)
    return finished(n, {"boxes": TensorProto.FLOAT, "scores": TensorProto.FLOAT})


def embedding(net: Any) -> onnx.ModelProto:
    """(N, 16) of length one."""
    n, features = backbone(net)
    flat = n.op("Flatten", n.op("GlobalAveragePool", features, "gap"), "flat")
    return finished(n, {n.op("LpNormalization", n.gemm(flat, "raw", 8, 16), "vector", axis=1): TensorProto.FLOAT})


def changing(net: Any) -> onnx.ModelProto:
    """(K, 8) for the K places that are above a limit: another size for other roundings."""
    n, features = backbone(net)
    total = n.op("ReduceMean", features, "strength", axes=[1], keepdims=1)
    limit = n.constant("limit", np.array(0.135, F32))
    found = n.op("NonZero", n.op("Greater", [total, limit], "above"), "found")
    return finished(n, {n.op("Cast", n.op("Transpose", found, "places"), "points", to=1): TensorProto.FLOAT})


def pixels(count: int, seed: int = 0, size: int = SIZE) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, size // 3, size // 3, 3))
    fine = coarse.repeat(3, 1).repeat(3, 2) + rng.integers(-20, 20, (count, size, size, 3))
    return np.clip(fine, 0, 255).astype(np.uint8)


def defended(folder: Path, proto: onnx.ModelProto, **options: Any) -> tuple[Path, Path]:
    source, output = folder / "net.onnx", folder / "net.int4.onnx"
    source.write_bytes(proto.SerializeToString())
    calib = Dataset.from_arrays(pixels(32), None, "made")
    settings: dict[str, Any] = {"bits": 2, "edge_bits": 2, "target": "ort-x86", "calib": calib}
    efrapq.defend(source, output, **(settings | options))
    return source, output


def ran(path: Path, x: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    values = session.run(None, {session.get_inputs()[0].name: x})
    return {o.name: v for o, v in zip(session.get_outputs(), values, strict=True)}


def figures(expected: NDArray[Any], found: NDArray[Any], axis: int | None = None) -> dict[str, float | None]:
    """By hand, over all samples at once."""
    a, b = expected.astype(np.float64), found.astype(np.float64)
    error = np.linalg.norm(b - a)
    same = None if axis is None else float((a.argmax(axis) == b.argmax(axis)).mean())
    return {
        "cosine": pytest.approx(float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)), abs=2e-6),
        "relative_error": pytest.approx(float(error / np.linalg.norm(a)), abs=2e-6),
        "error_of_spread": pytest.approx(float(error / np.linalg.norm(a - a.mean(0))), abs=2e-6),
        "agreement": None if same is None else pytest.approx(100 * same, abs=1e-3),
    }


def shown(document: dict[str, Any]) -> str:
    printed = StringIO()
    print_verification(document, Console(width=200, file=printed))
    return printed.getvalue()


# What is measured.


def test_a_segmenter_on_a_folder_of_images(tmp_path: Path, net) -> None:
    source, output = defended(tmp_path, segmenter(net))
    images = pixels(9, seed=1)
    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}.png")
    x = Preprocess().normalize(images)
    expected, found = ran(source, x)["scores"], ran(output, x)["scores"]

    result = verify(output, data=folder, float_model=source)
    document = result.document
    (row,) = document["each_output"]
    assert row["name"] == "scores"
    assert row["shape"] == [None, 4, SIZE, SIZE]
    assert row["class_axis"] == 1
    assert row["positions"] == 9 * SIZE * SIZE
    assert row["defended"] == figures(expected, found, 1)
    assert 0 < row["defended"]["relative_error"] < 1
    assert 0 < row["defended"]["agreement"] < 100
    assert document["outputs"]["defended"] == {k: row["defended"][k] for k in ("cosine", "relative_error")}
    assert document["cda"] == NOTHING
    assert document["asr"] == NOTHING | {"float_activations": None}
    assert document["agreement"] is None
    assert document["samples"] == {"clean": 9, "triggered": 0}
    assert document["codes"]["match"] is True
    assert result.passed
    (note,) = [note for note in result.notes if "CDA and ASR" in note]
    assert f"the first output of this model is N×4×{SIZE}×{SIZE}, not N×classes" in note
    assert "its outputs are compared with the float model's" in note

    nearest = tmp_path / "nearest.onnx"
    calib = Dataset.from_arrays(pixels(32), None, "made")
    efrapq.defend(source, nearest, bits=2, edge_bits=2, target="ort-x86", calib=calib, solver="nearest")
    assert row["nearest"] == figures(expected, ran(nearest, x)["scores"], 1)
    assert row["nearest"] != row["defended"]


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_the_images_of_one_run_do_not_matter(
    tmp_path: Path, net, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    source, output = defended(tmp_path, segmenter(net))
    images = pixels(9, seed=1)
    x = Preprocess().normalize(images)
    monkeypatch.setattr(measuring, "BATCH", at_once)
    (row,) = verify(output, data=Dataset.from_arrays(images, None), float_model=source).document["each_output"]
    assert row["defended"] == figures(ran(source, x)["scores"], ran(output, x)["scores"], 1)


def test_large_outputs_are_run_few_at_a_time(tmp_path: Path, net, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = defended(tmp_path, segmenter(net))
    asked: list[int] = []
    real = Dataset.batches
    monkeypatch.setattr(Dataset, "batches", lambda self, size: asked.append(size) or real(self, size))
    # One image: 3·12·12 values in and 4·12·12 out of 4 bytes, for three models.
    one = (3 + 4) * SIZE * SIZE * 4 * 3
    for limit, size in ((one * 5, 5), (1, 1), (1 << 30, 100)):
        monkeypatch.setattr(measuring, "RUN_BYTES", limit)
        verify(output, data=Dataset.from_arrays(pixels(7), None), float_model=source)
        assert asked.pop() == size


def test_a_detector_with_two_outputs(tmp_path: Path, net) -> None:
    source, output = defended(tmp_path, detector(net))
    images = pixels(8, seed=2)
    x = Preprocess().normalize(images)
    expected, found = ran(source, x), ran(output, x)
    document = verify(output, data=Dataset.from_arrays(images, None), float_model=source).document
    boxes, scores = document["each_output"]
    assert (boxes["name"], scores["name"]) == ("boxes", "scores")
    assert boxes["shape"] == [None, 36, 4]
    assert boxes["class_axis"] is boxes["positions"] is None
    assert boxes["defended"] == figures(expected["boxes"], found["boxes"])
    assert scores["class_axis"] == 2
    assert scores["positions"] == 8 * 36
    assert scores["defended"] == figures(expected["scores"], found["scores"], 2)
    assert document["outputs"]["defended"]["cosine"] == boxes["defended"]["cosine"]
    text = shown(document)
    assert "outputs    boxes (any×36×4)" in text
    assert "           scores (any×36×5)" in text
    assert "of 288 top-1 answers along axis 2 are the float model's" in text


def test_an_embedding(tmp_path: Path, net) -> None:
    source, output = defended(tmp_path, embedding(net))
    images = pixels(20, seed=3)
    x = Preprocess().normalize(images)
    expected, found = ran(source, x)["vector"], ran(output, x)["vector"]
    document = verify(output, data=Dataset.from_arrays(images, None), float_model=source).document
    (row,) = document["each_output"]
    assert row["defended"] == figures(expected, found)
    # By its shape it could be a classifier of 16 classes; the answers are compared as such.
    assert document["agreement"] == pytest.approx(100 * float((expected.argmax(1) == found.argmax(1)).mean()), abs=1e-3)
    assert "error " in shown(document)


def test_maps_of_labels_are_compared_place_by_place(tmp_path: Path, net) -> None:
    source, output = defended(tmp_path, label_maps(net))
    images = pixels(8, seed=4)
    x = Preprocess().normalize(images)
    expected, found = ran(source, x)["labels"], ran(output, x)["labels"]
    result = verify(output, data=Dataset.from_arrays(images, None), float_model=source)
    (row,) = result.document["each_output"]
    assert row["shape"] == [None, SIZE, SIZE]
    assert row["positions"] == 8 * SIZE * SIZE
    assert row["defended"] == dict.fromkeys(FIGURES[:3]) | {
        "agreement": pytest.approx(100 * float((expected == found).mean()), abs=1e-3)
    }
    assert 50 < row["defended"]["agreement"] < 100
    assert any("first output of this model is int64 N×12×12" in note for note in result.notes)
    assert f"of {8 * SIZE * SIZE:,} values are the float model's" in shown(result.document)


def test_outputs_of_other_sizes_are_not_compared(tmp_path: Path, net) -> None:
    source, output = defended(tmp_path, changing(net))
    images = pixels(8, seed=5)
    x = Preprocess().normalize(images)
    assert ran(source, x)["points"].shape != ran(output, x)["points"].shape
    result = verify(output, data=Dataset.from_arrays(images, None), float_model=source)
    (row,) = result.document["each_output"]
    assert row["defended"] == row["nearest"] == dict.fromkeys(FIGURES)
    assert any("output 'points' is not compared: its size is not the float model's" in note for note in result.notes)
    assert "outputs  " not in shown(result.document)


def test_a_fixed_batch_of_masks(tmp_path: Path, net) -> None:
    proto = segmenter(net)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    proto = onnx.shape_inference.infer_shapes(proto)
    source, output = defended(tmp_path, proto)
    images = pixels(6, seed=6)
    x = Preprocess().normalize(np.concatenate([images, images[-1:], images[-1:]]))
    parts = [[ran(path, x[at : at + 4])["scores"] for at in (0, 4)] for path in (source, output)]
    expected, found = (np.concatenate(pieces)[:6] for pieces in parts)
    document = verify(output, data=Dataset.from_arrays(images, None), float_model=source).document
    assert document["samples"]["clean"] == 6
    assert document["each_output"][0]["defended"] == figures(expected, found, 1)
    assert document["each_output"][0]["positions"] == 6 * SIZE * SIZE


def test_without_the_float_model_there_is_nothing_to_compare_with(tmp_path: Path, net) -> None:
    _, output = defended(tmp_path, segmenter(net))
    output.with_suffix(".json").unlink()
    result = verify(output, data=Dataset.from_arrays(pixels(5), None))
    assert result.document["each_output"] is None
    assert result.document["outputs"]["defended"] == {"cosine": None, "relative_error": None}
    assert any("pass --float to compare" in note for note in result.notes)
    assert result.document["latency_ms"]["defended"] > 0


def test_labels_beside_a_model_without_classes_are_left_alone(tmp_path: Path, net) -> None:
    source, output = defended(tmp_path, segmenter(net))
    data = Dataset.from_arrays(pixels(6), np.array([0, 1, 2, 0, 1, 900]))
    document = verify(output, data=data, float_model=source).document
    assert document["cda"] == NOTHING
    assert document["each_output"][0]["defended"]["relative_error"] > 0


def test_a_classifier_keeps_its_rates(tmp_path: Path, residual_net) -> None:
    source, output = tmp_path / "net.onnx", tmp_path / "net.int4.onnx"
    source.write_bytes(residual_net().SerializeToString())
    images = pixels(40, size=9)[:, :8, :8]
    efrapq.defend(source, output, calib=Dataset.from_arrays(images, None), target="ort-x86")
    labelled = Dataset.from_arrays(images, np.arange(40) % 5)
    document = verify(output, data=labelled, requirements=Requirements(max_drop=100)).document
    assert None not in document["cda"].values()
    assert document["outputs"] is document["each_output"] is None
    assert "latency, one image" in shown(document)
    assert verify(output).document["each_output"] is None


# What is refused.


@pytest.mark.parametrize(
    ("options", "requirements", "words"),
    [
        ({"trigger": "patch:2x2@0,0", "target_class": 0}, {}, "--trigger needs a classifier"),
        ({"trigger": "patch:2x2@0,0", "target_class": 0}, {"max_asr": 5}, "--trigger needs a classifier"),
        ({}, {"max_drop": 1}, "--max-drop needs a classifier"),
    ],
)
@pytest.mark.parametrize("labels", [True, False])
def test_rates_are_for_classifiers(
    tmp_path: Path, net, options: dict[str, Any], requirements: dict[str, float], words: str, labels: bool
) -> None:
    source, output = defended(tmp_path, segmenter(net))
    data = Dataset.from_arrays(pixels(6), np.arange(6) % 3 if labels else None)
    with pytest.raises(UsageError, match=rf"{words}: the first output of this model is N×4×{SIZE}×{SIZE}, not N×cl"):
        verify(output, data=data, float_model=source, requirements=Requirements(**requirements), **options)


def test_rates_of_a_model_whose_sizes_are_only_known_when_it_runs(tmp_path: Path, net) -> None:
    proto = segmenter(net)
    for dim, name in zip(proto.graph.output[0].type.tensor_type.shape.dim, "NCHW", strict=True):
        dim.dim_param = name
    source, output = defended(tmp_path, proto)
    data = Dataset.from_arrays(pixels(6), np.arange(6) % 3)
    with pytest.raises(UsageError, match=rf"--max-drop needs a classifier.*N×4×{SIZE}×{SIZE}"):
        verify(output, data=data, float_model=source, requirements=Requirements(max_drop=1))


def test_a_float_model_with_other_outputs_is_refused(tmp_path: Path, net) -> None:
    source, output = defended(tmp_path, segmenter(net))
    proto = onnx.load(output)
    del proto.metadata_props[:]
    output.write_bytes(proto.SerializeToString())
    output.with_suffix(".json").unlink()
    other = tmp_path / "other.onnx"
    other.write_bytes(detector(net).SerializeToString())
    with pytest.raises(InputError, match="the float model has 2 outputs, the defended file has 1"):
        verify(output, data=Dataset.from_arrays(pixels(4), None), float_model=other)
    assert source.exists()


# The command line.


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


def test_the_command_line(tmp_path: Path, net, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = defended(tmp_path, segmenter(net))
    data = tmp_path / "test.npz"
    np.savez(data, images=pixels(10, seed=7))
    assert command("verify", output, "--float", source, "--data", data, "--json", "-q") == 0
    document = json.loads(capsys.readouterr().out)
    (row,) = document["each_output"]
    assert document["cda"] == NOTHING
    assert command("verify", output, "--float", source, "--data", data, "-q") == 0
    captured = capsys.readouterr()
    lines = [line.rstrip() for line in captured.out.splitlines()]
    at = next(i for i, line in enumerate(lines) if line.startswith("outputs    relative error "))
    spread, same = row["defended"]["error_of_spread"], row["defended"]["agreement"]
    assert lines[at + 1].startswith(f"           error {spread:.4f} (nearest ")
    assert lines[at + 1].endswith("of what differs between samples")
    assert lines[at + 2].startswith(f"           {same:.1f} % (nearest ")
    assert lines[at + 2].endswith(f"of {row['positions']:,} top-1 answers along axis 1 are the float model's")
    assert "CDA and ASR are not measured" in captured.err
    assert command("verify", output, "--float", source, "--data", data, "--max-drop", 1, "-q") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--max-drop needs" in captured.err
