"""Ranges that cover images with patches on them, and a backdoor in what would be clipped without."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

import efrapq
from efrapq.calibration.stress import patched, stressed_values
from efrapq.data import Dataset
from efrapq.errors import EfrapqError, OutputError, UsageError
from efrapq.graph.executor import Executor
from efrapq.graph.prepare import prepare
from efrapq.grid import ActivationGrid
from efrapq.pipeline import Defended
from efrapq.progress import Silent

F32 = np.float32
OPTIONS: dict[str, Any] = {"bits": 8, "target": "ort-avx2"}


@pytest.mark.parametrize("textured", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_square_patch_on_each_image(channels_last: bool, textured: bool) -> None:
    shape = (200, 16, 24, 3) if channels_last else (200, 3, 16, 24)
    axis = 3 if channels_last else 1
    images = torch.full(shape, 0.25)
    low, high = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([1.0, 2.0, 3.0])
    found = patched(images, low, high, torch.Generator().manual_seed(0), textured=textured)
    assert torch.equal(images, torch.full(shape, 0.25))
    black, white = (end if channels_last else end[:, None, None] for end in (low, high))
    assert bool(((found >= black) & (found <= white)).all())
    touched = (found != images).any(axis)
    sides = set()
    for area in touched:
        rows, cols = area.any(1).nonzero(), area.any(0).nonzero()
        assert len(rows) == len(cols)
        assert int(area.sum()) == len(rows) * len(cols)
        sides.add(len(rows))
    assert sides == {2, 3, 4}  # an eighth to a quarter of 16
    again, other = (
        patched(images, low, high, torch.Generator().manual_seed(seed), textured=textured) for seed in (0, 1)
    )
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    whole = (found == white).sum(axis), (found == black).sum(axis)
    assert all(bool((kind == 3).any()) for kind in whole)  # white pixels, and black ones
    squares = [part_of(image, area, channels_last) for image, area in zip(found, touched, strict=True)]
    if not textured:
        assert sum(bool((square == square[:, :1, :1]).all()) for square in squares) > 100  # of one colour
        return
    shares = [(square - low[:, None, None]) / (high - low)[:, None, None] for square in squares]
    assert all(bool(((share == 0) | (share == 1)).all()) for share in shares)
    checks = [torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])]
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    kinds = {
        "checkered": sum(any(bool((share[:, :2, :2] == c).all()) for c in checks) for share in shares),
        "rows": sum(bool((share[:, :2, :2] == rows).all()) for share in shares),
        "columns": sum(bool((share[:, :2, :2] == rows.T).all()) for share in shares),
        "coloured": sum(not bool((share == share[:1]).all()) for share in shares),
    }
    assert min(kinds.values()) >= 8, kinds


def part_of(image: torch.Tensor, area: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """The square that was touched, channels first."""
    rows, cols = area.any(1).nonzero()[:, 0], area.any(0).nonzero()[:, 0]
    image = image.permute(2, 0, 1) if channels_last else image
    return image[:, rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]


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


@pytest.mark.parametrize("options", [{}, {"stress": False, "cover": ["patch:1x3@7,7"]}])
def test_what_is_driven_far_gets_eight_bits_that_cover_it(
    clipped_sleeper: tuple[Path, Dataset], options: dict[str, Any]
) -> None:
    """The first layer's sums are 1 on images, and 3 with the trigger on them."""
    sleeper, photographs = clipped_sleeper
    four = OPTIONS | {"calib": photographs, "act_bits": 4, "edge_bits": 4} | options
    made, file = {}, sleeper.with_name("q.onnx")
    for mixed in (False, True):
        reporter = Silent()
        made[mixed] = efrapq.defend(sleeper, file, mixed=mixed, reporter=reporter, **four)
        assert ("their grids do not cover that" in reporter.warnings[-1]) != mixed
    document = efrapq.verify(file, data=photographs, trigger="patch:1x3@7,7", target_class=0).document
    assert document["cda"]["defended"] == 100.0
    assert document["asr"]["defended"] == 0.0
    bits = {mixed: {name: grid.bits for name, grid in m.quantized.activations.items()} for mixed, m in made.items()}
    assert set(bits[False].values()) == {4}
    recorded = made[True].evidence["calibration"]["stress"]
    # Flattened it is on the same grid.
    assert {name for name, count in bits[True].items() if count == 8} == {"h", "flat"}
    assert (recorded["widest"], recorded["mixed"]) == ("h", 1)
    assert made[True].quantized.activations["h"].limits == pytest.approx((0, 3), rel=1e-3)
    assert made[True].evidence["settings"]["mixed"]
    assert "mixed" not in made[False].evidence["settings"]


