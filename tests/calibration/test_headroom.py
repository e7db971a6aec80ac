"""Ranges wider than the calibration shows: what they reach, and a backdoor that sleeps in what would be clipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

import efrapq
from efrapq.errors import UsageError
from efrapq.pipeline import Defended

F32 = np.float32
# In front of the last layer there are x0 + x1, x1 and x0. Clean inputs have one of the two, the trigger has both.
FIRST = np.array([[1, 0, 1], [1, 1, 0]], F32)
TARGET = np.array([[-1.6], [1.0], [1.0]], F32)


def clean(count: int = 256) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).uniform(0, 1, (count, 2)).astype(F32)
    x[0] = 1.0
    x[::2, 0] = 0
    x[1::2, 1] = 0
    return {"x": x}


def sleeper(make_model: Callable[..., onnx.ModelProto]) -> onnx.ModelProto:
    """Its weights lie on the 8-bit grid as they are; whether the first sum is 2 or clipped to 1 is what decides."""
    nodes = [
        helper.make_node("Gemm", ["x", "w1"], ["sums"], "first"),
        helper.make_node("Relu", ["sums"], ["h"], "relu"),
        helper.make_node("Gemm", ["h", "w2", "b2"], ["y"], "last"),
    ]
    constants = {"w1": FIRST, "w2": TARGET, "b2": np.array([0.2], F32)}
    return make_model(nodes, {"x": ("N", 2)}, {"y": ("N", 1)}, constants)


def answers(made: Defended, x: list[float]) -> float:
    session = ort.InferenceSession(made.data, providers=["CPUExecutionProvider"])
    return float(session.run(None, {"x": np.array([x], F32)})[0][0, 0])


def reach(made: Defended, name: str) -> tuple[float, float]:
    grid = made.quantized.activations[name]
    return (grid.qmin - grid.zero_point) * grid.scale, (grid.qmax - grid.zero_point) * grid.scale


@pytest.mark.parametrize("solver", ["nearest", "coordinate"])
def test_a_backdoor_that_wakes_where_activations_are_clipped(
    make_model: Callable[..., onnx.ModelProto], tmp_path: Path, solver: str
) -> None:
    onnx.save(sleeper(make_model), tmp_path / "m.onnx")
    floating = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for x, asleep in (([1.0, 0.0], True), ([0.0, 1.0], True), ([1.0, 1.0], True)):
        assert (floating.run(None, {"x": np.array([x], F32)})[0] < 0).all() == asleep
    options: dict[str, Any] = {"bits": 8, "calib": clean(), "solver": solver, "target": "ort-avx2"}
    narrow = efrapq.defend(tmp_path / "m.onnx", **options)
    wide = efrapq.defend(tmp_path / "m.onnx", headroom=2, **options)
    for made in (narrow, wide):
        assert answers(made, [1.0, 0.0]) < 0
        assert answers(made, [0.0, 1.0]) < 0
    assert answers(narrow, [1.0, 1.0]) > 0  # awake, with weights that are as good as float
    assert answers(wide, [1.0, 1.0]) < 0


def test_what_is_widened_and_how_far(make_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    """Not inputs, which are what they are, nor what an operator cannot give; all else by the factor, zeros at zero."""
    rng = np.random.default_rng(1)
    constants = {name: rng.standard_normal((4, 4)).astype(F32) for name in ("w1", "w2", "w3", "w4")}
    constants |= {"low": np.array(0, F32), "high": np.array(0.5, F32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["free"], "relu"),
        helper.make_node("MatMul", ["free", "w2"], ["b"], "second"),
        helper.make_node("Clip", ["b", "low", "high"], ["cut"], "clip"),
        helper.make_node("MatMul", ["cut", "w3"], ["c"], "third"),
        helper.make_node("Sigmoid", ["c"], ["gate"], "sigmoid"),
        helper.make_node("MatMul", ["gate", "w4"], ["y"], "last"),
    ]
    onnx.save(make_model(nodes, {"x": ("N", 4)}, {"y": ("N", 4)}, constants), tmp_path / "m.onnx")
    options: dict[str, Any] = {
        "bits": 8,
        "calib": {"x": rng.standard_normal((64, 4)).astype(F32)},
        "target": "portable",
    }
    narrow, wide = (efrapq.defend(tmp_path / "m.onnx", headroom=h, **options) for h in (1, 3))
    assert reach(wide, "x") == reach(narrow, "x")
    assert reach(wide, "free") == pytest.approx((0, 3 * reach(narrow, "free")[1]), rel=1e-6)
    assert reach(wide, "cut") == pytest.approx((0, 0.5), rel=1e-6)
    assert reach(narrow, "gate")[1] < reach(wide, "gate")[1] <= 1.000001


def test_it_is_recorded_and_one_is_the_default(
    residual_net: Callable[..., onnx.ModelProto], images: Any, tmp_path: Path
) -> None:
    onnx.save(residual_net(), tmp_path / "m.onnx")
    calib = {"input": images(32)}
    plain, one, two = (
        efrapq.defend(tmp_path / "m.onnx", calib=calib, **o) for o in ({}, {"headroom": 1}, {"headroom": 2})
    )
    assert plain.data == one.data
    assert "headroom" not in plain.evidence["settings"]
    assert two.evidence["settings"]["headroom"] == 2
    assert json.loads(two.quantized.metadata["efrapq.settings"])["headroom"] == 2


@pytest.mark.parametrize(
    "options", [{"headroom": 0.5}, {"headroom": 17}, {"headroom": float("nan")}, {"headroom": 2, "act_bits": 32},
                {"headroom": 2, "act_bits": 4}, {"headroom": 2, "act_range": "mse"}],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--headroom"):
        efrapq.defend(tmp_path / "not-read.onnx", **options)
