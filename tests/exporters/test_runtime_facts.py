"""What ONNX Runtime does with QDQ graphs, one fact a test: the exporters are built on these.

A release of ONNX Runtime that changes one of them fails here, and says which rule of an exporter to look at again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

RUNTIME_ERRORS = r"INVALID_GRAPH|NOT_IMPLEMENTED|INVALID_ARGUMENT|FAIL"


def graph(
    *,
    weight: Any = np.int8,
    cast: bool = False,
    activation: Any = np.uint8,
    clip: bool = False,
    zero_point: int = 0,
    relu: bool = True,
    int32_bias: bool = True,
    op: str = "Conv",
    opset: int = 21,
    scale: float = 0.05,
    weight_zero_point: bool = True,
) -> onnx.ModelProto:
    """x → Q/DQ → layer → [Relu] → Q/DQ → layer, in the form that is asked for."""
    rng = np.random.default_rng(0)
    limit = 7 if weight == ml_dtypes.int4 else 127
    constants: dict[str, NDArray[Any]] = {
        "scale": np.array(scale, np.float32),
        "zero_in": np.array(7 if clip or activation == ml_dtypes.uint4 else 128).astype(activation),
        "zero_out": np.array(zero_point).astype(activation),
        "low": np.array(0, np.uint8),
        "high": np.array(15, np.uint8),
    }
    nodes: list[onnx.NodeProto] = []

    def pair(source: str, zero: str) -> str:
        nodes.append(helper.make_node("QuantizeLinear", [source, "scale", zero], [f"{source}.q"]))
        codes = f"{source}.q"
        if clip:
            nodes.append(helper.make_node("Clip", [codes, "low", "high"], [f"{source}.c"]))
            codes = f"{source}.c"
        nodes.append(helper.make_node("DequantizeLinear", [codes, "scale", zero], [f"{source}.r"]))
        return f"{source}.r"

    def layer(source: str, name: str) -> str:
        shape = (8, 8, 3, 3) if op == "Conv" else (8, 8)
        axis = 0 if op == "Conv" else 1
        constants[f"{name}.w"] = rng.integers(-limit, limit + 1, shape).astype(np.int8).astype(weight)
        constants[f"{name}.s"] = rng.uniform(0.01, 0.02, 8).astype(np.float32)
        codes = f"{name}.w"
        if cast:
            nodes.append(helper.make_node("Cast", [codes], [f"{name}.w8"], to=TensorProto.INT8))
            codes = f"{name}.w8"
        parameters = [codes, f"{name}.s"]
        if weight_zero_point:
            constants[f"{name}.z"] = np.zeros(8, np.int8 if cast else weight)
            parameters.append(f"{name}.z")
        nodes.append(helper.make_node("DequantizeLinear", parameters, [f"{name}.wr"], axis=axis))
        sources = [source, f"{name}.wr"]
        if op != "MatMul":
            if int32_bias:
                constants[f"{name}.b"] = rng.integers(-500, 500, 8).astype(np.int32)
                constants[f"{name}.bs"] = constants[f"{name}.s"] * np.float32(scale)
                nodes.append(helper.make_node("DequantizeLinear", [f"{name}.b", f"{name}.bs"], [f"{name}.br"], axis=0))
                sources.append(f"{name}.br")
            else:
                constants[f"{name}.b"] = rng.standard_normal(8).astype(np.float32)
                sources.append(f"{name}.b")
        nodes.append(helper.make_node(op, sources, [f"{name}.y"], name=name))
        return f"{name}.y"

    y = layer(pair("x", "zero_in"), "first")
    if relu:
        nodes.append(helper.make_node("Relu", [y], ["a"]))
        y = "a"
    y = layer(pair(y, "zero_out"), "second")
    used = {name for node in nodes for name in node.input}
    shape = ["N", 8, 6, 6] if op == "Conv" else ["N", 8]
    proto = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in constants.items() if n in used],
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def inputs(op: str = "Conv") -> NDArray[np.float32]:
    return np.random.default_rng(1).uniform(-2, 3, (3, 8, 6, 6) if op == "Conv" else (3, 8)).astype(np.float32)


@pytest.fixture
def float_layers(
    kernels: Callable[[onnx.ModelProto], Counter[str]], float_kernels: Callable[[Counter[str]], int]
) -> Callable[[onnx.ModelProto], int]:
    """How many of the graph's two layers run on floats. (The second one has a float output, which is no obstacle.)"""
    return lambda proto: float_kernels(kernels(proto))


