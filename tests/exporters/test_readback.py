"""Files that quantize in a way efrapq does not write are refused in words, not read as something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from efrapq.errors import UnsupportedModelError
from efrapq.exporters import export_model, read_quantized

F32 = np.float32


def qdq(
    *,
    codes: NDArray[Any] | None = None,
    scale: NDArray[Any] | None = None,
    zero_point: NDArray[Any] | None = None,
    weight_attributes: dict[str, int] | None = None,
    cast: bool = False,
    x_scale: NDArray[Any] | None = None,
    x_zero: NDArray[Any] | None = None,
    x_scale_back: NDArray[Any] | None = None,
    x_zero_back: NDArray[Any] | None = None,
    clip: tuple[int, int] | None = None,
    bias: NDArray[Any] | None = None,
    bias_zero: NDArray[Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> onnx.ModelProto:
    """x (N, 4) → Q → [Clip] → DQ → MatMul/Gemm with weight (4, 6) → y. All but what is given is readable."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-7, 8, (4, 6)).astype(np.int8) if codes is None else codes
    constants: dict[str, NDArray[Any]] = {
        "codes": codes,
        "scale": np.full(6, 0.1, F32) if scale is None else scale,
        "x_scale": np.array(0.05, F32) if x_scale is None else x_scale,
        "x_zero": np.array(128, np.uint8) if x_zero is None else x_zero,
    }
    constants["x_scale_back"] = constants["x_scale"] if x_scale_back is None else x_scale_back
    constants["x_zero_back"] = constants["x_zero"] if x_zero_back is None else x_zero_back
    weight_inputs = ["codes", "scale"]
    if zero_point is not None:
        constants["zero_point"] = zero_point
        weight_inputs.append("zero_point")
    nodes = []
    if cast:
        nodes.append(helper.make_node("Cast", ["codes"], ["cast"], name="cast", to=TensorProto.INT8))
        weight_inputs[0] = "cast"
    attributes = {"axis": 1} if weight_attributes is None else weight_attributes
    nodes.append(helper.make_node("DequantizeLinear", weight_inputs, ["fc.weight"], name="dq_weight", **attributes))
    nodes.append(helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x.q"], name="q", axis=1))
    source = "x.q"
    if clip is not None:
        constants["low"], constants["high"] = (np.array(v).astype(constants["x_zero"].dtype) for v in clip)
        nodes.append(helper.make_node("Clip", ["x.q", "low", "high"], ["x.c"], name="clip"))
        source = "x.c"
    nodes.append(
        helper.make_node("DequantizeLinear", [source, "x_scale_back", "x_zero_back"], ["x.r"], name="dq", axis=1)
    )
    inputs = ["x.r", "fc.weight"]
    if bias is not None:
        constants["bias"], constants["bias_scale"] = bias, np.full(6, 0.005, F32)
        names = ["bias", "bias_scale"]
        if bias_zero is not None:
            constants["bias_zero"] = bias_zero
            names.append("bias_zero")
        nodes.append(helper.make_node("DequantizeLinear", names, ["fc.bias"], name="dq_bias", axis=0))
        inputs.append("fc.bias")
    nodes.append(helper.make_node("MatMul" if bias is None else "Gemm", inputs, ["y"], name="fc"))
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 6])],
        [numpy_helper.from_array(a, n) for n, a in constants.items() if n in used],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(proto, metadata or {})
    return proto


def ramp(dtype: Any) -> NDArray[Any]:
    return np.arange(24).reshape(4, 6).astype(np.int16).clip(0, 15).astype(dtype)


CODES4 = (ramp(np.int8) - 7).astype(ml_dtypes.int4)
BY_INPUT = np.linspace(0.05, 0.2, 12, dtype=F32).reshape(2, 6)
BY_OUTPUT = np.linspace(0.05, 0.2, 12, dtype=F32).reshape(4, 3)

