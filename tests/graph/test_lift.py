"""Channels below a step of their grid that a layer behind hears: found, lifted, and heard in the file as in float."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

import efrapq
from efrapq.calibration.lift import GAIN, Lifted, _Gains, choose_lift
from efrapq.data import Dataset
from efrapq.graph.amplified import amplifying_layers
from efrapq.graph.equalize import EQUALIZED_KEY, combined, equalize
from efrapq.graph.executor import Executor
from efrapq.graph.layers import find_layers
from efrapq.graph.placement import place
from efrapq.graph.prepare import prepare
from efrapq.inspection import inspect as efrapq_inspect
from tests.graph.conftest import Recorder, run

Foreign = Callable[..., onnx.ModelProto]

# The last channel of r speaks where the first one of x is bright all around, and only the last one of s hears it.
NETWORK = """
g (float[n, 3, 8, 8] x) => (float[n, 4] y) {
  a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
  r = ACT
  c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r, w2, b2)
  s = Relu(c)
  d = Conv <kernel_shape = [1, 1]> (s, w3)
  t = Relu(d)
  p = GlobalAveragePool(t)
  f = Flatten(p)
  y = Gemm <transB = 1> (f, w4)
}"""
BRIGHT = 3.0
# What is said is at most this, a step of its grid being about 0.02; and how much louder whoever hears it repeats it.
SAID, HEARD = 0.007, 200.0


def weights(
    said: float = SAID, heard: float = HEARD, third: float = 0.5, rest: float = 0.0
) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(5)

    def draw(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    made = {
        "w1": draw(6, 3, 3, 3),
        "b1": np.zeros(6, np.float32),
        "w2": draw(6, 6, 3, 3),
        "b2": np.zeros(6, np.float32),
    }
    made |= {"w3": draw(6, 6, 1, 1), "w4": draw(4, 6), "zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    # Of nine pixels at their brightest, 27 in all, what is above 20.
    made["w1"][5] = 0
    made["w1"][5, 0] = said / 7
    made["b1"][5] = rest - 20 * said / 7
    made["w2"][:, 5] = made["w2"][5] = 0
    made["w2"][5, 5, 1, 1] = heard
    made["b2"][5] = -rest * heard
    made["w3"][:, 5] = made["w3"][5] = 0
    made["w3"][5, 5] = third
    made["w4"][:, 5] = 0
    made["w4"][0, 5] = 0.5
    return made


def made(foreign: Foreign, act: str = "Relu(a)", **changed: Any) -> onnx.ModelProto:
    return foreign(NETWORK.replace("ACT", act), weights(**changed))


@pytest.fixture
def images() -> NDArray[np.float32]:
    drawn = np.random.default_rng(1).standard_normal((48, 3, 8, 8)).astype(np.float32)
    return np.clip(drawn, -BRIGHT, BRIGHT)


def bright(images: NDArray[np.float32]) -> NDArray[np.float32]:
    out = images.copy()
    out[:, 0, 2:6, 2:6] = BRIGHT
    return out


def lifted(proto: onnx.ModelProto, images: NDArray[np.float32], act_bits: int = 8) -> tuple[Any, Lifted]:
    model = prepare(proto)
    layers, _ = find_layers(model.graph)
    chunks = list(torch.from_numpy(images).split(20))
    return model, choose_lift(model, layers, place(model.graph, layers, act_bits), chunks, torch.device("cpu"))


def values(model: Any, images: NDArray[np.float32], *names: str) -> dict[str, NDArray[np.float32]]:
    with torch.no_grad():
        return {k: v.numpy() for k, v in Executor(model).run({"x": torch.from_numpy(images)}, names).items()}


def steps(reached: NDArray[np.float32]) -> float:
    return float((reached.max().clip(0) - reached.min().clip(None, 0)) / 255)


def test_a_channel_below_its_step_is_found_and_heard(foreign: Foreign, images: NDArray[np.float32]) -> None:
    """The gain is what the definition says, and what was said below a step is said in many."""
    proto = made(foreign)
    model, found = lifted(proto, images)
    before = values(model, images, "r", "s")
    gain = HEARD * steps(before["r"]) / steps(before["s"])
    assert found.gain == pytest.approx(gain, rel=1e-5)
    assert (found.channels, found.hidden) == (1, 1)
    assert [np.flatnonzero(k).tolist() for k in found.exponents.values()] == [[5]]
    assert found.left[0] < GAIN
    said = values(model, bright(images), "r", "y")
    assert 0 < said["r"][:, 5].max() < steps(before["r"]) / 2
    equalize(model, found.exponents)
    again = values(model, bright(images), "r", "y")
    assert again["r"][:, 5].max() > 30 * steps(before["r"])
    np.testing.assert_allclose(again["y"], said["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_file_says_what_float_says(
    bits: int, foreign: Foreign, images: NDArray[np.float32], tmp_path: Path
) -> None:
    """Without it the first answer misses what the hidden channel adds. The codes are held against the same float."""
    path = tmp_path / "m.onnx"
    onnx.save(made(foreign), path)
    data, shown = Dataset.from_arrays(images, None, "images"), bright(images)
    wanted = values(prepare(onnx.load(path)), shown, "y")["y"]
    off = {}
    for lift in (False, True):
        out = tmp_path / f"{lift}.onnx"
        found = efrapq.defend(path, out, bits=bits, edge_bits=8, calib=data, lift=lift)
        assert (EQUALIZED_KEY in found.quantized.metadata) is lift
        assert ("lifted" in found.evidence["calibration"]) is found.evidence["settings"].get("lift", False) is lift
        document = efrapq.verify(out, data=data, float_model=path).document
        assert document["codes"]["match"] is True
        assert document["kernels"]["float"] == 0
        if lift:
            assert document["amplified"] == []
        else:
            [layer] = document["amplified"]
            assert (layer["channels"], layer["channel"]) == (1, 5)
            assert any("answers one step of channel 5" in note for note in document["notes"])
            assert efrapq_inspect(out)["amplified"] == [layer]
        off[lift] = float(np.abs(run(onnx.load(out), {"x": shown})["y"] - wanted)[:, 0].mean())
    assert off[True] < {8: 0.1, 4: 0.5}[bits] * off[False]


def test_what_a_file_amplifies_is_told_by_its_codes_and_grids(
    foreign: Foreign, images: NDArray[np.float32], tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(made(foreign), path)
    done = efrapq.defend(path, bits=8, calib=Dataset.from_arrays(images, None, "images"), lift=False, stress=False)
    [found] = amplifying_layers(done.quantized)
    quantized = done.quantized
    name = found.layer
    layer = next(layer for layer in quantized.layers if layer.name == name)
    behind = next(iter(layer.node.outputs[0].uses())).node.outputs[0].name
    ratio = quantized.activations[layer.input].scale / quantized.activations[behind].scale
    assert found.steps == pytest.approx(HEARD * ratio, rel=0.01)
    assert amplifying_layers(quantized, 1.5 * found.steps) == []
    assert len(amplifying_layers(quantized, 0.0)) == 3


def test_a_chain_is_lifted_from_its_end(foreign: Foreign, images: NDArray[np.float32]) -> None:
    """Two in a row that amplify a little less each: the first one is lifted by what both make of it."""
    model, found = lifted(made(foreign, heard=8.0, third=8.0), images)
    first, second = (found.exponents[name].max() for name in ("a", "c"))
    reached = values(model, images, "r", "s", "t")
    gains = 8 * steps(reached["r"]) / steps(reached["s"]), 8 * steps(reached["s"]) / steps(reached["t"])
    assert second == np.ceil(8 * np.log2(gains[1]))
    assert first == np.ceil(8 * np.log2(gains[0]) + second)


def test_a_little_is_left_as_it_is_unless_a_chain_makes_it_much(foreign: Foreign, images: NDArray[np.float32]) -> None:
    """Each of two channels at rest is amplified less than fourfold, and what the first says sevenfold by both."""
    assert lifted(made(foreign, heard=2.0), images)[1].channels == 0
    model, found = lifted(made(foreign, heard=2.0, third=2.0), images)
    reached = values(model, images, "r", "s", "t")
    gains = 2 * steps(reached["r"]) / steps(reached["s"]), 2 * steps(reached["s"]) / steps(reached["t"])
    assert max(gains) < 4
    assert {name: int(k.max()) for name, k in found.exponents.items()} == {"a": np.ceil(8 * np.log2(np.prod(gains)))}


def test_bits_are_no_gain(foreign: Foreign, images: NDArray[np.float32], tmp_path: Path) -> None:
    """A step of a grid of four bits is worth seventeen of one of eight, and that amplifies nothing."""
    wide, narrow = (lifted(made(foreign, heard=3.0), images, act_bits=bits)[1] for bits in (8, 4))
    assert wide.gain == narrow.gain
    assert wide.left == narrow.left
    path, data = tmp_path / "m.onnx", Dataset.from_arrays(images, None, "images")
    onnx.save(made(foreign), path)
    options: dict[str, Any] = {"calib": data, "lift": False, "stress": False, "act_range": "minmax"}
    told = [amplifying_layers(efrapq.defend(path, act_bits=bits, **options).quantized) for bits in (8, 4)]
    assert told[0][0].steps == pytest.approx(told[1][0].steps, rel=0.02)


def test_half_a_step_fills_the_grid_at_most(foreign: Foreign, images: NDArray[np.float32]) -> None:
    """However loud it is heard: what was lost below half a step is on the grid, which is 510 halves wide."""
    _, found = lifted(made(foreign, heard=1e6), images)
    [k] = [int(exponents[5]) for exponents in found.exponents.values()]
    assert 2 ** (k / 8) <= 510 < 2 ** ((k + 1) / 8)
    assert found.left[0] > GAIN


def test_a_clip_limits_it(foreign: Foreign, images: NDArray[np.float32]) -> None:
    """What may reach further elsewhere is not lifted so far that the Clip would cut it off at once."""
    _, found = lifted(made(foreign, act="Clip(a, zero, six)"), images)
    assert max(k.max() for k in found.exponents.values()) == 40
    assert found.left[0] > GAIN


def test_a_channel_that_says_something_fills_its_grid_at_most(foreign: Foreign, images: NDArray[np.float32]) -> None:
    """A channel that says as good as the same of all images; by its weights it should be lifted further."""
    model, found = lifted(made(foreign, rest=0.5), images)
    assert (found.channels, found.hidden) == (1, 0)
    before = values(model, images, "r")["r"]
    equalize(model, found.exponents)
    after = values(model, images, "r")["r"]
    assert before.max() / 1.1 < after[:, 5].max() <= before.max()
    assert found.left[0] > GAIN


def test_it_says_what_it_lifts_and_warns_of_what_hides(
    foreign: Foreign, images: NDArray[np.float32], tmp_path: Path
) -> None:
    """Channels that say something, and dead ones that nobody would hear much of, are no reason for a warning."""
    data = Dataset.from_arrays(images, None, "images")
    cases: list[tuple[dict[str, float], bool]] = [
        ({}, False),
        ({"rest": 0.5, "heard": 2000.0}, True),
        ({"heard": 5.0}, False),
    ]
    for changed, left in cases:
        path, reporter = tmp_path / "m.onnx", Recorder()
        onnx.save(made(foreign, **changed), path)
        efrapq.defend(path, bits=8, calib=data, reporter=reporter)
        said = [text for text in reporter.notes if "lifted" in text]
        warned = [text for text in reporter.warnings if "say nothing on the calibration images" in text]
        assert (len(said), len(warned)) == ((1, 0) if changed else (0, 1))
        # What fills its grid and is amplified as before cannot be helped.
        assert any("channels are amplified" in text for text in reporter.warnings) is left


def test_ordinary_networks_are_left_alone(foreign: Foreign, images: NDArray[np.float32], tmp_path: Path) -> None:
    """Byte for byte."""
    path = tmp_path / "m.onnx"
    onnx.save(made(foreign, said=1.0, heard=0.5), path)
    data = Dataset.from_arrays(images, None, "images")
    one, other = (efrapq.defend(path, calib=data, lift=lift) for lift in (True, False))
    assert one.data == other.data
    assert "lifted" not in one.evidence["calibration"]


def test_float_activations_and_arrays_are_none_of_it(
    foreign: Foreign, images: NDArray[np.float32], tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(made(foreign), path)
    alone = efrapq.defend(path, calib=Dataset.from_arrays(images, None, "images"), act_bits=32)
    assert EQUALIZED_KEY not in alone.quantized.metadata
    assert EQUALIZED_KEY not in efrapq.defend(path, calib={"x": images}).quantized.metadata


GROUPED = """
g (float[n, 3, 8, 8] x) => (float[n, 5] y) {
  a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1)
  r = Relu(a)
  b = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 8> (r, w2)
  s = Relu(b)
  c = Conv <kernel_shape = [1, 1], group = 2> (s, w3)
  t = Relu(c)
  f = Flatten(t)
  y = Gemm <transB = 1> (f, w4)
}"""


def test_gains_are_counted_by_channel_whatever_reads_them(foreign: Foreign, images: NDArray[np.float32]) -> None:
    """By loops over all weights, for depthwise and grouped convolutions and behind a Flatten."""
    shapes = {"w1": (8, 3, 3, 3), "w2": (8, 1, 3, 3), "w3": (6, 4, 1, 1), "w4": (5, 6 * 64)}
    rng = np.random.default_rng(2)
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model = prepare(foreign(GROUPED, given))
    layers, _ = find_layers(model.graph)
    gains = _Gains(model, layers, place(model.graph, layers, 8), [torch.from_numpy(images)], torch.device("cpu"))
    step = {name: steps(value) for name, value in values(model, images, *"rsty").items()}
    expected = {"a": np.zeros(8), "b": np.zeros(8), "c": np.zeros(6)}
    for c in range(8):
        expected["a"][c] = np.abs(given["w2"][c]).sum() * step["r"] / step["s"]
    for o in range(6):
        for i in range(4):
            heard = abs(float(given["w3"][o, i, 0, 0])) * step["s"] / step["t"]
            expected["b"][4 * (o // 3) + i] = max(expected["b"][4 * (o // 3) + i], heard)
    for c in range(6):
        rows = np.abs(given["w4"][:, 64 * c : 64 * (c + 1)]).sum(1)
        expected["c"][c] = rows.max() * step["t"] / step["y"]
    for span in gains.spans:
        np.testing.assert_allclose(gains._gain(span, {}), expected[span.name], rtol=1e-4)


@pytest.mark.parametrize("spoilt", ["dead", "infinite"])
def test_what_has_no_range_is_no_reason_to_lift(spoilt: str, foreign: Foreign, images: NDArray[np.float32]) -> None:
    """Nothing is behind a listener on any image, or no image is finite: the first has no grid, the second no steps."""
    given = weights()
    if spoilt == "dead":
        given["b2"][:] = -1e6
    else:
        images = np.full_like(images, np.inf)
    _, found = lifted(foreign(NETWORK.replace("ACT", "Relu(a)"), given), images)
    assert found.channels == 0


def test_both_scalings_go_on_once(foreign: Foreign, images: NDArray[np.float32], tmp_path: Path) -> None:
    """--equalize leaves a channel at rest where it is; both together are one record, and the proof holds."""
    path, out = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(made(foreign), path)
    data = Dataset.from_arrays(images, None, "images")
    found = efrapq.defend(path, out, bits=8, calib=data, equalize=True)
    assert found.evidence["calibration"]["lifted"]["hidden"] == 1
    assert efrapq.verify(out, data=data, float_model=path).document["codes"]["match"] is True
    assert efrapq.defend(path, bits=8, calib=data, equalize=True).data == out.read_bytes()


def test_exponents_add_up_and_saturate() -> None:
    one = {"a": np.array([1, 100, -100], np.int8), "b": np.array([2], np.int8)}
    other = {"a": np.array([3, 100, -100], np.int8), "c": np.array([-5], np.int8)}
    both = combined(one, other)
    assert {name: k.tolist() for name, k in both.items()} == {"a": [4, 127, -128], "b": [2], "c": [-5]}
    assert all(k.dtype == np.int8 for k in both.values())
