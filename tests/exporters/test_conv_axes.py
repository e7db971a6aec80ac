"""Convolutions over one and three axes: what ONNX Runtime makes of them, and the whole path from float to the file.

Exported layers are compared with an integer reference in NumPy, code by code.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from efrapq.exporters import PROFILES, lint, read_quantized, remarks
from efrapq.exporters.saturation import saturating_layers
from efrapq.rounding import Coordinate, Relaxed
from efrapq.verification.kernels import report_kernels
from efrapq.verification.session import open_session
from efrapq.verification.shapes import graph_shapes

AXES = pytest.mark.parametrize("axes", [1, 3], ids=["1-D", "3-D"])
WIDTHS = pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)], ids=lambda b: f"W{b[0]}A{b[1]}")
F32 = np.float32


@dataclass(frozen=True)
class Geometry:
    """Of a convolution; spatial fields have a number for each axis."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    group: int = 1
    cin: int = 4
    cout: int = 6

    @property
    def attributes(self) -> dict[str, Any]:
        return {"strides": self.strides, "dilations": self.dilations, "pads": self.pads, "group": self.group}


def products(x: NDArray[np.int64], w: NDArray[np.int64], g: Geometry) -> NDArray[np.int64]:
    """The convolution of integers, (N, C, …) with (M, C/group, …), by its definition."""
    axes = len(g.kernel)
    x = np.pad(x, [(0, 0), (0, 0), *zip(g.pads[:axes], g.pads[axes:], strict=True)])
    spans = [(k - 1) * d + 1 for k, d in zip(g.kernel, g.dilations, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, axis=tuple(range(2, 2 + axes)))
    every = [slice(None, None, step) for step in (*g.strides, *g.dilations)]
    windows = windows[(slice(None), slice(None), *every)]
    inner, outer = w.shape[1], w.shape[0] // g.group
    inside = [1, *range(2 + axes, 2 + 2 * axes)]
    parts = [
        np.tensordot(
            windows[:, i * inner : (i + 1) * inner],
            w[i * outer : (i + 1) * outer],
            axes=(inside, list(range(1, 2 + axes))),
        )
        for i in range(g.group)
    ]
    return np.moveaxis(np.concatenate(parts, -1), -1, 1)


def requantized(
    accumulated: NDArray[np.int64], scale_x: F32, scale_w: NDArray[np.float32], scale_y: F32, zero_point: int
) -> NDArray[np.uint8]:
    """int32 sums → uint8 codes as ONNX Runtime rounds them: float32 products, half to even."""
    step = (scale_x * scale_w / scale_y).astype(F32).reshape(1, -1, *[1] * (accumulated.ndim - 2))
    return np.clip(np.rint(accumulated.astype(F32) * step) + zero_point, 0, 255).astype(np.uint8)


def quantized(x: NDArray[np.float32], scale: F32, zero_point: int) -> NDArray[np.int64]:
    return np.clip(np.rint(x / scale) + zero_point, 0, 255).astype(np.int64) - zero_point


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    axes = draw(st.sampled_from([1, 2, 3]))

    def numbers(low: int, high: int, count: int = axes) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * count))

    inner, outer, group = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 8]))
    return Geometry(
        size=numbers(5, 9),
        kernel=numbers(1, 3),
        strides=numbers(1, 3),
        dilations=numbers(1, 2),
        pads=numbers(0, 3, 2 * axes),
        group=group,
        cin=inner * group,
        cout=outer * group,
    )


# What the runtime does.