READABLE = {
    "plain": {},
    "a written zero point": {"zero_point": np.zeros(6, np.int8)},
    "one scale for all": {"scale": np.array(0.1, F32)},
    "a negative axis": {"weight_attributes": {"axis": -1}},
    "equal scales along the inputs": {"weight_attributes": {"axis": 0}, "scale": np.full(4, 0.1, F32)},
    "blocks along the inputs": {
        "scale": BY_INPUT,
        "zero_point": np.zeros((2, 6), np.int8),
        "weight_attributes": {"axis": 0, "block_size": 2},
    },
    "int4": {"codes": CODES4},
    "int4 through a cast": {"codes": CODES4, "cast": True},
    "the whole of int8": {"codes": np.full((4, 6), -128, np.int8)},
    "a bias": {"bias": np.arange(6, dtype=np.int32)},
    "a bias with a zero point of 0": {"bias": np.arange(6, dtype=np.int32), "bias_zero": np.zeros(6, np.int32)},
    "clipped codes": {"x_zero": np.array(7, np.uint8), "clip": (0, 15)},
    "uint4 activations": {"x_zero": np.array(7).astype(ml_dtypes.uint4)},
    "signed activations": {"x_zero": np.array(-3, np.int8)},
    "clipped signed codes": {"x_zero": np.array(-121, np.int8), "clip": (-128, -113)},
    "narrow codes in a wide type": {"metadata": {"efrapq.bits": '{"fc": 4}'}},
}


@pytest.mark.parametrize("change", READABLE.values(), ids=READABLE.keys())
def test_read(run_ort: Callable[..., Any], change: dict[str, Any]) -> None:
    """What is read computes what the file computes: activations on their grid, weights as dequantized."""
    proto = qdq(**change)
    onnx.checker.check_model(proto, full_check=True)
    q = read_quantized(proto)
    (weight,) = q.weights.values()
    (grid,) = q.activations.values()
    assert list(q.activations) == ["x"]
    assert grid.bits == (4 if "clip" in change or "uint4" in str(change.get("x_zero", np.array(0)).dtype) else 8)
    narrow = "int4" in str(change.get("codes", np.zeros(1)).dtype) or "metadata" in change
    assert weight.container_bits == (4 if narrow else 8)
    x = np.random.default_rng(1).uniform(-8, 8, (5, 4)).astype(F32)
    steps = np.clip(np.rint(x / F32(grid.scale)) + grid.zero_point, grid.qmin, grid.qmax) - grid.zero_point
    expected = (steps.astype(F32) * F32(grid.scale)) @ weight.dequantized()
    if "bias" in change:
        expected = expected + change["bias"].astype(F32) * F32(0.005)
    assert np.abs(run_ort(proto, x, optimized=False)[0] - expected).max() <= 1e-4
    float_graph = ir.to_proto(q.model)
    assert {node.op_type for node in float_graph.graph.node} <= {"MatMul", "Gemm"}


REFUSED = {
    "asymmetric weights": ({"zero_point": np.array([0, 1, 0, 0, 0, 0], np.int8)}, "asymmetric"),
    "unsigned weights": ({"codes": ramp(np.uint8)}, "unsigned"),
    "unsigned 4-bit weights": ({"codes": ramp(ml_dtypes.uint4)}, "unsigned"),
    "16-bit weights": ({"codes": (ramp(np.int16) * 1000).astype(np.int16)}, "int16"),
    "32-bit weights": ({"codes": ramp(np.int32) * 1000}, "int32"),
    "8-bit floats": ({"codes": ramp(ml_dtypes.float8_e4m3fn)}, "float8"),
    "a cast of something wider": ({"codes": ramp(np.int32), "cast": True}, "int32"),
    "blocks along the outputs": (
        {
            "scale": BY_OUTPUT,
            "zero_point": np.zeros((4, 3), np.int8),
            "weight_attributes": {"axis": 1, "block_size": 2},
        },
        "output channels",
    ),
    "blocks that do not divide": (
        {"scale": BY_INPUT, "weight_attributes": {"axis": 0, "block_size": 3}},
        "blocks of 3 do not divide",
    ),
    "blocks with too few scales": (
        {"scale": BY_INPUT[:1], "weight_attributes": {"axis": 0, "block_size": 2}},
        "do not fit blocks of 2",
    ),
    "scales that do not fit": ({"scale": np.full(4, 0.1, F32)}, "do not fit"),
    "an axis that does not exist": ({"weight_attributes": {"axis": 5}}, "fit"),
    "scales along the inputs": (
        {"weight_attributes": {"axis": 0}, "scale": np.arange(1, 5, dtype=F32)},
        "output channels",
    ),
    "half-precision scales": ({"scale": np.full(6, 0.1, np.float16)}, "float32"),
    "a scale of zero": ({"scale": np.zeros(6, F32)}, "positive"),
    "a negative scale": ({"scale": np.full(6, -0.1, F32)}, "positive"),
    "a scale of NaN": ({"scale": np.full(6, np.nan, F32)}, "positive"),
    "activations per channel": ({"x_scale": np.full(4, 0.05, F32), "x_zero": np.full(4, 3, np.uint8)}, "per-tensor"),
    "16-bit activations": ({"x_zero": np.array(0, np.uint16)}, "UINT16"),
    "signed codes clipped as if unsigned": ({"x_zero": np.array(0, np.int8), "clip": (0, 15)}, "Clip"),
    "another scale on the way back": ({"x_scale_back": np.array(0.07, F32)}, "differ"),
    "another zero point on the way back": ({"x_zero_back": np.array(99, np.uint8)}, "differ"),
    "codes clipped from below": ({"clip": (3, 15)}, "Clip"),
    "codes clipped to no power of two": ({"clip": (0, 12)}, "Clip"),
    "codes clipped to one value": ({"x_zero": np.array(0, np.uint8), "clip": (0, 0)}, "Clip"),
    "codes clipped to one bit": ({"x_zero": np.array(0, np.uint8), "clip": (0, 1)}, "Clip"),
    "codes clipped to what they are": ({"clip": (0, 255)}, "Clip"),
    "an asymmetric bias": ({"bias": np.arange(6, dtype=np.int32), "bias_zero": np.full(6, 5, np.int32)}, "bias"),
    "bits that are no number": ({"metadata": {"efrapq.bits": '{"fc": "four"}'}}, "efrapq.bits"),
    "bits that are no JSON": ({"metadata": {"efrapq.bits": "{"}}, "efrapq.bits"),
    "bits that are a list": ({"metadata": {"efrapq.bits": "[4]"}}, "efrapq.bits"),
    "bits out of range": ({"metadata": {"efrapq.bits": '{"fc": 77}'}}, "efrapq.bits"),
    "bits too few for the codes": ({"metadata": {"efrapq.bits": '{"fc": 2}'}, "codes": CODES4}, "efrapq.bits"),
    "bits that the container cannot hold": (
        {"metadata": {"efrapq.bits": '{"fc": 8}'}, "codes": CODES4},
        "efrapq.bits",
    ),
    "narrow bits for wide codes": (
        {"metadata": {"efrapq.bits": '{"fc": 4}'}, "codes": np.full((4, 6), 8, np.int8)},
        "efrapq.bits",
    ),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        read_quantized(qdq(**change))


def test_a_weight_that_two_layers_share_is_refused() -> None:
    proto = qdq()
    proto.graph.node.append(helper.make_node("MatMul", ["x.r", "fc.weight"], ["z"], name="fc2"))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 6]))
    with pytest.raises(UnsupportedModelError, match="share"):
        read_quantized(proto)


