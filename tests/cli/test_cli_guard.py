"""defend --guard end to end, on the embedded network: what it says of images, and what other commands make of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from efrapq.data import load_dataset
from efrapq.exporters import read_quantized
from efrapq.loading import PREPROCESS_KEY
from efrapq.models import weights
from efrapq.preprocess import Preprocess

TEST = f"{weights.SAMPLES}:test"
ATTACK = ("--trigger", weights.TRIGGER, "--target-class", weights.TARGET_CLASS)


def answers(path: Path, images: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {session.get_inputs()[0].name: images}))


def test_a_guarded_file_answers_as_the_other_one_does_and_says_what_was_clipped(
    run, defended: Path, tmp_path: Path
) -> None:
    subject, file = defended.with_name("model.safetensors"), tmp_path / "g.onnx"
    options = ("--calib", f"{weights.SAMPLES}:calib", "--target", "ort-x86", "--guard", "-o", file)
    ran = run("defend", subject, *options)
    assert ran.code == 0, ran.err
    assert "guard     output `clipped` counts what arrives at an end" in ran.out
    evidence = json.loads(file.with_suffix(".json").read_text())
    assert evidence["settings"]["guard"] is True
    assert evidence["guard"]["watched"] > 10
    plain, guarded = (read_quantized(onnx.load(path)) for path in (defended, file))
    assert plain.digest == guarded.digest
    assert plain.activations == guarded.activations

    metadata = {p.key: p.value for p in onnx.load(file).metadata_props}
    images = load_dataset(TEST).inputs(range(200), Preprocess.from_json(metadata[PREPROCESS_KEY]))
    logits, clipped = answers(file, images)
    assert np.array_equal(logits, answers(defended, images)[0])
    assert (clipped > 0).mean() < 0.1
    extremes = np.where(np.random.default_rng(0).random(images.shape) < 0.5, images.min(), images.max())
    assert (answers(file, extremes.astype(np.float32))[1] > 0).mean() > 0.5

    ran = run("verify", file, "--data", TEST, *ATTACK, "--require-integer")
    assert ran.code == 0, ran.err
    assert "ASR, nothing clipped" in ran.out
    assert "of clean samples that something was clipped" in ran.out

    ran = run("export", file, "--target", "tensorrt", "--target", "ort-arm")
    assert ran.code == 0, ran.err
    assert ran.out.count("no guard") == 1
    outputs = [len(onnx.load(tmp_path / f"g.{t}.onnx").graph.output) for t in ("tensorrt", "ort-arm")]
    assert outputs == [1, 2]

    ran = run("inspect", file)
    assert ran.code == 0, ran.err
    assert "efrapq.guard" in ran.out


def test_it_is_refused_where_it_would_say_nothing(run, defended: Path, tmp_path: Path) -> None:
    subject = defended.with_name("model.safetensors")
    options = ("--calib", f"{weights.SAMPLES}:calib", "--guard", "-o", tmp_path / "g.onnx")
    for more, words in ((("--act-bits", "4"), "act-bits 8"), (("--target", "qnn"), "qnn takes no output")):
        ran = run("defend", subject, *options, *more)
        assert ran.code == 2
        assert words in " ".join(ran.err.split())
    assert list(tmp_path.iterdir()) == []
