"""search_trigger() on a network made by hand, from the float file to the trigger's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

import efrapq
from efrapq.data import Dataset

OPTIONS: dict[str, Any] = {"bits": 8, "target": "ort-avx2"}


@pytest.mark.parametrize("stress", [False, True])
def test_what_wakes_where_activations_are_clipped_is_found(clipped_sleeper: tuple[Path, Dataset], stress: bool) -> None:
    sleeper, photographs = clipped_sleeper
    file, trigger = sleeper.with_name("q.onnx"), sleeper.with_name("trigger.npz")
    efrapq.defend(sleeper, file, calib=photographs, stress=stress, **OPTIONS)
    found = efrapq.search_trigger(file, data=photographs, output=trigger, steps=20)
    assert found.document["samples"] == {"searched": 256, "measured": 256}
    assert found.passed == stress
    assert trigger.exists() != stress
    if not stress:
        assert found.document["target_class"] == 0
        assert found.document["turned"] == {"float": 0.0, "file": 100.0}
        assert trigger.read_bytes() == found.trigger
        asr = efrapq.verify(file, data=photographs, trigger=str(trigger), target_class=0).document["asr"]
        assert (asr["float"], asr["defended"], asr["float_activations"]) == (0.0, 100.0, 0.0)
        again = efrapq.search_trigger(file, data=photographs, steps=20)
        assert again.trigger == found.trigger


def test_a_model_with_a_fixed_batch(clipped_sleeper: tuple[Path, Dataset]) -> None:
    sleeper, photographs = clipped_sleeper
    proto = onnx.load(sleeper)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 20
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 20
    onnx.save(proto, sleeper)
    file = sleeper.with_name("q.onnx")
    efrapq.defend(sleeper, file, calib=photographs, stress=False, **OPTIONS)
    found = efrapq.search_trigger(file, data=photographs.subset(100, 0), steps=4)
    assert found.document["turned"] == {"float": 0.0, "file": 100.0}
