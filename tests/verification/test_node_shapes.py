"""Sizes of all values of optimized graphs, against those that they have when ONNX Runtime runs the graph."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper, parser

from efrapq.pipeline import defend
from efrapq.verification.cost import activation_peak
from efrapq.verification.session import open_session
from efrapq.verification.shapes import NCHWC, Shapes, graph_shapes

DYNAMIC = """
    <ir_version: 8, opset_import: ["" : 17]>
    m (float[N, 6, H, W] x) => (float[M, K] y) {
        s = Shape (x)
        n = Slice (s, zero, one)
        rest = Slice (s, one, four)
        product = ReduceProd <keepdims = 1> (rest)
        target = Concat <axis = 0> (n, product)
        rows = Reshape (x, target)
        count = Squeeze (product)
        positions = Range (start, count, step)
        scaled = Cast <to = 1> (positions)
        wide = Expand (scaled, target)
        sum = Add (rows, wide)
        a, b = Split <axis = 1> (sum)
        y = Mul (a, b)
    }
"""


def optimized(proto: onnx.ModelProto) -> onnx.ModelProto:
    return open_session(proto.SerializeToString()).optimized


def run_all(proto: onnx.ModelProto, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Every value that the standard's or the runtime's own operators make, but those in NCHWc, which are padded."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    names = [name for node in copy.graph.node if node.domain != NCHWC for name in node.output if name]
    stated = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in stated)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, feeds), strict=True))


def check(proto: onnx.ModelProto, feeds: dict[str, NDArray[Any]]) -> Shapes:
    graph = optimized(proto)
    shapes = graph_shapes(proto, graph, {name: list(array.shape) for name, array in feeds.items()})
    for name, array in run_all(graph, feeds).items():
        assert shapes.dims.get(name) == array.shape, name
        assert shapes.types.get(name) == helper.np_dtype_to_tensor_dtype(array.dtype), name
    assert activation_peak(graph, shapes) is not None
    return shapes


def test_sizes_that_are_computed_in_the_graph() -> None:
    proto = parser.parse_model(DYNAMIC)
    for name, numbers in (("zero", [0]), ("one", [1]), ("four", [4]), ("start", 0), ("step", 1)):
        proto.graph.initializer.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
    shapes = check(proto, {"x": np.zeros((1, 6, 4, 5), np.float32)})
    assert shapes.dims["y"] == (1, 60)


@pytest.mark.parametrize("form", ["float", "int8", "weight-only", "portable"])
def test_convolutional_networks_in_all_their_layouts(
    residual_net: Any, varied_net: Any, quantize: Any, images: Any, form: str
) -> None:
    """Float convolutions run in NCHWc, integer ones with channels last, and what stands between is moved."""
    for net in (residual_net(), varied_net()):
        if form == "float":
            proto = net
        else:
            made = quantize(net, images(8), **({"act_bits": 32} if form == "weight-only" else {}))
            proto = made.export("portable" if form == "portable" else "ort-x86")
        check(proto, {"input": images(1)})


def test_a_shortcut_that_is_sliced_and_padded(net: Any, quantize: Any, images: Any) -> None:
    """As in ResNet-20 for CIFAR: the runtime moves Slice and Pad behind its transposes, and names no sizes there."""
    n = net()
    a = n.op("Relu", n.conv("input", "c1", 3, 8), "a1")
    b = n.conv(a, "c2", 8, 16, strides=[2, 2])
    starts, ends, axes, steps = (
        n.constant(name, np.array(numbers, np.int64))
        for name, numbers in (("starts", [0, 0]), ("ends", [8, 8]), ("axes", [2, 3]), ("steps", [2, 2]))
    )
    sliced = n.op("Slice", [a, starts, ends, axes, steps], "sliced")
    padded = n.op("Pad", [sliced, n.constant("pads", np.array([0, 4, 0, 0, 0, 4, 0, 0], np.int64))], "padded")
    c = n.op("Relu", n.op("Add", [b, padded], "sum"), "a2")
    proto = n.model(n.gemm(n.op("Flatten", n.op("GlobalAveragePool", c, "gap"), "flat"), "logits", 16, 5))
    for form in (proto, quantize(proto, images(8)).export()):
        check(form, {"input": images(1)})


def test_matrices_that_give_floats_from_integers(quantize: Any, make_model: Callable[..., onnx.ModelProto]) -> None:
    """The runtime's own operator for them records no type: its floats are four times the bytes of what it reads."""
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((16, 24)).astype(np.float32), rng.standard_normal(24).astype(np.float32)
    for op, runs, shape in (("MatMul", "MatMulIntegerToFloat", (6, 16)), ("Gemm", "QGemm", (16,))):
        inputs = ["x", "w", "b"] if op == "Gemm" else ["x", "w"]
        nodes = [helper.make_node(op, inputs, ["p"]), helper.make_node("Softmax", ["p"], ["y"])]
        constants = {"w": weight, "b": bias} if op == "Gemm" else {"w": weight}
        proto = make_model(nodes, {"x": ("N", *shape)}, {"y": None}, constants)
        x = rng.standard_normal((32, *shape)).astype(np.float32)
        made = quantize(proto, x).export()
        assert any(node.op_type == runs for node in optimized(made).graph.node)
        check(made, {"x": x[:1]})


