"""Ranges that cover images with patches on them, and a backdoor in what would be clipped without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

import efrapq
from efrapq.calibration.stress import patched
from efrapq.data import Dataset
from efrapq.pipeline import Defended
from efrapq.progress import Silent

F32 = np.float32
OPTIONS: dict[str, Any] = {"bits": 8, "target": "ort-avx2"}


@pytest.mark.parametrize("channels_last", [False, True])
def test_one_square_patch_on_each_image(channels_last: bool) -> None:
    shape = (200, 16, 24, 3) if channels_last else (200, 3, 16, 24)
    axis = 3 if channels_last else 1
    images = torch.full(shape, 0.25)
    ends = [1, 1, 1, 1]
    ends[axis] = 3
    low, high = torch.tensor([-1.0, -2.0, 0.0]).reshape(ends), torch.tensor([1.0, 2.0, 3.0]).reshape(ends)
    found = patched(images, low, high, torch.Generator().manual_seed(0))
    assert torch.equal(images, torch.full(shape, 0.25))
    assert bool(((found >= low) & (found <= high)).all())
    touched = (found != images).any(axis)
    sides = set()
    for area in touched:
        rows, cols = area.any(1).nonzero(), area.any(0).nonzero()
        assert len(rows) == len(cols)
        assert int(area.sum()) == len(rows) * len(cols)
        sides.add(len(rows))
    assert sides == {2, 3, 4}  # an eighth to a quarter of 16
    whole = (found == high).sum(axis), (found == low).sum(axis)
    assert all(bool((kind == 3).any()) for kind in whole)  # white ones, and black ones
    assert torch.equal(found, patched(images, low, high, torch.Generator().manual_seed(0)))
    assert not torch.equal(found, patched(images, low, high, torch.Generator().manual_seed(1)))


def test_a_backdoor_in_what_is_clipped_sleeps_by_default(clipped_sleeper: tuple[Path, Dataset]) -> None:
    """Nobody tells defend the trigger: three white pixels, which a patch covers now and then."""
    sleeper, photographs = clipped_sleeper
    rates, reports = {}, {}
    for stress in (False, True):
        file, reports[stress] = sleeper.with_name(f"{stress}.onnx"), Silent()
        efrapq.defend(sleeper, file, calib=photographs, stress=stress, reporter=reports[stress], **OPTIONS)
        document = efrapq.verify(file, data=photographs, trigger="patch:1x3@7,7", target_class=0).document
        rates[stress] = document["asr"]["float"], document["asr"]["defended"]
        assert document["cda"]["defended"] == 100.0
    assert rates == {False: (0.0, 100.0), True: (0.0, 0.0)}
    said = [text for text in reports[True].warnings if "patches on the calibration images" in text]
    assert len(said) == 1
    assert "to 3.0 times" in said[0]
    assert not any("patches" in text for text in reports[False].warnings)


def reach(made: Defended) -> dict[str, tuple[float, float]]:
    grids = made.quantized.activations
    return {n: ((g.qmin - g.zero_point) * g.scale, (g.qmax - g.zero_point) * g.scale) for n, g in grids.items()}


def test_ranges_only_grow_and_it_is_recorded(
    residual_net: Callable[..., onnx.ModelProto], images: Callable[..., NDArray[np.float32]], tmp_path: Path
) -> None:
    onnx.save(residual_net(), tmp_path / "m.onnx")
    calib = Dataset.from_arrays(images(64), None)
    plain, default, again = (
        efrapq.defend(tmp_path / "m.onnx", calib=calib, **OPTIONS, **o) for o in ({"stress": False}, {}, {})
    )
    assert default.data == again.data
    narrow, wide = reach(plain), reach(default)
    assert narrow.keys() == wide.keys()
    assert all(wide[n][0] <= narrow[n][0] and wide[n][1] >= narrow[n][1] for n in narrow)
    assert wide["input"] == narrow["input"]
    assert any(wide[n][1] > 1.05 * narrow[n][1] for n in narrow)
    assert "stress" not in plain.evidence["settings"]
    assert "stress" not in plain.evidence["calibration"]
    assert default.evidence["settings"]["stress"] is True
    record = default.evidence["calibration"]["stress"]
    assert record["widest"] in wide
    assert record["factor"] >= 1
    assert json.loads(default.quantized.metadata["efrapq.settings"])["stress"] is True


def test_only_for_images_with_min_max_ranges(
    residual_net: Callable[..., onnx.ModelProto], images: Callable[..., NDArray[np.float32]], tmp_path: Path
) -> None:
    """Arrays are whatever they are, and other ranges leave values out on purpose."""
    onnx.save(residual_net(), tmp_path / "m.onnx")
    calib = Dataset.from_arrays(images(32), None)
    for options in (
        {"calib": {"input": images(32)}},
        {"calib": calib, "act_bits": 4},
        {"calib": calib, "act_range": "mse"},
        {"calib": calib, "act_bits": 32},
    ):
        on, off = (efrapq.defend(tmp_path / "m.onnx", stress=s, **OPTIONS, **options) for s in (True, False))
        assert on.data == off.data
        assert "stress" not in on.evidence["settings"]


def test_both_layouts_get_the_same_patches() -> None:
    """What a network with its channels last is calibrated on is what the other one is."""
    x = torch.rand(8, 3, 16, 16)
    low, high = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    first = patched(x, low, high, torch.Generator().manual_seed(3))
    last = patched(
        x.permute(0, 2, 3, 1), low.permute(0, 2, 3, 1), high.permute(0, 2, 3, 1), torch.Generator().manual_seed(3)
    )
    same = (first != x).any(1) == (last != x.permute(0, 2, 3, 1)).any(3)
    assert float(same.float().mean()) > 0.99  # noise is drawn in the order of memory; where patches lie is not
