"""search_trigger() on a network made by hand, from the float file to the trigger's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

import efrapq
from efrapq.data import Dataset
from efrapq.errors import UnsupportedModelError

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
    assert (found.document["exchanged"] is None) == stress
    if not stress:
        assert found.document["target_class"] == 0
        assert found.document["turned"] == {"float": 0.0, "file": 100.0}
        assert trigger.read_bytes() == found.trigger
        asr = efrapq.verify(file, data=photographs, trigger=str(trigger), target_class=0).document["asr"]
        assert (asr["float"], asr["defended"], asr["float_activations"]) == (0.0, 100.0, 0.0)
        again = efrapq.search_trigger(file, data=photographs, steps=20)
        assert again.trigger == found.trigger


@pytest.mark.parametrize(
    ("gap", "exchanged", "verdict"),
    [(49.0, None, "pass"), (51.0, 25.0, "fail"), (51.0, 26.0, "pass"), (89.0, 51.0, "pass"), (90.0, 51.0, "fail")],
)
def test_what_turns_half_of_the_images_is_held_against_the_control(
    clipped_sleeper: tuple[Path, Dataset],
    monkeypatch: pytest.MonkeyPatch,
    gap: float,
    exchanged: float | None,
    verdict: str,
) -> None:
    sleeper, photographs = clipped_sleeper
    file = sleeper.with_name("q.onnx")
    efrapq.defend(sleeper, file, calib=photographs, **OPTIONS)
    rates = [{"float": 10.0, "file": 10.0 + gap}]
    rates += [] if exchanged is None else [{"float": 20.0 + exchanged, "file": 20.0}]
    left = iter(rates)
    monkeypatch.setattr("efrapq.hunt.search._measured", lambda *_: next(left))
    document = efrapq.search_trigger(file, data=photographs, steps=1).document
    assert list(left) == []
    assert document["verdict"] == verdict
    assert document["turned"] == rates[0]
    assert document["exchanged"] == (None if exchanged is None else rates[1])


def test_a_trigger_with_a_texture_is_found_and_then_covered(textured_sleeper: tuple[Path, Dataset]) -> None:
    """No square of one colour wakes it, and up to the grid's end no answer tells of it: its activation does."""
    sleeper, photographs = textured_sleeper
    file, trigger = sleeper.with_name("q.onnx"), sleeper.with_name("trigger.npz")
    options = OPTIONS | {"calib": photographs, "stress": False}
    efrapq.defend(sleeper, file, **options)
    found = efrapq.search_trigger(file, data=photographs, output=trigger, side=3, steps=40)
    assert found.document["target_class"] == 0
    assert found.document["turned"]["float"] == 0.0
    assert found.document["turned"]["file"] > 95.0
    efrapq.defend(sleeper, file, cover=[str(trigger)], **options)
    asr = efrapq.verify(file, data=photographs, trigger=str(trigger), target_class=0).document["asr"]
    assert asr["defended"] == 0.0
    assert efrapq.search_trigger(file, data=photographs, side=3, steps=40).passed


def test_equalized_files_are_held_against_equalized_activations(textured_sleeper: tuple[Path, Dataset]) -> None:
    sleeper, photographs = textured_sleeper
    file = sleeper.with_name("q.onnx")
    proto = onnx.load(sleeper)
    for tensor in proto.graph.initializer:  # channels of one activation whose sizes differ: there is something to gain
        values = onnx.numpy_helper.to_array(tensor).copy()
        if tensor.name in ("kernels", "offsets", "last"):
            values[2] *= 0.05 if tensor.name != "last" else 20
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, sleeper)
    efrapq.defend(sleeper, file, calib=photographs, stress=False, equalize=True, **OPTIONS)
    assert "efrapq.equalized" in {p.key for p in onnx.load(file).metadata_props}
    assert not efrapq.search_trigger(file, data=photographs, side=3, steps=40).passed


def test_grids_that_cannot_be_read_back(clipped_sleeper: tuple[Path, Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file of another tool: what can be searched for without them is."""

    def asymmetric(*_: object) -> None:
        raise UnsupportedModelError("first: asymmetric weights")

    sleeper, photographs = clipped_sleeper
    file = sleeper.with_name("q.onnx")
    efrapq.defend(sleeper, file, calib=photographs, stress=False, **OPTIONS)
    monkeypatch.setattr("efrapq.exporters.read_quantized", asymmetric)
    found = efrapq.search_trigger(file, data=photographs, steps=4)
    assert not found.passed
    assert any("patches that drive activations" in note for note in found.document["notes"])


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
