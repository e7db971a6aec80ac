"""x86 without VNNI: what ONNX Runtime does there with signed weights, and what files for `ort-avx2` do about it.

The first tests run on such a CPU only. Those of the files run anywhere: unsigned weights are the same numbers on all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from efrapq.cpu import describe_cpu
from efrapq.exporters import export_model, lint, read_quantized, remarks
from efrapq.exporters.saturation import saturating_layers

without_vnni = pytest.mark.skipif(
    describe_cpu()[1] is not False, reason="this CPU has VNNI, or is not known to lack it"
)


def outputs(proto: onnx.ModelProto, x: NDArray[Any], *, exact: bool = False, optimized: bool = True) -> NDArray[Any]:
    """The first output as users get it, or with the session option for exact sums, or without optimizations."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: NDArray[Any] = session.run(None, {session.get_inputs()[0].name: x})[0]
    return found


def layer(op: str, code: int, unsigned: bool) -> tuple[onnx.ModelProto, NDArray[np.float32], float]:
    """One layer of 64 inputs, all weights of one code, its input (all at the top of its grid), and its exact output."""
    shift = 128 if unsigned else 0
    kind = np.uint8 if unsigned else np.int8
    shape = {"Conv": (8, 64, 1, 1), "Gemm": (8, 64), "MatMul": (64, 8)}[op]
    axis = 1 if op == "MatMul" else 0
    constants = {
        "x.scale": np.float32(1 / 255),
        "x.zero_point": np.uint8(0),
        "w.codes": np.full(shape, code + shift, kind),
        "w.scale": np.full(8, 1 / 128, np.float32),
        "w.zero_point": np.full(8, shift, kind),
        "y.scale": np.float32(64 / 255),
        "y.zero_point": np.uint8(0),
    }
    attributes = {"transB": 1} if op == "Gemm" else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x.scale", "x.zero_point"], ["x.codes"]),
        helper.make_node("DequantizeLinear", ["x.codes", "x.scale", "x.zero_point"], ["x.real"]),
        helper.make_node("DequantizeLinear", ["w.codes", "w.scale", "w.zero_point"], ["w"], axis=axis),
        helper.make_node(op, ["x.real", "w"], ["y"], **attributes),
        helper.make_node("QuantizeLinear", ["y", "y.scale", "y.zero_point"], ["y.codes"]),
        helper.make_node("DequantizeLinear", ["y.codes", "y.scale", "y.zero_point"], ["out"]),
    ]
    dims = [1, 64, 2, 2] if op == "Conv" else [4, 64]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return proto, np.ones(dims, np.float32), 64 * code / 128


OPS = pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])


@without_vnni
@OPS
def test_signed_weights_saturate_there(op: str) -> None:
    proto, x, right = layer(op, 127, unsigned=False)
    found = outputs(proto, x)
    # Each pair stops at 32,767 of 2·255·127 = 64,770.
    assert found.max() < 0.6 * right
    assert np.abs(outputs(proto, x, optimized=False) - right).max() < 0.3


@without_vnni
@OPS
def test_codes_within_64_do_not(op: str) -> None:
    proto, x, right = layer(op, 64, unsigned=False)
    assert np.abs(outputs(proto, x) - right).max() < 0.3


@without_vnni
@OPS
def test_the_session_option_makes_them_exact(op: str) -> None:
    proto, x, right = layer(op, 127, unsigned=False)
    assert np.abs(outputs(proto, x, exact=True) - right).max() < 0.3


@OPS
def test_unsigned_weights_are_exact_and_on_integer_kernels(op: str, kernels: Any, float_kernels: Any) -> None:
    proto, x, right = layer(op, 127, unsigned=True)
    assert np.abs(outputs(proto, x) - right).max() < 0.3
    assert float_kernels(kernels(proto)) == 0


@without_vnni
@pytest.mark.parametrize("bits", [8, 4])
def test_a_whole_network_is_exact(bits: int, residual_net: Any, quantize: Any, images: Any) -> None:
    x = images(24)
    solved = quantize(residual_net(), x, bits=bits)
    plain = outputs(solved.export("ort-x86"), x, optimized=False)
    step = max(grid.scale for grid in solved.quantized.activations.values())
    assert np.abs(outputs(solved.export("ort-avx2"), x) - plain).max() <= 1.5 * step
    if bits == 8:
        assert np.abs(outputs(solved.export("ort-x86"), x) - plain).max() > 1.5 * step


def unsigned_weights(proto: onnx.ModelProto) -> set[str]:
    return {
        t.name.removesuffix(".codes") for t in proto.graph.initializer if t.data_type == TensorProto.UINT8 and t.dims
    }


@pytest.mark.parametrize("bits", [8, 7, 4])
def test_only_what_can_saturate_is_unsigned(bits: int, residual_net: Any, quantize: Any, images: Any) -> None:
    solved = quantize(residual_net(), images(24), bits=bits)
    proto = solved.export("ort-avx2")
    named = {layer.name: layer.weight for layer in solved.quantized.layers}
    codes = {name for name in unsigned_weights(proto) if not name.endswith("zero_point")}
    assert codes == {named[s.layer] for s in saturating_layers(solved.quantized)}
    assert lint(proto, "ort-avx2") == []
    assert remarks(solved.quantized, "ort-avx2") == []


@pytest.mark.parametrize("bits", [8, 4])
def test_the_numbers_are_those_of_ort_x86(bits: int, varied_net: Any, quantize: Any, images: Any) -> None:
    """Bit for bit without optimizations, and on as many integer kernels with them."""
    x = images(8)
    solved = quantize(varied_net(), x, bits=bits)
    files = [solved.export(target) for target in ("ort-x86", "ort-avx2")]
    one, two = (outputs(proto, x, optimized=False) for proto in files)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_kernels_are_as_many(
    bits: int, residual_net: Any, quantize: Any, images: Any, kernels: Callable[..., Any], float_kernels: Any
) -> None:
    solved = quantize(residual_net(), images(24), bits=bits)
    assert kernels(solved.export("ort-avx2")) == kernels(solved.export("ort-x86"))
    assert float_kernels(kernels(solved.export("ort-avx2"))) == 0


@pytest.mark.parametrize("bits", [8, 7, 4])
def test_there_and_back_gives_the_same_bytes(bits: int, residual_net: Any, quantize: Any, images: Any) -> None:
    solved = quantize(residual_net(), images(24), bits=bits)
    there = solved.export("ort-avx2")
    read = read_quantized(there)
    assert read.digest == solved.quantized.digest
    assert saturating_layers(read, as_stored=True) == []
    assert saturating_layers(read) == saturating_layers(solved.quantized)
    for target in ("ort-x86", "ort-avx2"):
        again = export_model(read, target).SerializeToString(deterministic=True)
        assert again == solved.export(target).SerializeToString(deterministic=True)


def test_the_rules_name_what_would_saturate(residual_net: Any, quantize: Any, images: Any) -> None:
    broken = lint(quantize(residual_net(), images(24), bits=8).export("ort-x86"), "ort-avx2")
    assert broken
    assert all("a pair of its products can reach" in str(b) for b in broken)
    unsigned = lint(quantize(residual_net(), images(24), bits=8).export("ort-avx2"), "ort-x86")
    assert any("its weight codes are uint8" in str(b) for b in unsigned)
