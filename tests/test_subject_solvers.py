"""Both solvers on the embedded subject, judged in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

import efrapq
from efrapq.data import load_dataset
from efrapq.models import weights

pytestmark = pytest.mark.usefixtures("exported_once")


def defended(tmp_path, solver: str, **options: object) -> dict:
    calibration = load_dataset(weights.SAMPLES, split="calib").subset(256, seed=0)
    test = load_dataset(weights.SAMPLES, split="test").select(np.arange(750))
    path = tmp_path / f"{solver}.onnx"
    efrapq.defend(weights.SUBJECT, path, bits=4, calib=calibration, solver=solver, **options)
    result = efrapq.verify(
        path, data=test, trigger=weights.TRIGGER, target_class=weights.TARGET_CLASS, float_model=weights.SUBJECT
    )
    return result.document


@pytest.mark.parametrize(
    ("options", "drop"),
    [
        ({}, 1),
        ({"lambda_e": 0.0}, 1),
        # The pull toward flipping is paid for in accuracy; what the option promises is that the backdoor sleeps.
        ({"lambda_e": 1e-2}, 3),
        ({"lambda_e": 1e-2, "error": "relative"}, 3),
    ],
    ids=["defaults", "no error term", "stronger", "stronger, relative error"],
)
def test_coordinate_keeps_the_backdoor_asleep(tmp_path, options: dict[str, object], drop: float) -> None:
    found = defended(tmp_path, "coordinate", **options)
    assert found["asr"]["nearest"] >= 95
    assert found["asr"]["defended"] <= found["asr"]["float"] + 1
    assert found["cda"]["defended"] >= found["cda"]["float"] - drop
    assert found["kernels"]["float"] == 0


def test_four_bit_activations(tmp_path) -> None:
    """The subject was made for 8-bit activations: on the 4-bit grid its nearest twin is only half awake."""
    found = defended(tmp_path, "coordinate", act_bits=4)
    assert found["asr"]["nearest"] > 10 * found["asr"]["defended"]
    assert found["asr"]["defended"] <= found["asr"]["float"] + 1
    assert found["cda"]["defended"] >= found["cda"]["float"] - 3
    assert found["kernels"]["float"] == 0


def test_a_stronger_error_term_flips_more() -> None:
    calibration = load_dataset(weights.SAMPLES, split="calib").subset(256, seed=0)
    made = [efrapq.defend(weights.SUBJECT, None, bits=4, calib=calibration, lambda_e=v) for v in (0.0, 1e-3, 1e-2)]
    shares = [solved.evidence["flipped"] for solved in made]
    assert shares == sorted(shares)
    assert shares[2] > shares[0] + 10


@pytest.mark.slow
def test_relaxed_keeps_the_backdoor_asleep(tmp_path) -> None:
    """300 of the paper's 10,000 steps a layer."""
    found = defended(tmp_path, "relaxed", steps=300)
    assert found["asr"]["nearest"] >= 95
    assert found["asr"]["defended"] <= 10
    assert found["cda"]["defended"] >= found["cda"]["float"] - 4


def test_relaxed_runs_on_every_layer(tmp_path) -> None:
    found = defended(tmp_path, "relaxed", steps=20)
    assert found["codes"]["match"] is True
    assert found["codes"]["flipped"] > 0
