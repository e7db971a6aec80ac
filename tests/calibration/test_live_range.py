"""Where a value stops to matter, against functions whose flat parts are known, and through a whole quantization."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from efrapq.calibration.live_range import Follower, follower, live_range
from efrapq.calibration.ranges import calibrate
from efrapq.graph.executor import Executor
from efrapq.grid import ActivationGrid

make = helper.make_node
Nodes = list[onnx.NodeProto]
F32 = np.float32
CONSTANTS = {
    "weight": np.eye(3, dtype=F32).reshape(3, 3, 1, 1),
    "three": np.array(3, F32),
    "zero": np.array(0, F32),
    "six": np.array(6, F32),
    "half": np.array(0.5, F32),
    "shift": np.array([0, 10, -5], F32).reshape(1, 3, 1, 1),
    "by_place": np.arange(4, dtype=F32).reshape(1, 1, 2, 2),
    "by_sample": np.arange(2, dtype=F32).reshape(2, 1, 1, 1),
    "root2": np.array(math.sqrt(2), F32),
    "one": np.array(1, F32),
}
HARD_SWISH = [
    make("Add", ["v", "three"], ["a"]),
    make("Clip", ["a", "zero", "six"], ["c"]),
    make("Mul", ["v", "c"], ["m"]),
    make("Div", ["m", "six"], ["y"]),
]
GELU = [
    make("Div", ["v", "root2"], ["d"]),
    make("Erf", ["d"], ["e"]),
    make("Add", ["e", "one"], ["s"]),
    make("Mul", ["v", "s"], ["m"]),
    make("Mul", ["m", "half"], ["y"]),
]
SILU = [make("Sigmoid", ["v"], ["s"]), make("Mul", ["v", "s"], ["y"])]


def behind(
    make_model: Callable[..., onnx.ModelProto], nodes: Nodes, outputs: tuple[str, ...] = ("z",)
) -> tuple[Executor, Follower | None]:
    """What follows v, the output of a convolution; y goes on into another one."""
    nodes = [make("Conv", ["x", "weight"], ["v"]), *nodes, make("Conv", ["y", "weight"], ["z"])]
    model = ir.from_proto(make_model(nodes, {"x": ("N", 3, 2, 2)}, dict.fromkeys(outputs), CONSTANTS))
    executor = Executor(model)
    values = {v.name: v for node in model.graph for v in node.outputs}
    return executor, follower(executor, values["v"], 4)


def range_of(
    make_model: Callable[..., onnx.ModelProto], nodes: Nodes, low: float, high: float, bits: int = 8, *, quantized: bool
) -> tuple[float, float]:
    executor, found = behind(make_model, nodes)
    assert found is not None
    assert found.results == ("y",)
    return live_range(found, executor, low, high, bits, {"y": bits} if quantized else {})


def grid(low: float, high: float, bits: int = 8) -> ActivationGrid:
    """The grid of values in [-300, 246] of which this part matters."""
    values = torch.linspace(-300, 246, 100)
    return calibrate([values], bits, "minmax", limits=(low, high))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("nodes", "flat_below", "flat_above"),
    [
        (HARD_SWISH, -3, None),
        ([make("HardSwish", ["v"], ["y"])], -3, None),
        ([make("HardSigmoid", ["v"], ["y"], alpha=1 / 6)], -3, 3),
        ([make("Clip", ["v", "zero", "six"], ["y"])], 0, 6),
        # The channels end at -13, -3 and +2: all of them have to be flat.
        ([make("Add", ["v", "shift"], ["w"]), make("HardSwish", ["w"], ["y"])], -13, None),
    ],
    ids=["written out", "HardSwish", "HardSigmoid", "Clip", "shifted by channel"],
)
def test_what_is_flat_is_left_out(
    make_model: Callable[..., onnx.ModelProto], nodes: Nodes, flat_below: float, flat_above: float | None, bits: int
) -> None:
    low, high = range_of(make_model, nodes, -300, 246, bits, quantized=False)
    made = grid(low, high, bits)
    ends = [(code - made.zero_point) * made.scale for code in (made.qmin, made.qmax)]
    # The grid's own ends lie in the flat parts, so that what saturates there gives exactly what it gave.
    assert flat_below - 1.01 * made.scale <= ends[0] <= flat_below + 1e-4
    if flat_above is None:
        assert high == 246
    else:
        assert flat_above - 1e-4 <= ends[1] <= flat_above + 1.01 * made.scale


@pytest.mark.parametrize(
    ("nodes", "function"),
    [
        (SILU, lambda x: x / (1 + np.exp(-x))),
        ([make("Sigmoid", ["v"], ["y"])], lambda x: 1 / (1 + np.exp(-x))),
        ([make("Tanh", ["v"], ["y"])], np.tanh),
        (GELU, lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))),
    ],
    ids=["SiLU", "Sigmoid", "Tanh", "GELU"],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_tails_are_left_out_where_the_result_has_no_codes_for_them(
    make_model: Callable[..., onnx.ModelProto],
    nodes: Nodes,
    function: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    bits: int,
) -> None:
    low, high = range_of(make_model, nodes, -40, 30, bits, quantized=True)
    assert -40 < low < 1
    x = np.linspace(-40, 30, 20_001)
    y, cut = function(x), function(np.clip(x, low, high))
    step = (y.max() - y.min()) / (2**bits - 1)
    assert np.abs(y - cut).max() <= 0.26 * step
    # Of a result that stays float, nothing is taken.
    exact = range_of(make_model, nodes, -40, 30, bits, quantized=False)
    assert np.abs(function(np.clip(x, *exact)) - y).max() < 1e-6


def test_without_flat_parts_the_range_stays(make_model: Callable[..., onnx.ModelProto]) -> None:
    for nodes in (
        [make("Mul", ["v", "half"], ["y"])],
        [make("LeakyRelu", ["v"], ["y"], alpha=0.5)],
        [make("Mul", ["v", "zero"], ["y"])],
    ):
        assert range_of(make_model, nodes, -7, 9, quantized=True) == (-7, 9)
    # Nothing lies outside of the flat parts: what the values are does not matter, and nothing is done.
    assert range_of(make_model, HARD_SWISH, -9, -5, quantized=True) == (-9, -5)


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([*HARD_SWISH, make("GlobalAveragePool", ["v"], ["pooled"])], ("z", "pooled")),
        (HARD_SWISH, ("z", "v")),
        ([make("Relu", ["x"], ["other"]), make("Mul", ["v", "other"], ["y"])], ("z",)),
        ([make("MaxPool", ["v"], ["y"], kernel_shape=[1, 1])], ("z",)),
        ([make("Mul", ["v", "by_sample"], ["y"])], ("z",)),
    ],
    ids=["another reader", "an output", "another operand", "another operator", "constants by sample"],
)
def test_a_value_that_others_read_is_left_alone(
    make_model: Callable[..., onnx.ModelProto], nodes: Nodes, outputs: tuple[str, ...]
) -> None:
    _, found = behind(make_model, nodes, outputs)
    assert found is None


def test_a_result_inside_may_be_read_as_well(make_model: Callable[..., onnx.ModelProto]) -> None:
    nodes = [*SILU, make("GlobalAveragePool", ["s"], ["pooled"])]
    executor, found = behind(make_model, nodes, ("z", "pooled"))
    assert found is not None
    assert sorted(found.results) == ["s", "y"]
    assert found.shape == (1, 1, 1)
    low, high = live_range(found, executor, -40, 30, 8, {"s": 8, "y": 8})
    assert -40 < low < -4
    assert high == 30  # y goes on growing where s is flat


def test_constants_by_place(make_model: Callable[..., onnx.ModelProto]) -> None:
    executor, found = behind(make_model, [make("Add", ["v", "by_place"], ["w"]), make("HardSwish", ["w"], ["y"])])
    assert found is not None
    assert found.shape == (1, 2, 2)
    low, _ = live_range(found, executor, -300, 246, 8, {})
    assert -8 < low <= -6


# Through a whole quantization.


def hard_swish_net(net: Callable[..., object]) -> onnx.ModelProto:
    """A convolution whose channels reach far below -3, and HardSwish written out."""
    n = net(5)
    a = n.conv("input", "stem", 3, 8)
    n.constants["stem.weight"] *= np.linspace(1, 60, 8, dtype=F32).reshape(8, 1, 1, 1)
    shifted = n.op("Add", [a, n.constant("three", np.array(3, F32))], "shifted")
    limits = [n.constant("zero", np.array(0, F32)), n.constant("six", np.array(6, F32))]
    product = n.op("Mul", [a, n.op("Clip", [shifted, *limits], "clipped")], "product")
    return n.model(n.op("Div", [product, "six"], "swish"))


def test_the_file_has_the_shorter_grid_and_less_error(net, quantize, images, run_ort, monkeypatch) -> None:
    from efrapq.calibration import placed

    source, x, test = hard_swish_net(net), images(64), images(64, seed=7)
    (expected,) = run_ort(source, test)
    errors, scales = {}, {}
    for name in ("live", "whole"):
        if name == "whole":
            monkeypatch.setattr(placed, "follower", lambda *_: None)
        made = quantize(source, x, bits=8)
        scales[name] = made.quantized.activations["stem"].scale
        (found,) = run_ort(made.export(), test)
        errors[name] = float(np.linalg.norm(found - expected))
        # What was solved is what runs.
        (same,) = run_ort(made.export(), x)
        assert np.abs(same - made.output).max() <= 1.01 * scales[name]
        assert (np.abs(same - made.output) < 1e-3).mean() > 0.999
    assert scales["live"] < 0.6 * scales["whole"]
    assert errors["live"] < 0.8 * errors["whole"]  # the rest comes from the input and the weights