# A Conv needs a QuantizeLinear behind it; a Gemm and a MatMul do not.
LAST = {"Conv": 1, "Gemm": 0, "MatMul": 0}
OPS = pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])


@OPS
def test_int8_weights_run_on_integers(float_layers: Callable[..., int], op: str) -> None:
    assert float_layers(graph(op=op)) == LAST[op]


def test_a_float_bias_still_fuses_into_a_conv(float_layers: Callable[..., int]) -> None:
    assert float_layers(graph(op="Conv", int32_bias=False)) == LAST["Conv"]


def test_a_float_bias_keeps_a_gemm_with_float_output_on_floats(float_layers: Callable[..., int]) -> None:
    """Before a QuantizeLinear ONNX Runtime rounds the bias to int32 itself; behind a network's last Gemm is none."""
    assert float_layers(graph(op="Gemm", int32_bias=False)) == 1


def test_gemm_needs_a_zero_point_of_its_weight(float_layers: Callable[..., int]) -> None:
    """Zeros may be left out by the standard, but QGemm is chosen only where they are written."""
    assert float_layers(graph(op="Gemm", weight_zero_point=False)) == 2
    assert float_layers(graph(op="Conv", weight_zero_point=False)) == 1


@OPS
def test_int4_weights_through_a_cast_run_on_integers(float_layers: Callable[..., int], op: str) -> None:
    assert float_layers(graph(op=op, weight=ml_dtypes.int4, cast=True)) == LAST[op]


@OPS
def test_plain_int4_weights_run_on_floats(float_layers: Callable[..., int], op: str) -> None:
    """The reason for the Cast. If this fails, ONNX Runtime has learned it, and the Cast may go."""
    assert float_layers(graph(op=op, weight=ml_dtypes.int4)) == 2


def test_the_cast_does_not_change_the_numbers(run_ort: Callable[..., Any]) -> None:
    plain, cast = graph(weight=ml_dtypes.int4), graph(weight=ml_dtypes.int4, cast=True)
    x = inputs()
    a, b = (run_ort(p, x, optimized=False)[0] for p in (plain, cast))
    assert np.array_equal(a, b)


def test_uint4_activations_with_int8_weights_do_not_load(run_ort: Callable[..., Any]) -> None:
    with pytest.raises(Exception, match=RUNTIME_ERRORS):
        run_ort(graph(activation=ml_dtypes.uint4), inputs())


def test_uint4_activations_with_cast_int4_weights_do_not_load(run_ort: Callable[..., Any]) -> None:
    with pytest.raises(Exception, match=RUNTIME_ERRORS):
        run_ort(graph(activation=ml_dtypes.uint4, weight=ml_dtypes.int4, cast=True), inputs())


def test_uint4_activations_with_plain_int4_weights_run_on_floats(float_layers: Callable[..., int]) -> None:
    assert float_layers(graph(activation=ml_dtypes.uint4, weight=ml_dtypes.int4)) == 2


@pytest.mark.parametrize("opset", [17, 19, 20])
def test_int4_needs_opset_21(run_ort: Callable[..., Any], opset: int) -> None:
    with pytest.raises(Exception, match=RUNTIME_ERRORS):
        run_ort(graph(weight=ml_dtypes.int4, opset=opset), inputs())
    run_ort(graph(weight=ml_dtypes.int4, opset=21), inputs())


def test_relu_is_absorbed_only_by_a_grid_that_starts_at_zero(float_layers: Callable[..., int]) -> None:
    assert float_layers(graph(zero_point=0)) == 1
    assert float_layers(graph(zero_point=3)) == 2
    assert float_layers(graph(zero_point=3, relu=False)) == 1


@pytest.mark.parametrize("weight", [np.int8, ml_dtypes.int4], ids=["int8", "int4"])
@pytest.mark.parametrize("op", ["Conv", "Gemm"])
def test_clipped_codes_stay_on_integer_kernels(float_layers: Callable[..., int], op: str, weight: Any) -> None:
    proto = graph(op=op, weight=weight, cast=weight != np.int8, clip=True, scale=0.3)
    assert float_layers(proto) == LAST[op]