def test_nothing_is_wider_where_nothing_is_driven_far(clipped_sleeper: tuple[Path, Dataset]) -> None:
    sleeper, photographs = clipped_sleeper
    options = OPTIONS | {"calib": photographs, "act_bits": 4, "stress": False, "cover": ["patch:1x1@0,0=0"]}
    plain, mixed = (efrapq.defend(sleeper, mixed=m, **options) for m in (False, True))
    assert plain.quantized.activations == mixed.quantized.activations


@pytest.mark.parametrize("options", [{"act_bits": 8}, {"act_bits": 32}, {"stress": False}, {"act_range": "output"}])
def test_mixed_needs_four_bits_and_something_strange(
    clipped_sleeper: tuple[Path, Dataset], options: dict[str, Any]
) -> None:
    sleeper, photographs = clipped_sleeper
    with pytest.raises(UsageError, match="--mixed gives 8 bits"):
        efrapq.defend(sleeper, calib=photographs, mixed=True, **(OPTIONS | {"act_bits": 4} | options))


def test_the_trigger_that_is_named_is_not_clipped(clipped_sleeper: tuple[Path, Dataset]) -> None:
    """Nor is one that is found: both forms of the same three pixels give the same grids."""
    sleeper, photographs = clipped_sleeper
    trigger, folder = "patch:1x3@7,7", sleeper.parent / "found"
    folder.mkdir()
    mask = np.zeros((16, 16), np.uint8)
    mask[7, 7:10] = 1
    np.savez(folder / "t.npz", mask=mask, pattern=255 * mask)
    made, reports = {}, {}
    for spec in (trigger, str(folder / "t.npz")):
        file, reports[spec] = sleeper.with_name(f"{len(made)}.onnx"), Silent()
        options = OPTIONS | {"calib": photographs, "stress": False, "cover": [spec], "reporter": reports[spec]}
        made[spec] = efrapq.defend(sleeper, file, **options)
        document = efrapq.verify(file, data=photographs, trigger=trigger, target_class=0).document
        assert document["asr"]["defended"] == 0.0
        assert document["cda"]["defended"] == 100.0
    named, found = made.values()
    assert named.quantized.activations == found.quantized.activations
    assert named.evidence["settings"]["cover"] == [trigger]
    assert found.evidence["settings"]["cover"] == ["t.npz"]  # where it lay does not go into the file
    assert all("stress" not in m.evidence["settings"] for m in made.values())
    assert named.evidence["calibration"]["stress"]["factor"] == 3.0
    said = [text for text in reports[trigger].warnings if "calibration images drive" in text]
    assert len(said) == 1
    assert said[0].startswith("triggers on the calibration images")
    with pytest.raises(OutputError, match=r"t\.npz"):
        efrapq.defend(sleeper, folder / "t.npz", calib=photographs, cover=[str(folder / "t.npz")], **OPTIONS)


def test_several_triggers(
    residual_net: Callable[..., onnx.ModelProto], images: Callable[..., NDArray[np.float32]], tmp_path: Path
) -> None:
    """Every range reaches as far as with each of them alone, and no further."""
    onnx.save(residual_net(), tmp_path / "m.onnx")
    options = OPTIONS | {"calib": Dataset.from_arrays(images(40), None), "stress": False}
    covers = ([], ["patch:4x4@1,1"], ["patch:3x3@5,5=0"], ["patch:4x4@1,1", "patch:3x3@5,5=0"])
    plain, left, right, both = (reach(efrapq.defend(tmp_path / "m.onnx", cover=c, **options)) for c in covers)
    for name, (low, high) in both.items():
        assert low == pytest.approx(min(left[name][0], right[name][0]), abs=2 * (high - low) / 255)
        assert high == pytest.approx(max(left[name][1], right[name][1]), abs=2 * (high - low) / 255)
    assert any(both[n][1] > 1.05 * plain[n][1] for n in both)