def test_a_quantized_layer_that_would_be_left_float_is_refused() -> None:
    proto = qdq(bias=np.arange(6, dtype=np.int32))
    proto.graph.node[-1].attribute.append(helper.make_attribute("alpha", 2.0))
    with pytest.raises(UnsupportedModelError, match="leave float"):
        read_quantized(proto)


def test_a_float_model_holds_nothing_to_read(residual_net: Callable[..., onnx.ModelProto]) -> None:
    with pytest.raises(UnsupportedModelError, match="no quantized"):
        read_quantized(residual_net())


def rewired(old: str, new: str) -> onnx.ModelProto:
    """The readable file, but that whatever reads `old` reads `new`."""
    proto = qdq()
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new
    return proto


def test_arithmetic_on_codes_is_refused() -> None:
    proto = rewired("x.q", "x.m")
    node = helper.make_node("Max", ["x.q", "x_zero"], ["x.m"], name="relu_on_codes")
    proto.graph.node.insert(2, node)
    with pytest.raises(UnsupportedModelError):
        read_quantized(proto)


def test_codes_as_graph_input_are_refused() -> None:
    proto = rewired("x.q", "x")
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    del proto.graph.node[1]
    with pytest.raises(UnsupportedModelError, match="QuantizeLinear"):
        read_quantized(proto)


def test_codes_as_graph_output_are_refused() -> None:
    proto = qdq()
    proto.graph.output.append(helper.make_tensor_value_info("x.q", TensorProto.UINT8, ["N", 4]))
    with pytest.raises(UnsupportedModelError, match="output"):
        read_quantized(proto)


def test_a_quantized_graph_output_is_refused() -> None:
    """As the tools write it that put a pair behind every value: the output is a DequantizeLinear's."""
    proto = qdq()
    proto.graph.node[-1].output[0] = "y.float"
    for node in (
        helper.make_node("QuantizeLinear", ["y.float", "x_scale", "x_zero"], ["y.q"], name="q_out"),
        helper.make_node("DequantizeLinear", ["y.q", "x_scale", "x_zero"], ["y"], name="dq_out"),
    ):
        proto.graph.node.append(node)
    onnx.checker.check_model(proto, full_check=True)
    with pytest.raises(UnsupportedModelError, match="y: the graph's output itself is quantized"):
        read_quantized(proto)


