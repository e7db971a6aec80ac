"""The streaming pass on networks small enough to redo by hand, and against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from efrapq.graph.layers import find_layers, weight_array
from efrapq.graph.placement import place
from efrapq.graph.prepare import prepare
from efrapq.progress import Silent
from efrapq.rounding import Coordinate, Relaxed
from efrapq.stream import PassSettings, streaming_pass

Quantize = Callable[..., Any]


@pytest.fixture
def network(request: pytest.FixtureRequest, residual_net: Any, varied_net: Any) -> onnx.ModelProto:
    return {"residual": residual_net, "varied": varied_net}[request.param]()


NETWORK = pytest.mark.parametrize("network", ["residual", "varied"], indirect=True)


def reference_nearest(
    weight: NDArray[np.float32], axis: int, bits: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Round to nearest with one scale per index of `axis`, which is what the file can hold."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    qmax = 2 ** (bits - 1) - 1
    scale = np.abs(weight).max(axis=others) / np.float32(qmax)
    shape = [1] * weight.ndim
    shape[axis] = -1
    return np.clip(np.rint(weight / scale.reshape(shape)), -qmax, qmax).astype(np.int64), scale


def values_in_ort(
    model: ir.Model, names: list[str], x: NDArray[np.float32], run_ort: Callable[..., Any]
) -> dict[str, NDArray[np.float32]]:
    """Inner values of a float model, by ONNX Runtime."""
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    inner = [n for n in names if n != proto.graph.input[0].name]
    proto.graph.output.extend(helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in inner)
    values = dict(zip(inner, run_ort(proto, x, optimized=False), strict=True))
    return values | ({proto.graph.input[0].name: x} if proto.graph.input[0].name in names else {})


@NETWORK
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_without_a_solver_the_codes_are_nearest(
    quantize: Quantize, images: Any, network: onnx.ModelProto, bits: int
) -> None:
    q = quantize(network, images(16), bits=bits, edge_bits=8)
    for i, layer in enumerate(q.layers):
        wanted = 8 if i in (0, len(q.layers) - 1) else bits
        weight = q.solved.weights[layer.name]
        codes, scale = reference_nearest(weight_array(q.model.graph, layer), layer.channel_axis, wanted)
        assert (weight.bits, weight.axis) == (wanted, layer.channel_axis)
        assert np.array_equal(weight.scale, scale)
        assert np.array_equal(weight.codes, codes)
        assert weight.codes.dtype == np.int8


@NETWORK
def test_activation_grids_are_those_of_the_float_network(
    quantize: Quantize, images: Any, run_ort: Callable[..., Any], network: onnx.ModelProto
) -> None:
    x = images(16)
    q = quantize(network, x, act_bits=4)
    values = values_in_ort(q.model, list(q.placement.grids), x, run_ort)
    assert set(q.solved.activations) == set(q.placement.grids) | set(q.placement.same)
    for name, bits in q.placement.grids.items():
        grid = q.solved.activations[name]
        low, high = min(float(values[name].min()), 0.0), max(float(values[name].max()), 0.0)
        assert grid.bits == bits
        assert grid.scale == pytest.approx((high - low) / (2**bits - 1), rel=1e-5)
        assert abs(grid.zero_point + low / grid.scale) <= 0.5 + 1e-3
    for name in q.placement.same:
        assert q.solved.activations[name] == q.solved.activations[q.placement.source(name)]


@NETWORK
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_bits", [4, 8, 32])
def test_coordinate_is_never_worse_than_nearest(
    quantize: Quantize, images: Any, network: onnx.ModelProto, bits: int, act_bits: int
) -> None:
    q = quantize(network, images(24), bits=bits, act_bits=act_bits, solver=Coordinate(lambda_e=0))
    for report in q.solved.reports:
        assert report.loss <= report.loss_nearest
    # What coarse activations cost, no rounding of weights wins back; without them the gain is plain.
    gained = [r.loss < (0.9 if act_bits == 32 else 1.0) * r.loss_nearest for r in q.solved.reports]
    assert sum(gained) >= 3


@NETWORK
def test_report_figures(quantize: Quantize, images: Any, run_ort: Callable[..., Any], network: onnx.ModelProto) -> None:
    """Flips and the losses before and after, again from the codes and the data, in NumPy."""
    x = images(24)
    q = quantize(network, x, act_bits=32, solver=Coordinate(lambda_e=1e-3))
    assert [r.name for r in q.solved.reports] == [layer.name for layer in q.layers]
    outputs = values_in_ort(q.model, [layer.output for layer in q.layers], x, run_ort)
    so_far = q.model.clone()
    for layer, report in zip(q.layers, q.solved.reports, strict=True):
        weight = weight_array(q.model.graph, layer)
        solved = q.solved.weights[layer.name]
        nearest, scale = reference_nearest(weight, layer.channel_axis, report.bits)
        assert report.op_type == layer.op_type
        assert report.shape == weight.shape
        assert (report.scale_min, report.scale_max) == (float(scale.min()), float(scale.max()))
        assert report.flipped == pytest.approx(100 * (solved.codes != nearest).mean(), abs=1e-4)
        assert np.abs(solved.codes - nearest).max() <= 1
        y = outputs[layer.output].astype(float)
        rows = y.size // (weight.shape[layer.channel_axis] * (layer.groups if layer.op_type == "ConvTranspose" else 1))
        assert report.rows == rows
        assert report.seconds > 0
        # The layers before are solved, this one is rounded: its output against the float network's.
        for loss, codes in ((report.loss_nearest, nearest), (report.loss, solved.codes)):
            real = solved.replace_codes(codes.astype(np.int8)).dequantized()
            so_far.graph.initializers[layer.weight].const_value = ir.tensor(real)
            y_hat = values_in_ort(so_far, [layer.output], x, run_ort)[layer.output]
            expected = ((y_hat - y) ** 2).sum() / rows
            assert loss == pytest.approx(expected, rel=1e-2, abs=1e-6 * float((y**2).sum() / rows))


def test_flips_of_depthwise_layers_are_counted(quantize: Quantize, images: Any, varied_net: Any) -> None:
    """One output a group: nearest and the solution must be two tensors, or nothing ever looks flipped."""
    q = quantize(varied_net(), images(24), solver=Coordinate(lambda_e=1e6))
    report = next(r for r in q.solved.reports if r.name == "depthwise")
    assert report.flipped > 50
    assert report.loss > 1.5 * report.loss_nearest


@NETWORK
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("lambda_e", [None, 1e-3], ids=["nearest", "coordinate"])
def test_the_quantized_stream_is_what_onnxruntime_computes(
    quantize: Quantize,
    images: Any,
    run_ort: Callable[..., Any],
    network: onnx.ModelProto,
    act_bits: int,
    lambda_e: float | None,
) -> None:
    x = images(32)
    solver = None if lambda_e is None else Coordinate(lambda_e=lambda_e)
    q = quantize(network, x, act_bits=act_bits, solver=solver)
    last = q.layers[-1]
    step = q.solved.activations[last.input].scale
    # What one step in every input of the last layer can do; a single step does far less.
    weight = q.solved.weights[last.name].dequantized()
    one_step = step * np.abs(weight).sum(axis=1 - last.channel_axis).max()
    float_output = run_ort(ir.to_proto(q.model), x)[0]
    for optimized in (True, False):
        output = run_ort(q.export(), x, optimized=optimized)[0]
        assert np.abs(output - q.output).max() <= one_step
    # The bound is worth something: quantization itself moves the output by more.
    assert np.abs(float_output - q.output).max() > one_step / 4
    # And off-by-one steps are rare.
    assert np.median(np.abs(run_ort(q.export(), x)[0] - q.output)) <= 1e-5


@NETWORK
@pytest.mark.parametrize("chunk", [1, 5, 24])
def test_chunks_do_not_change_the_codes(quantize: Quantize, images: Any, network: onnx.ModelProto, chunk: int) -> None:
    """When all rows are used. (A subset of positions is drawn per chunk, so there other rows are seen.)"""
    whole = quantize(network, images(24), solver=Coordinate(lambda_e=1e-3))
    parts = quantize(network, images(24), solver=Coordinate(lambda_e=1e-3), chunk=chunk)
    different = total = 0
    for name, weight in whole.solved.weights.items():
        assert np.array_equal(weight.scale, parts.solved.weights[name].scale)
        different += int((weight.codes != parts.solved.weights[name].codes).sum())
        total += weight.codes.size
    # Sums in another order decide a tie differently now and then.
    assert different <= 0.002 * total
    assert {r.name: r.rows for r in whole.solved.reports} == {r.name: r.rows for r in parts.solved.reports}


def test_the_same_inputs_give_the_same_bytes(quantize: Quantize, images: Any, residual_net: Any) -> None:
    first, second = (quantize(residual_net(), images(24), solver=Coordinate(), rows=4, chunk=8) for _ in range(2))
    assert first.quantized.digest == second.quantized.digest
    assert first.export().SerializeToString(deterministic=True) == second.export().SerializeToString(deterministic=True)


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_are_capped(quantize: Quantize, images: Any, residual_net: Any, rows: int) -> None:
    q = quantize(residual_net(), images(24), solver=Coordinate(lambda_e=0), rows=rows)
    for layer, report in zip(q.layers, q.solved.reports, strict=True):
        inputs = int(np.prod(report.shape[1:])) if layer.op_type == "Conv" else report.shape[1]
        if layer.op_type == "Conv":
            assert rows * inputs <= report.rows < rows * inputs + 24
        else:
            assert report.rows == 24
    # Fewer rows still find a better rounding than nearest, judged on all of them.
    everything = quantize(residual_net(), images(24))
    assert q.solved.reports[1].loss < everything.solved.reports[1].loss_nearest


def test_relaxed_solver_in_the_stream(quantize: Quantize, images: Any, residual_net: Any) -> None:
    solver = Relaxed(lambda_e=0, steps=150, learning_rate=2e-2, batch=16)
    q = quantize(residual_net(), images(24), solver=solver)
    assert sum(r.flipped for r in q.solved.reports) > 0
    for layer, report in zip(q.layers, q.solved.reports, strict=True):
        nearest, _ = reference_nearest(weight_array(q.model.graph, layer), layer.channel_axis, report.bits)
        assert np.abs(q.solved.weights[layer.name].codes - nearest).max() <= 1
    again = quantize(residual_net(), images(24), solver=solver)
    assert q.quantized.digest == again.quantized.digest


def test_relaxed_solver_on_transposed_and_grouped_layers(quantize: Quantize, images: Any, varied_net: Any) -> None:
    """With a huge lambda every movable weight goes to its other side, in the layout of each operator."""
    q = quantize(varied_net(), images(8), solver=Relaxed(lambda_e=1e6, error="relative", steps=250, learning_rate=0.1))
    for layer, report in zip(q.layers, q.solved.reports, strict=True):
        weight = weight_array(q.model.graph, layer)
        nearest, scale = reference_nearest(weight, layer.channel_axis, report.bits)
        shape = [1] * weight.ndim
        shape[layer.channel_axis] = -1
        u = weight / scale.reshape(shape)
        clear = (np.abs(u - np.rint(u)) > 0.02) & (np.abs(u) < 2 ** (report.bits - 1) - 1)
        flipped = np.where(u > nearest, nearest + 1, nearest - 1)
        assert np.array_equal(q.solved.weights[layer.name].codes[clear], flipped[clear])


def test_huge_lambda_flips_all_layers_in_their_layout(quantize: Quantize, images: Any, varied_net: Any) -> None:
    q = quantize(varied_net(), images(8), solver=Coordinate(lambda_e=1e9))
    for layer, report in zip(q.layers, q.solved.reports, strict=True):
        weight = weight_array(q.model.graph, layer)
        nearest, scale = reference_nearest(weight, layer.channel_axis, report.bits)
        shape = [1] * weight.ndim
        shape[layer.channel_axis] = -1
        u = weight / scale.reshape(shape)
        clear = (np.abs(u - np.rint(u)) > 1e-3) & (np.abs(u) < 2 ** (report.bits - 1) - 1)
        flipped = np.where(u > nearest, nearest + 1, nearest - 1)
        assert np.array_equal(q.solved.weights[layer.name].codes[clear], flipped[clear])


def test_a_large_bias_on_a_tiny_channel_fits_int32(quantize: Quantize, images: Any, net: Any) -> None:
    """The scale is raised so that the bias keeps its value; without that it would be cut to 2^31 steps."""
    n = net()
    n.op("Relu", n.conv("input", "conv", 3, 4), "relu")
    n.constants["conv.weight"][1] *= np.float32(1e-12)
    n.constants["conv.bias"][1] = 3.0
    q = quantize(n.model(n.conv("relu", "out", 4, 2)), images(8))
    weight = q.solved.weights["conv"]
    step = weight.scale * np.float32(q.solved.activations["input"].scale)
    assert 3.0 / float(step[1]) <= 2**30 * 1.001
    assert (weight.codes[1] == 0).all()
    (codes,) = [t for t in q.export().graph.initializer if t.name == "conv.bias.codes"]
    bias = onnx.numpy_helper.to_array(codes).astype(float) * step
    assert (np.abs(bias - n.constants["conv.bias"]) <= 0.51 * step + 3e-7 * np.abs(bias)).all()


def test_matmul_over_a_sequence(quantize: Quantize, run_ort: Callable[..., Any], make_model: Any) -> None:
    rng = np.random.default_rng(0)
    constants = {
        "up.weight": (rng.standard_normal((6, 10)) / 2).astype(np.float32),
        "down.weight": (rng.standard_normal((10, 4)) / 3).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "up.weight"], ["a"], name="up"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("MatMul", ["b", "down.weight"], ["y"], name="down"),
    ]
    proto = make_model(nodes, {"x": ("N", 7, 6)}, {"y": ("N", 7, 4)}, constants)
    x = rng.standard_normal((20, 7, 6)).astype(np.float32)
    q = quantize(proto, x, edge_bits=4, solver=Coordinate(lambda_e=0))
    assert [r.rows for r in q.solved.reports] == [140, 140]
    assert all(r.loss < r.loss_nearest for r in q.solved.reports)
    assert np.abs(run_ort(q.export(), x)[0] - q.output).max() <= q.solved.activations["b"].scale


def test_public_entry_reports_progress(residual_net: Any, images: Any) -> None:
    class Recording(Silent):
        def __init__(self) -> None:
            super().__init__()
            self.total = 0.0
            self.done: list[tuple[str, float]] = []

        def task(self, description: str, total: float) -> Any:
            self.total = total
            outer = self

            class Bar:
                def __enter__(self) -> Bar:
                    return self

                def __exit__(self, *exc: object) -> None:
                    pass

                def advance(self, note: str = "", units: float = 1.0) -> None:
                    outer.done.append((note, units))

            return Bar()

    model = prepare(residual_net())
    layers, _ = find_layers(model.graph)
    placement = place(model.graph, layers, 8)
    before = {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items()}  # type: ignore[union-attr]
    inputs = [torch.from_numpy(images(8))]
    copies = [c.clone() for c in inputs]
    reporter = Recording()
    solved = streaming_pass(model, layers, placement, inputs, PassSettings(4), reporter)
    assert len(reporter.done) == len(layers)
    assert sum(units for _, units in reporter.done) == pytest.approx(reporter.total)
    assert reporter.done[0][0].startswith("c1")
    assert solved.fallback == ()
    # Neither the model nor the inputs were modified.
    for n, v in model.graph.initializers.items():
        assert np.array_equal(v.const_value.numpy(), before[n])  # type: ignore[union-attr]
    assert torch.equal(inputs[0], copies[0])


def test_activations_that_nothing_reads_are_dropped(residual_net: Any, images: Any, quantize: Quantize) -> None:
    from efrapq.stream.spool import Spool
    from efrapq.stream.walk import Walk

    model = prepare(residual_net())
    layers, _ = find_layers(model.graph)
    floats, quantized = Spool(), Spool()
    chunks = [torch.from_numpy(images(4))]
    Walk(model, layers, place(model.graph, layers, 8), chunks, PassSettings(4), floats, quantized).run(Silent())
    assert floats.names() == quantized.names() == {"logits"}