@pytest.mark.parametrize("act_bits", [4, 8])
def test_what_is_covered_counts_where_ranges_are_of_least_error(
    act_bits: int,
    residual_net: Callable[..., onnx.ModelProto],
    images: Callable[..., NDArray[np.float32]],
    tmp_path: Path,
) -> None:
    onnx.save(residual_net(), tmp_path / "m.onnx")
    options = OPTIONS | {"calib": Dataset.from_arrays(images(40), None), "act_range": "mse", "act_bits": act_bits}
    plain, covered = (
        efrapq.defend(tmp_path / "m.onnx", stress=False, cover=c, **options) for c in ([], ["patch:5x5@2,2"])
    )
    narrow, wide = reach(plain), reach(covered)
    assert narrow["input"] == wide["input"]
    assert any(wide[n][1] > narrow[n][1] for n in narrow)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"act_bits": 32}, "--act-bits 32"),
        ({"act_range": "output"}, "--act-range output"),
        ({"cover": ["patch:4x4@14,14"]}, "covers rows 14–17"),
        ({"cover": ["patch"]}, "is not understood"),
        ({"cover": ["absent.npz"]}, "absent.npz"),
    ],
)
def test_covers_that_make_no_sense(
    options: dict[str, Any], complaint: str, clipped_sleeper: tuple[Path, Dataset]
) -> None:
    sleeper, photographs = clipped_sleeper
    with pytest.raises(EfrapqError, match=re.escape(complaint)):
        efrapq.defend(sleeper, calib=photographs, **(OPTIONS | {"cover": ["patch:1x3@7,7"]} | options))


def test_arrays_are_taken_as_they_are(
    residual_net: Callable[..., onnx.ModelProto], images: Callable[..., NDArray[np.float32]], tmp_path: Path
) -> None:
    onnx.save(residual_net(), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="--cover puts a trigger on images"):
        efrapq.defend(tmp_path / "m.onnx", calib={"input": images(8)}, cover=["patch:2x2@0,0"])


def test_a_texture_that_no_plain_square_has_is_covered_by_default(
    textured_sleeper: tuple[Path, Dataset], tmp_path: Path
) -> None:
    sleeper, photographs = textured_sleeper
    mask, pattern = np.zeros((2, 16, 16), np.uint8)
    mask[7, 7:10] = 1
    pattern[7, 7:10] = 255, 0, 255
    np.savez(tmp_path / "t.npz", mask=mask, pattern=pattern)
    rates = {}
    for stress in (False, True):
        file = sleeper.with_name(f"{stress}.onnx")
        efrapq.defend(sleeper, file, calib=photographs, stress=stress, **OPTIONS)
        document = efrapq.verify(file, data=photographs, trigger=str(tmp_path / "t.npz"), target_class=0).document
        rates[stress] = document["asr"]["float"], document["asr"]["defended"]
    assert rates == {False: (0.0, 100.0), True: (0.0, 0.0)}


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


def test_not_where_ranges_are_chosen_by_the_outputs_or_there_are_none(
    residual_net: Callable[..., onnx.ModelProto], images: Callable[..., NDArray[np.float32]], tmp_path: Path
) -> None:
    onnx.save(residual_net(), tmp_path / "m.onnx")
    calib = Dataset.from_arrays(images(32), None)
    for options in ({"calib": calib, "act_range": "output"}, {"calib": calib, "act_bits": 32}):
        on, off = (efrapq.defend(tmp_path / "m.onnx", stress=s, **OPTIONS, **options) for s in (True, False))
        assert on.data == off.data
        assert "stress" not in on.evidence["settings"]