def test_a_size_that_only_the_data_know_is_null(make_model: Callable[..., onnx.ModelProto]) -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["places"]), helper.make_node("Cast", ["places"], ["y"], to=1)]
    proto = make_model(nodes, {"x": (1, 8)}, {"y": None})
    graph = optimized(proto)
    shapes = graph_shapes(proto, graph)
    assert "y" not in shapes.dims
    assert activation_peak(graph, shapes) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is enforced on Linux")
@pytest.mark.parametrize("end", ["", "f = Cast <to = 1> (y) k = ReduceSum <keepdims = 0> (f) w = Add (x, k)"])
def test_numbers_of_any_size_take_no_memory(end: str) -> None:
    """A Range of 2^40 numbers has a size; its numbers are nobody's business."""
    outputs = "float[N, 4] w" if end else "int64[K] y, float[L] z"
    proto = parser.parse_model(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        m (float[N, 4] x) => ({outputs}) {{
            y = Range (start, limit, step)
            z = ConstantOfShape (vast)
            {end}
        }}
        """
    )
    for name, numbers in (("start", 0), ("limit", 1 << 40), ("step", 1), ("vast", [1 << 40])):
        proto.graph.initializer.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
    code = (
        "import resource, sys, onnx\n"
        "from efrapq.verification.shapes import graph_shapes\n"
        "proto = onnx.load_from_string(sys.stdin.buffer.read())\n"
        "graph_shapes(proto, proto)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "dims = graph_shapes(proto, proto).dims\n"
        "assert dims['y'] == dims['z'] == (1 << 40,), dims\n"
    )
    subprocess.run([sys.executable, "-c", code], input=proto.SerializeToString(), check=True, timeout=120)


def test_products_behind_an_operator_that_inference_does_not_know(
    make_model: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    """Sizes go on through the runtime's own operators: what the file itself holds of them, no inference passes."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("BiasGelu", ["x", "b"], ["g"], domain="com.microsoft"),
        helper.make_node("MatMul", ["g", "w"], ["p"]),
        helper.make_node("Softmax", ["p"], ["y"]),
    ]
    constants = {"b": rng.standard_normal(16).astype(np.float32), "w": rng.standard_normal((16, 32)).astype(np.float32)}
    proto = make_model(nodes, {"x": ("N", 6, 16)}, {"y": ("N", 6, 32)}, constants)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    x = rng.standard_normal((32, 6, 16)).astype(np.float32)
    onnx.save(proto, tmp_path / "net.onnx")
    for options, runs in (
        ({"bits": 8}, "MatMulIntegerToFloat"),
        ({"act_bits": 32, "edge_bits": 4, "block": 16}, "MatMulNBits"),
    ):
        made = onnx.load_from_string(defend(tmp_path / "net.onnx", calib={"x": x}, target="ort-x86", **options).data)
        assert any(node.op_type == runs for node in optimized(made).graph.node)
        check(made, {"x": x[:1]})
