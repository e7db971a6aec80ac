"""Ranges by their effect on the outputs, against NumPy, on a network whose outputs ignore its largest values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

import efrapq
from efrapq.calibration.feeds import Feeds
from efrapq.calibration.output_ranges import _Search, choose_limits
from efrapq.calibration.placed import Limits
from efrapq.graph.executor import Executor
from efrapq.graph.layers import find_layers
from efrapq.graph.placement import Placement, place
from efrapq.graph.prepare import prepare
from efrapq.grid import ActivationGrid, activation_grid
from efrapq.progress import Silent
from efrapq.stream import PassSettings, streaming_pass

CHANNELS, LOUD = 4, 3
rng = np.random.default_rng(0)
# The first layer lets everything through, its last channel a hundredfold; no other layer listens to that channel.
FIRST = np.diag([1.0, 1.0, 1.0, 100.0]).astype(np.float32)
SECOND = rng.standard_normal((CHANNELS, CHANNELS)).astype(np.float32)
THIRD = rng.standard_normal((5, CHANNELS)).astype(np.float32)
SECOND[:, LOUD] = THIRD[:, LOUD] = 0
X = rng.uniform(0, 2, (40, CHANNELS, 3, 3)).astype(np.float32)


def network(
    make_model: Callable[..., onnx.ModelProto], loud: float = 1.0, last: tuple[onnx.NodeProto, ...] = ()
) -> ir.Model:
    """x → first → second, added to what came out of first → third."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Conv", ["a", "w2"], ["b"], name="second"),
        helper.make_node("Add", ["a", "b"], ["sum"], name="sum"),
        helper.make_node("Conv", ["sum", "w3"], ["y"], name="third"),
        *last,
    ]
    w1 = FIRST.copy()
    w1[LOUD, LOUD] *= loud
    constants = {f"w{i}": w[:, :, None, None] for i, w in enumerate((w1, SECOND, THIRD), 1)}
    output = {last[-1].output[0]: onnx.TensorProto.INT64} if last else {"y": onnx.TensorProto.FLOAT}
    proto = make_model(nodes, {"x": ("N", CHANNELS, 3, 3)}, dict.fromkeys(output), constants)
    for value in proto.graph.output:
        value.type.tensor_type.elem_type = output[value.name]
    return prepare(proto)


def placed(model: ir.Model) -> Placement:
    return place(model.graph, find_layers(model.graph)[0], 8)


def chosen(model: ir.Model, inputs: list[torch.Tensor] | list[Feeds], memory: int | None = None) -> dict[str, Limits]:
    return choose_limits(model.graph, Executor(model), placed(model), inputs, torch.device("cpu"), memory, Silent())