def single(g: Geometry, *, relu: bool, cast: bool = False) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """x → Q → DQ → Conv → [Relu] → Q: the output is codes. Returns the constants too."""
    rng = np.random.default_rng(0)
    limit = 7 if cast else 127
    codes = rng.integers(-limit, limit + 1, (g.cout, g.cin // g.group, *g.kernel)).astype(np.int8)
    scale = rng.uniform(0.01, 0.02, g.cout).astype(F32)
    constants: dict[str, NDArray[Any]] = {
        "sx": np.array(0.05, F32), "zx": np.array(131, np.uint8), "sy": np.array(0.2, F32),
        "zy": np.array(0 if relu else 117, np.uint8), "w": codes, "sw": scale, "zw": np.zeros(g.cout, np.int8),
        "b": rng.integers(-900, 900, g.cout).astype(np.int32), "sb": scale * F32(0.05),
    }  # fmt: skip
    make = helper.make_node
    nodes = [
        make("QuantizeLinear", ["x", "sx", "zx"], ["xq"]),
        make("DequantizeLinear", ["xq", "sx", "zx"], ["xr"]),
        make("DequantizeLinear", ["w8" if cast else "w", "sw", "zw"], ["wr"], axis=0),
        make("DequantizeLinear", ["b", "sb"], ["br"], axis=0),
        make("Conv", ["xr", "wr", "br"], ["c"], **g.attributes),
        make("Relu" if relu else "Identity", ["c"], ["a"]),
        make("QuantizeLinear", ["a", "sy", "zy"], ["y"]),
    ]
    held = dict(constants)
    if cast:
        nodes.insert(0, make("Cast", ["w"], ["w8"], to=TensorProto.INT8))
    tensors = [
        helper.make_tensor(n, TensorProto.INT4, a.shape, a.reshape(-1).tolist())
        if cast and n == "w"
        else numpy_helper.from_array(a, n)
        for n, a in constants.items()
    ]
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", g.cin, *g.size])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), held


@given(g=geometries(), relu=st.booleans(), cast=st.booleans())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_convolution_is_one_of_integers(run_ort: Any, kernels: Any, g: Geometry, relu: bool, cast: bool) -> None:
    proto, held = single(g, relu=relu, cast=cast)
    ops: Counter[str] = kernels(proto)
    assert (ops["QLinearConv"], ops["Conv"], ops["FusedConv"]) == (1, 0, 0)
    x = np.random.default_rng(1).uniform(-7, 7, (2, g.cin, *g.size)).astype(F32)
    sums = products(quantized(x, held["sx"], 131), held["w"].astype(np.int64), g)
    sums += held["b"].reshape(1, -1, *[1] * len(g.size))
    expected = requantized(sums, held["sx"], held["sw"], held["sy"], int(held["zy"]))
    (found,) = run_ort(proto, x)
    assert np.array_equal(found, expected)


@AXES
@pytest.mark.parametrize("batch", [1, 5])
def test_a_dynamic_length_stays_dynamic(run_ort: Any, kernels: Any, axes: int, batch: int) -> None:
    g = Geometry((7,) * axes, (3,) * axes, (2,) * axes, (1,) * axes, (1,) * 2 * axes)
    proto, held = single(g, relu=True)
    for index, dim in enumerate(proto.graph.input[0].type.tensor_type.shape.dim):
        if index != 1:
            dim.dim_param = f"d{index}"
    assert kernels(proto)["QLinearConv"] == 1
    for length in (3, 8):
        x = np.random.default_rng(length).uniform(-7, 7, (batch, g.cin, *(length,) * axes)).astype(F32)
        sums = products(quantized(x, held["sx"], 131), held["w"].astype(np.int64), g)
        sums += held["b"].reshape(1, -1, *[1] * axes)
        assert np.array_equal(run_ort(proto, x)[0], requantized(sums, held["sx"], held["sw"], held["sy"], 0))


# From the float network to the file.


def constants_of(proto: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


@given(g=geometries(), bits=st.sampled_from([8, 4]), same=st.sampled_from(["", "SAME_UPPER", "SAME_LOWER", "VALID"]))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_exported_layer_computes_its_codes(
    make_model: Any, quantize: Any, run_ort: Any, g: Geometry, bits: int, same: str
) -> None:
    """The codes behind the layer's Relu, from the codes, scales and zero points that the file holds.

    Where the runtime was to choose the padding (auto_pad), it is that of the ONNX specification.
    """
    rng = np.random.default_rng(3)
    attributes = dict(g.attributes)
    if same:
        attributes["auto_pad"] = same
        del attributes["pads"]
        g = Geometry(g.size, g.kernel, g.strides, g.dilations, padding(g, same), g.group, g.cin, g.cout)
    weights = {
        "first.weight": rng.standard_normal((g.cout, g.cin // g.group, *g.kernel)).astype(F32),
        "first.bias": rng.standard_normal(g.cout).astype(F32),
        "last.weight": rng.standard_normal((2, g.cout, *(1,) * len(g.size))).astype(F32),
    }
    nodes = [
        helper.make_node("Conv", ["input", "first.weight", "first.bias"], ["c"], **attributes),
        helper.make_node("Relu", ["c"], ["a"]),
        helper.make_node("Conv", ["a", "last.weight"], ["y"]),
    ]
    proto = make_model(nodes, {"input": ("N", g.cin, *g.size)}, {"y": None}, weights)
    x = rng.standard_normal((6, g.cin, *g.size)).astype(F32)
    made = quantize(proto, x, bits=bits, edge_bits=bits)
    assert [layer.name for layer in made.layers] == ["first", "last"]
    exported = made.export("ort-x86")
    onnx.checker.check_model(exported, full_check=True)
    (relu,) = (n for n in exported.graph.node if n.op_type == "Relu")
    (codes,) = (
        n.output[0] for n in exported.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == relu.output[0]
    )
    exported.graph.output.append(helper.make_tensor_value_info(codes, TensorProto.UINT8, None))

    solved, grids, held = made.solved.weights["first"], made.solved.activations, constants_of(exported)
    assert np.array_equal(held["first.weight.codes"].astype(np.int8), solved.codes)
    sums = products(
        quantized(x, F32(grids["input"].scale), grids["input"].zero_point), solved.codes.astype(np.int64), g
    )
    sums += held["first.bias.codes"].reshape(1, -1, *[1] * len(g.size))
    expected = requantized(sums, F32(grids["input"].scale), solved.scale, F32(grids["a"].scale), grids["a"].zero_point)
    assert np.array_equal(run_ort(exported, x)[1], expected)


def padding(g: Geometry, mode: str) -> tuple[int, ...]:
    """begins and ends by the specification of auto_pad."""
    if mode == "VALID":
        return (0,) * 2 * len(g.size)
    totals = [
        max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, s, k, d in zip(g.size, g.strides, g.kernel, g.dilations, strict=True)
    ]
    less, more = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    return less + more if mode == "SAME_UPPER" else more + less


def close_to_solved(made: Any, output: NDArray[np.float32]) -> None:
    """The runtime computes what the pass computed, to within steps of rounding that go either way."""
    step = made.solved.activations[made.layers[-1].input].scale
    reach = step * np.abs(made.solved.weights[made.layers[-1].name].dequantized()).sum(axis=1).max()
    difference = np.abs(output - made.output)
    assert np.median(difference) <= reach / 8
    assert difference.max() <= 2 * reach


@AXES
@WIDTHS
def test_a_network_runs_on_integers(
    block_over: Any, smooth: Any, quantize: Any, run_ort: Any, kernels: Any, float_kernels: Any, axes: int, bits: Any
) -> None:
    x = smooth(axes, 24)
    made = quantize(block_over(axes), x, bits=bits[0], act_bits=bits[1], solver=Coordinate())
    proto = made.export("ort-x86")
    ops: Counter[str] = kernels(proto)
    assert float_kernels(ops) == 0
    assert (ops["QLinearConv"], ops["QGemm"], ops["QLinearAdd"], ops["QLinearMul"]) == (5, 1, 1, 1)
    assert (ops["QLinearAveragePool"], ops["QLinearGlobalAveragePool"]) == (1, 2)
    assert (ops["QuantizeLinear"], ops["DequantizeLinear"]) == (1, 0)
    close_to_solved(made, run_ort(proto, x)[0])
    assert run_ort(proto, smooth(axes, 3, seed=7))[0].shape == (3, 5)


@pytest.mark.parametrize("axes", [1, 2, 3], ids=["1-D", "2-D", "3-D"])
def test_costs_are_those_of_the_float_network(block_over: Any, smooth: Any, quantize: Any, axes: int) -> None:
    """For one sample, pools and layouts of the runtime's own between the layers."""
    proto = block_over(axes, transposed=True)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    g = onnx.shape_inference.infer_shapes(proto).graph
    dims = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in g.value_info}
    weights = {t.name: t.dims for t in g.initializer}
    expected = 5 * 6
    for node in g.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            meets = node.output[0] if node.op_type == "Conv" else node.input[0]
            expected += int(np.prod(dims[meets]) * np.prod(weights[node.input[1]][1:]))
    exported = quantize(block_over(axes, transposed=True), smooth(axes, 8), bits=8).export("ort-x86")
    optimized = open_session(exported.SerializeToString(), threads=1).optimized
    assert report_kernels(optimized, graph_shapes(exported, optimized)).macs == expected


@AXES
@pytest.mark.parametrize("target", sorted(PROFILES))
def test_every_target_takes_it(
    block_over: Any, smooth: Any, quantize: Any, run_ort: Any, axes: int, target: str
) -> None:
    """Its rules hold, the codes come back, and ONNX Runtime computes the same numbers with it."""
    x = smooth(axes, 24)
    made = quantize(block_over(axes, transposed=True), x, bits=4)
    proto = made.export(target)
    assert lint(proto, target) == []
    assert read_quantized(proto).digest == made.quantized.digest
    output = np.concatenate([run_ort(proto, x[i : i + 1], optimized=False)[0] for i in range(len(x))])
    if target == "tensorrt":  # on grids of its own
        assert np.linalg.norm(output - made.output) <= 0.1 * np.linalg.norm(made.output)
    else:
        close_to_solved(made, output)


@AXES
def test_transposed_convolutions_are_solved_and_run_in_float(
    block_over: Any, smooth: Any, quantize: Any, kernels: Any, float_kernels: Any, axes: int
) -> None:
    """As those over two axes: the weight is codes, one scale for each channel that its groups share."""
    made = quantize(block_over(axes, transposed=True), smooth(axes, 24), bits=4, solver=Coordinate())
    ops: Counter[str] = kernels(made.export("ort-x86"))
    assert ops["ConvTranspose"] == float_kernels(ops) == 1
    assert ops["QLinearConv"] == 5
    up = made.solved.weights["up"]
    assert up.codes.shape == (8, 3, *(3,) * axes)
    assert (up.scale.shape, up.axis, up.bits) == ((3,), 1, 4)
    assert np.abs(up.codes).max() <= 7


@AXES
@pytest.mark.parametrize("solver", [Coordinate(lambda_e=0.0), Relaxed(steps=30)], ids=["coordinate", "relaxed"])
def test_rounding_is_chosen_for_the_layer_s_output(
    block_over: Any, smooth: Any, quantize: Any, axes: int, solver: Any
) -> None:
    """Not further from the float output than rounding to nearest, layer by layer, and within one step of it."""
    x = smooth(axes, 24)
    made = quantize(block_over(axes, transposed=True), x, bits=4, edge_bits=4, solver=solver)
    nearest = quantize(block_over(axes, transposed=True), x, bits=4, edge_bits=4)
    for report in made.solved.reports:
        if isinstance(solver, Coordinate):
            assert report.loss <= report.loss_nearest
        difference = np.abs(
            made.solved.weights[report.name].codes.astype(int) - nearest.solved.weights[report.name].codes
        )
        assert difference.max() <= 1
    assert any(report.flipped > 0 for report in made.solved.reports)


@pytest.mark.parametrize("rows", [1, 4, 10**6])
@AXES
def test_moments_from_a_part_of_the_positions(
    block_over: Any, smooth: Any, quantize: Any, axes: int, rows: int
) -> None:
    """At most so many rows for each input of an output channel, a little more to have as many of every sample."""
    x = smooth(axes, 24)
    made = quantize(block_over(axes), x, bits=4, rows=rows, chunk=7, solver=Coordinate())
    for layer, report in zip(made.layers, made.solved.reports, strict=True):
        if layer.op_type != "Conv":
            continue
        inputs = int(np.prod(report.shape[1:]))
        assert report.rows % len(x) == 0
        assert report.rows < rows * inputs + len(x)
        assert report.rows >= min(rows * inputs, len(x))


@AXES
def test_saturation_is_judged_in_both_orders_of_the_weights(
    net_over: Any, smooth: Any, quantize: Any, axes: int
) -> None:
    """Neighbours in memory with channels last are of two channels, with channels first of two places."""
    n = net_over(axes)
    y = n.conv(n.op("Relu", [n.conv("input", "first", 3, 4, pads=1)], "a1"), "last", 4, 2)
    proto = n.model(y)
    across = np.zeros((2, 4, *(3,) * axes), F32)
    across[:, 1:3, 0] = 1  # two channels at one place, far from one another with channels first
    for tensor in proto.graph.initializer:
        if tensor.name == "last.weight":
            tensor.CopyFrom(numpy_helper.from_array(across, tensor.name))
    made = quantize(proto, smooth(axes, 8), bits=8)
    worst = {found.layer: found.worst for found in saturating_layers(made.quantized)}
    assert worst["last"] == 2 * 127 * 255
    assert any("can saturate" in words for words in remarks(made.quantized, "ort-x86"))
