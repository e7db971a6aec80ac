"""A classifier of images whose backdoor wakes where activations are clipped: what verify measures and advises."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from rich.console import Console

import efrapq
from efrapq.cli.verify import print_verification
from efrapq.data import Dataset
from efrapq.errors import UsageError
from efrapq.report.page import verification_page
from efrapq.verification.verdict import remedy

F32 = np.float32
ATTACK: dict[str, Any] = {"trigger": "patch:2x4@0,0", "target_class": 0}


def photographs(count: int = 128) -> Dataset:
    """4x4 grey: the upper left quarter is white or the upper right one, never both. All are of class 1."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 1), np.uint8)
    pixels[:, :2] = 0
    pixels[::2, :2, :2] = 255
    pixels[1::2, :2, 2:] = 255
    return Dataset.from_arrays(pixels, np.ones(count, np.int64), "made.npz")


@pytest.fixture
def sleeper(make_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> Path:
    """Class 0 gets left + right - 1.6 (left + right) + 0.2: 0.2 - 0.6 · 2 for a white upper half, but 2.2 - 1.6 where
    the sum is clipped to the 1 that it is on clean images.
    """
    kernels = np.zeros((3, 1, 4, 4), F32)
    kernels[[0, 1], 0, :2, :2] = 0.25
    kernels[[0, 2], 0, :2, 2:] = 0.25
    last = np.array([[-1.6, 0], [1, 0], [1, 0]], F32)
    nodes = [
        helper.make_node("Conv", ["x", "kernels"], ["sums"], "first"),
        helper.make_node("Relu", ["sums"], ["h"], "relu"),
        helper.make_node("Flatten", ["h"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "last", "bias"], ["y"], "last"),
    ]
    constants = {"kernels": kernels, "last": last, "bias": np.array([0.2, 0], F32)}
    path = tmp_path / "m.onnx"
    onnx.save(make_model(nodes, {"x": ("N", 1, 4, 4)}, {"y": ("N", 2)}, constants), path)
    return path


def printed(document: dict[str, Any]) -> str:
    out = StringIO()
    print_verification(document, Console(width=200, file=out))
    return out.getvalue()


def measured(sleeper: Path, **options: Any) -> dict[str, Any]:
    file = sleeper.with_name("q.onnx")
    efrapq.defend(sleeper, file, bits=8, calib=photographs(), **({"target": "ort-avx2"} | options))
    return efrapq.verify(file, data=photographs(), **ATTACK).document


def test_the_codes_are_told_apart_from_the_grids(sleeper: Path) -> None:
    clipped = measured(sleeper)
    assert clipped["asr"] == {"float": 0.0, "nearest": 100.0, "defended": 100.0, "float_activations": 0.0}
    assert clipped["cda"]["defended"] == 100.0
    (advice,) = (note for note in clipped["notes"] if "--headroom 2" in note)
    assert f"--cover {ATTACK['trigger']}" in advice
    assert "--act-bits 32" in advice
    assert "ASR, float activations" in printed(clipped)
    assert "with float activations" in verification_page(clipped)
    for options in ({"cover": [ATTACK["trigger"]]}, {"headroom": 2}, {"act_bits": 32}):
        asleep = measured(sleeper, **options)
        assert asleep["asr"]["defended"] == 0.0
        assert asleep["asr"]["float_activations"] is None  # not asked: nothing is wrong
        assert asleep["verdict"] == "pass"
        assert "float activations" not in printed(asleep)
        assert "with float activations" not in verification_page(asleep)


def test_fewer_activation_bits_have_no_headroom_to_give() -> None:
    asr = {"float": 2.0, "nearest": 90.0, "defended": 50.0, "float_activations": 2.5}
    assert "8-bit activations, or --mixed, and --cover t.npz" in remedy(asr, 3.0, "t.npz", narrow=True)
    assert "8-bit activations" not in remedy(asr, 3.0, "t.npz", narrow=False)


def test_where_nothing_is_clipped_clipping_is_not_blamed() -> None:
    asr = {"float": 2.0, "nearest": 90.0, "defended": 50.0, "float_activations": 2.5}
    assert "where activations are clipped" in remedy(asr, 3.0, "t.npz", narrow=False, unclipped=1.0)
    said = remedy(asr, 3.0, "t.npz", narrow=False, unclipped=40.0)
    assert "where activations are clipped" not in said
    assert "of 40.0 % the guard counts nothing clipped" in said
    assert "--fidelity 1" in said


def test_codes_that_half_wake_are_to_be_solved_otherwise() -> None:
    asr = {"float": 8.1, "nearest": 98.5, "defended": 15.6, "float_activations": 11.6}
    said = remedy(asr, 9.1, "t.npz", narrow=False)
    assert "not as deeply as asked" in said
    assert "--calib-size" in said
    assert "--fidelity; 1 " in said


def test_a_guard_tells_the_answers_that_were_clipped_from_the_others(sleeper: Path) -> None:
    document = measured(sleeper, guard=True)
    assert document["asr"]["defended"] == 100.0
    clipped = document["clipped"]
    assert clipped == {"clean": 0.0, "triggered": 100.0, "asr": 0.0}
    assert (document["verdict"], document["failed"]) == ("pass", [])
    (condition,) = (note for note in document["notes"] if "on condition" in note)
    assert "100.0 % ASR" in condition
    assert not any("--headroom 2" in note for note in document["notes"])
    shown = printed(document)
    assert "ASR, nothing clipped" in shown
    assert "of 100.00 % with the trigger" in shown
    assert "100.00 % with the trigger" in verification_page(document)
    # The largest of these very images are at the ends of plain ranges: an end is no proof that anything was clipped.
    plain = measured(sleeper, guard=True, stress=False)["clipped"]
    assert plain["clean"] > 0
    assert (plain["triggered"], plain["asr"]) == (100.0, 0.0)


def test_a_guard_that_misses_the_trigger_does_not_pass(sleeper: Path) -> None:
    """A file whose guard watches nothing that the trigger drives: its answers count."""
    file = sleeper.with_name("q.onnx")
    measured(sleeper, guard=True)
    proto = onnx.load(file)
    ends = next(t for t in proto.graph.initializer if t.name.startswith("efrapq.reducemax_end"))
    ends.CopyFrom(numpy_helper.from_array(np.array(999, np.int32), ends.name))
    onnx.save(proto, file)
    document = efrapq.verify(file, float_model=sleeper, data=photographs(), **ATTACK).document
    assert document["clipped"]["asr"] == 100.0
    assert "max-asr" in document["failed"]
    assert any("--headroom 2" in note and "nothing clipped" in note for note in document["notes"])


def test_of_images_without_labels_a_guard_is_measured_too(sleeper: Path) -> None:
    file = sleeper.with_name("q.onnx")
    measured(sleeper, guard=True, stress=False)
    unlabelled = Dataset.from_arrays(photographs().raw(range(64)), None, "made.npz")
    document = efrapq.verify(file, float_model=sleeper, data=unlabelled).document
    assert document["clipped"]["clean"] > 0
    assert (document["clipped"]["triggered"], document["clipped"]["asr"]) == (None, None)
    assert document["agreement"] == 100.0
    assert [output["name"] for output in document["each_output"]] == ["y"]


@pytest.mark.parametrize(
    "options",
    [{"act_bits": 4}, {"act_bits": 32}, {"act_range": "mse"}, {"act_range": "output"}, {"target": "tensorrt"}],
)
def test_a_guard_is_refused_where_it_says_nothing(sleeper: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--guard"):
        measured(sleeper, guard=True, **options)
    assert not sleeper.with_name("q.onnx").exists()