@pytest.mark.parametrize("names", [["", ""], ["fc", "fc"]], ids=["no names", "one name twice"])
@pytest.mark.parametrize("target", ["ort-x86", "portable"])
def test_nodes_without_a_name_of_their_own(run_ort: Callable[..., Any], names: list[str], target: str) -> None:
    proto = qdq(codes=CODES4)
    second = np.arange(-12, 12).reshape(4, 6).clip(-7, 7).astype(np.int8)
    proto.graph.initializer.append(numpy_helper.from_array(second, "codes2"))
    proto.graph.node.insert(0, helper.make_node("DequantizeLinear", ["codes2", "scale"], ["v2"], axis=1))
    proto.graph.node.append(helper.make_node("MatMul", ["x.r", "v2"], ["z"]))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 6]))
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = {"fc.weight": "v1"}.get(name, name)
        for i, name in enumerate(node.output):
            node.output[i] = {"fc.weight": "v1"}.get(name, name)
    for node in proto.graph.node:
        node.name = ""
    named = onnx.ModelProto.FromString(proto.SerializeToString())
    # ONNX Runtime itself accepts nodes without names, but not two of one name.
    named.graph.node[-2].name, named.graph.node[-1].name = names
    q = read_quantized(named)
    assert len(q.weights) == len(q.layers) == 2
    by_weight = {layer.weight: q.weights[layer.name].codes for layer in q.layers}
    assert np.array_equal(by_weight["v1"], CODES4.astype(np.int8))
    assert np.array_equal(by_weight["v2"], second)
    x = np.random.default_rng(1).uniform(-6, 6, (5, 4)).astype(F32)
    again = export_model(q, target)
    for a, b in zip(run_ort(proto, x, optimized=False), run_ort(again, x, optimized=False), strict=True):
        assert np.abs(a - b).max() <= 1e-4


@pytest.mark.parametrize("parameter", ["scale", "x_scale", "x_zero"])
def test_grids_computed_at_run_time_are_refused(parameter: str) -> None:
    proto = qdq()
    for i, tensor in enumerate(proto.graph.initializer):
        if tensor.name == parameter:
            shape, kind = list(tensor.dims), tensor.data_type
            del proto.graph.initializer[i]
            break
    proto.graph.input.append(helper.make_tensor_value_info(parameter, kind, shape))
    if parameter != "scale":
        proto = qdq_with_one_pair(proto, parameter)
    with pytest.raises(UnsupportedModelError, match=r"constant|run time"):
        read_quantized(proto)


def qdq_with_one_pair(proto: onnx.ModelProto, parameter: str) -> onnx.ModelProto:
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            if name == f"{parameter}_back":
                node.input[i] = parameter
    return proto


def test_a_quantized_constant_that_no_layer_reads_is_refused() -> None:
    proto = qdq()
    proto.graph.node[-1].op_type = "Mul"
    with pytest.raises(UnsupportedModelError, match=r"no Conv, Gemm or MatMul"):
        read_quantized(proto)


def test_reading_does_not_modify_the_file() -> None:
    proto = qdq()
    before = proto.SerializeToString(deterministic=True)
    read_quantized(proto)
    assert proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("target", ["ort-x86", "portable"])
def test_files_of_other_tools_are_exported_again(run_ort: Callable[..., Any], target: str) -> None:
    """A readable file from elsewhere keeps its numbers through another target."""
    proto = qdq(codes=(ramp(np.int8) - 8).astype(ml_dtypes.int4), bias=np.arange(6, dtype=np.int32))
    x = np.random.default_rng(1).uniform(-8, 8, (5, 4)).astype(F32)
    again = export_model(read_quantized(proto), target)
    assert np.abs(run_ort(again, x)[0] - run_ort(proto, x)[0]).max() <= 1e-4


def test_file_without_value_info(solved_w4a4: onnx.ModelProto) -> None:
    """Inner types are not needed: the zero points say what the codes are."""
    stripped = onnx.ModelProto.FromString(solved_w4a4.SerializeToString())
    del stripped.graph.value_info[:]
    assert read_quantized(stripped).activations == read_quantized(solved_w4a4).activations
    assert {g.bits for g in read_quantized(stripped).activations.values()} == {4, 8}


@pytest.fixture
def solved_w4a4(residual_net: Any, quantize: Any, images: Any) -> onnx.ModelProto:
    exported: onnx.ModelProto = quantize(residual_net(), images(8), act_bits=4).export("portable")
    return exported