@pytest.mark.parametrize("act_bits", [4, 8])
def test_ranges_of_least_error_serve_patched_images_as_well(
    act_bits: int,
    residual_net: Callable[..., onnx.ModelProto],
    images: Callable[..., NDArray[np.float32]],
    tmp_path: Path,
) -> None:
    """Over the images and their patched copies together, no grid is worse than the one for the images alone."""
    onnx.save(residual_net(), tmp_path / "m.onnx")
    x = images(48)
    options = {"calib": Dataset.from_arrays(x, None), "act_range": "mse", "act_bits": act_bits} | OPTIONS
    plain, default = (efrapq.defend(tmp_path / "m.onnx", stress=s, **options) for s in (False, True))
    assert default.evidence["settings"]["stress"] is True
    assert plain.data != default.data
    grids = default.quantized.activations
    names = [name for name in grids if name != "input"]
    executor = Executor(prepare(onnx.load(tmp_path / "m.onnx")))
    pixels = torch.from_numpy(x)
    under = patched(pixels, pixels.amin((0, 2, 3)), pixels.amax((0, 2, 3)), torch.Generator().manual_seed(0))
    with torch.no_grad():
        values = executor.run({"input": torch.cat([pixels, under])}, names)
    better = 0
    for name in names:
        errors = [squared_error(values[name], made.quantized.activations[name]) for made in (plain, default)]
        assert errors[1] <= errors[0] * 1.01  # the search sees a histogram instead of the values
        better += errors[1] < errors[0] * 0.99
    assert better > 0


def squared_error(values: torch.Tensor, grid: ActivationGrid) -> float:
    return float((grid.fake_quantize(values) - values).double().square().sum())


def test_how_values_are_spread_under_patches(
    residual_net: Callable[..., onnx.ModelProto], images: Callable[..., NDArray[np.float32]]
) -> None:
    """Counted by NumPy, over chunks that share one seed."""
    graph = prepare(residual_net())
    executor = Executor(graph)
    chunks = list(torch.from_numpy(images(40)).split(16))
    low, high = (torch.stack([getattr(c, end)((0, 2, 3)) for c in chunks]) for end in ("amin", "amax"))
    generator = torch.Generator().manual_seed(5)
    under = torch.cat([patched(c, low.amin(0), high.amax(0), generator) for c in chunks])
    names = [str(node.outputs[0].name) for node in graph.graph if node.op_type in ("Relu", "Add")]
    assert names
    found = stressed_values(executor, "input", chunks, names, 5, Silent(), spread=True)
    assert found.keys() == set(names)
    with torch.no_grad():
        values = executor.run({"input": under}, names)
    for name in names:
        known, x = found[name], values[name].double().numpy()
        assert known.low == pytest.approx(x.min(), rel=1e-5)
        assert known.high == pytest.approx(x.max(), rel=1e-5)
        assert known.spread is not None
        counts, _ = np.histogram(x, len(known.spread.counts), (known.low, known.high))
        assert float(known.spread.counts.sum()) == x.size
        # At the edges of bins one float is as good as another.
        assert np.abs(known.spread.counts.numpy() - counts).sum() <= 0.002 * x.size
    without = stressed_values(executor, "input", chunks, names, 5, Silent())
    assert all(value.spread is None for value in without.values())


def test_both_layouts_get_the_same_patches() -> None:
    """What a network with its channels last is calibrated on is what the other one is."""
    x, low, high = torch.rand(64, 3, 16, 16), torch.zeros(3), torch.ones(3)
    first = patched(x, low, high, torch.Generator().manual_seed(3))
    last = patched(x.permute(0, 2, 3, 1), low, high, torch.Generator().manual_seed(3))
    assert torch.equal(first, last.permute(0, 3, 1, 2))


def test_arrays_of_two_inputs_have_no_patches(make_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    """Nobody knows which of them an image is."""
    rng = np.random.default_rng(0)
    calib = {name: rng.random((16, 1, 8, 8)).astype(F32) for name in ("a", "b")}
    nodes = [
        helper.make_node("Add", ["a", "b"], ["sum"], "add"),
        helper.make_node("Conv", ["sum", "w"], ["y"], "conv"),
    ]
    shapes = dict.fromkeys(calib, ("N", 1, 8, 8))
    weight = rng.standard_normal((2, 1, 3, 3)).astype(F32)
    onnx.save(make_model(nodes, shapes, {"y": ("N", 2, 6, 6)}, {"w": weight}), tmp_path / "m.onnx")
    on, off = (efrapq.defend(tmp_path / "m.onnx", calib=calib, stress=s, **OPTIONS) for s in (True, False))
    assert on.data == off.data