def outputs(x: NDArray[np.float32], change: str = "", grid: ActivationGrid | None = None) -> NDArray[np.float64]:
    """The network in float64, one of its values on a grid."""

    def on_grid(name: str, value: NDArray[np.float64]) -> NDArray[np.float64]:
        if name != change or grid is None:
            return value
        codes = np.clip(np.rint(value / grid.scale) + grid.zero_point, grid.qmin, grid.qmax)
        return np.asarray((codes - grid.zero_point) * grid.scale, np.float64)

    def layer(weight: NDArray[np.float32], value: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.einsum("oc,nchw->nohw", weight.astype(np.float64), value)

    a = on_grid("a", layer(FIRST, on_grid("x", x.astype(np.float64))))
    total = on_grid("sum", a + on_grid("b", layer(SECOND, a)))
    return layer(THIRD, total)


@pytest.mark.parametrize("value", ["x", "a", "b", "sum"])
@pytest.mark.parametrize(("low", "high"), [(-5, 200), (-3, 3)])
def test_noise_is_the_part_of_the_output_that_moves(
    make_model: Callable[..., onnx.ModelProto], value: str, low: float, high: float
) -> None:
    model = network(make_model)
    pieces = [{"x": torch.from_numpy(X[:8])}, {"x": torch.from_numpy(X[8:12])}]
    search = _Search(model.graph, Executor(model), placed(model), pieces, torch.device("cpu"))
    grid = activation_grid(low, high, 8)
    expected = outputs(X[:12])
    moved = outputs(X[:12], value, grid) - expected
    assert search.noise(value, grid) == pytest.approx((moved**2).sum() / (expected**2).sum(), rel=2e-3)


def test_a_range_does_not_reach_what_no_output_hears(make_model: Callable[..., onnx.ModelProto]) -> None:
    model = network(make_model)
    found = chosen(model, [torch.from_numpy(X)])
    assert found["a"][1] < 6
    assert found["sum"][1] < 20
    # What the outputs do hear is all inside.
    assert found["a"][1] > X[:32, :LOUD].max() * 0.85
    assert "x" not in found


def test_each_end_has_its_own_range(make_model: Callable[..., onnx.ModelProto]) -> None:
    model = network(make_model, loud=-1)
    heard = np.einsum("oc,nchw->nohw", SECOND, X * np.array([1, 1, 1, 0], np.float32)[:, None, None])
    total = heard + X * np.array([1, 1, 1, 0], np.float32)[:, None, None]
    low, high = chosen(model, [torch.from_numpy(X)])["sum"]
    assert total.max() * 0.7 < high < total.max() * 1.5
    assert -100 * X.max() / 4 < low <= total[:, :LOUD].min() * 0.5


def test_files_are_nearer_to_the_float_model(make_model: Callable[..., onnx.ModelProto]) -> None:
    model = network(make_model)
    layers, _ = find_layers(model.graph)
    errors = {}
    for method in ("mse", "output"):
        settings = PassSettings(8, act_range=method)
        solved = streaming_pass(model, layers, placed(model), [torch.from_numpy(X)], settings, Silent())
        values = Executor(model).run({"x": torch.from_numpy(X)}, ["a"])["a"]
        heard = values[:, :LOUD]
        errors[method] = float((solved.activations["a"].fake_quantize(heard) - heard).square().mean())
    assert errors["output"] < errors["mse"] / 100


def test_named_inputs_are_taken_as_they_come(make_model: Callable[..., onnx.ModelProto]) -> None:
    model = network(make_model)
    parts = [torch.from_numpy(part) for part in np.split(X[:32], 4)]
    assert chosen(model, [Feeds({"x": part}, len(part)) for part in parts]) == chosen(model, parts)


def test_only_the_first_samples_are_looked_at(make_model: Callable[..., onnx.ModelProto]) -> None:
    model = network(make_model)
    changed = X.copy()
    changed[32:] *= 1000
    assert chosen(model, [torch.from_numpy(changed)]) == chosen(model, [torch.from_numpy(X)])


def test_little_memory_takes_fewer_samples(make_model: Callable[..., onnx.ModelProto]) -> None:
    model = network(make_model)
    changed = X.copy()
    changed[8:] *= 1000
    assert chosen(model, [torch.from_numpy(changed)], 1) == chosen(model, [torch.from_numpy(X[:8])])


def test_without_a_float_output_nothing_is_chosen(make_model: Callable[..., onnx.ModelProto]) -> None:
    model = network(make_model, last=(helper.make_node("ArgMax", ["y"], ["class"], name="best", axis=1),))
    assert chosen(model, [torch.from_numpy(X)]) == {}


def test_defend_takes_them(make_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    onnx.save(ir.to_proto(network(make_model)), source)
    scales, files = {}, {}
    for method in ("mse", "output", "output again"):
        made = efrapq.defend(source, bits=8, calib={"x": X}, act_range=method.split()[0], target="portable")
        assert made.evidence["settings"]["act_range"] == method.split()[0]
        scales[method], files[method] = made.quantized.activations["a"].scale, made.data
    assert scales["output"] < scales["mse"] / 10
    assert files["output"] == files["output again"]


def test_float_activations_have_no_ranges(make_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    onnx.save(ir.to_proto(network(make_model)), source)
    made = efrapq.defend(source, bits=8, act_bits=32, calib={"x": X}, act_range="output", target="portable")
    assert made.quantized.activations == {}