def test_clip_on_codes_is_uint4_arithmetic(run_ort: Callable[..., Any]) -> None:
    def quantizer(activation: Any, clip: bool) -> onnx.ModelProto:
        zero = np.array(7).astype(activation)
        nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])]
        if clip:
            nodes.append(helper.make_node("Clip", ["q", "low", "high"], ["c"]))
        nodes.append(helper.make_node("DequantizeLinear", ["c" if clip else "q", "s", "z"], ["y"]))
        constants = {"s": np.array(0.3, np.float32), "z": zero}
        if clip:
            constants |= {"low": np.array(0, np.uint8), "high": np.array(15, np.uint8)}
        proto = helper.make_graph(
            nodes,
            "q",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
            [numpy_helper.from_array(a, n) for n, a in constants.items()],
        )
        return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    x = np.concatenate([np.linspace(-100, 100, 5001), np.arange(-40, 40) * 0.15]).astype(np.float32)
    clipped = run_ort(quantizer(np.uint8, True), x)[0]
    assert np.array_equal(clipped, run_ort(quantizer(ml_dtypes.uint4, False), x)[0])
    expected = (np.clip(np.rint(x / np.float32(0.3)) + 7, 0, 15) - 7).astype(np.float32) * np.float32(0.3)
    assert np.array_equal(clipped, expected)


@pytest.mark.parametrize("weight", [np.int8, ml_dtypes.int4], ids=["int8", "int4"])
def test_optimized_and_plain_differ_by_one_step_at_most(run_ort: Callable[..., Any], weight: Any) -> None:
    """One step of the inner grid, seen through the second layer's nine times eight weights."""
    proto = graph(weight=weight, cast=weight != np.int8)
    weights = next(numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == "second.w")
    scales = next(numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == "second.s")
    reach = 0.05 * (np.abs(weights.astype(float)).sum(axis=(1, 2, 3)) * scales).max()
    x = inputs()
    difference = np.abs(run_ort(proto, x)[0] - run_ort(proto, x, optimized=False)[0])
    assert difference.max() <= reach


@pytest.mark.parametrize("weight", [np.int8, ml_dtypes.int4], ids=["int8", "int4"])
def test_weight_only_matmul_rounds_its_activations(
    run_ort: Callable[..., Any], kernels: Callable[..., Counter[str]], make_model: Callable[..., Any], weight: Any
) -> None:
    """MatMulNBits computes at accuracy level 4 by default: its float input is rounded to int8 block by block."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-7, 8, (64, 32)).astype(np.int8)
    constants = {
        "codes": codes.astype(weight),
        "scale": rng.uniform(0.01, 0.02, 32).astype(np.float32),
        "zero": np.zeros(32, weight),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    proto = make_model(nodes, {"x": ("N", 64)}, {"y": ("N", 32)}, constants, opset=21, ir_version=10)
    assert kernels(proto)["MatMulNBits"] == 1
    x = rng.standard_normal((4, 64)).astype(np.float32)
    exact = x.astype(float) @ (codes * constants["scale"])
    error = np.abs(run_ort(proto, x)[0] - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 2e-2
    assert np.abs(run_ort(proto, x, optimized=False)[0] - exact).max() <= 1e-5


def test_int4_initializers_hold_two_codes_a_byte_low_nibble_first() -> None:
    codes = np.array([1, -2, 7, -7, 3], np.int8)
    tensor = numpy_helper.from_array(codes.astype(ml_dtypes.int4), "w")
    assert tensor.raw_data == bytes([0x1 | 0xE << 4, 0x7 | 0x9 << 4, 0x3])


@pytest.mark.parametrize("act_bits", [8, 4])
def test_signed_activations_keep_integer_kernels_where_the_runtime_leaves_them_signed(
    quantize: Any, residual_net: Any, images: Any, float_kernels: Any, tmp_path: Path, act_bits: int
) -> None:
    """As ONNX Runtime does on ARM. On x86 it first rewrites them to uint8, and a residual network falls apart."""
    proto = quantize(residual_net(), images(24), act_bits=act_bits).export("ort-arm")
    found = {}
    for allowed in ("0", "1"):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.qdqisint8allowed", allowed)
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found[allowed] = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert float_kernels(found["1"]) == 0
    assert (found["1"]["QLinearConv"], found["1"]["QGemm"], found["1"]["QLinearAdd"]) == (3, 1, 1)
    assert float_kernels(found["0"]) > 0
