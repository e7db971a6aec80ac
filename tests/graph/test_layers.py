"""Which nodes are quantized, and the reasons that the others are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from efrapq.errors import BadWeightsError
from efrapq.graph.layers import bias_array, find_layers, weight_array

F32 = np.float32


@pytest.fixture
def graph(make_model: Callable[..., onnx.ModelProto]) -> Callable[..., ir.Graph]:
    """(op, shapes of the constants that follow x, attributes) → a graph of that one node, named `node`."""

    def build(op: str, *constants: Any, x: tuple[Any, ...] = ("N", 4, 8, 8), **attributes: Any) -> ir.Graph:
        rng = np.random.default_rng(0)
        names = ["fc.weight", "fc.bias"][: len(constants)]
        arrays = {
            n: c if isinstance(c, np.ndarray) else np.asarray(rng.standard_normal(c), F32)
            for n, c in zip(names, constants, strict=True)
        }
        node = helper.make_node(op, ["x", *names], ["y"], name="node", **attributes)
        return ir.from_proto(make_model([node], {"x": x}, {"y": None}, arrays)).graph

    return build


QUANTIZED = {
    "Conv": (("Conv", (6, 4, 3, 3), (6,)), {}, 0, 1, True),
    "Conv without bias": (("Conv", (6, 4, 3, 3)), {}, 0, 1, True),
    "Conv in groups": (("Conv", (6, 2, 3, 3), (6,)), {"group": 2}, 0, 2, True),
    "Conv VALID": (("Conv", (6, 4, 3, 3)), {"auto_pad": "VALID"}, 0, 1, True),
    "one-dimensional Conv": (("Conv", (6, 4, 3), (6,)), {}, 0, 1, True),
    "three-dimensional Conv": (("Conv", (6, 2, 3, 1, 3), (6,)), {"group": 2}, 0, 2, True),
    "ConvTranspose": (("ConvTranspose", (4, 3, 2, 2), (6,)), {"group": 2}, 1, 2, False),
    "one-dimensional ConvTranspose": (("ConvTranspose", (4, 6, 2)), {}, 1, 1, False),
    "Gemm": (("Gemm", (4, 5), (5,)), {}, 1, 1, True),
    "Gemm transB": (("Gemm", (5, 4), (5,)), {"transB": 1}, 0, 1, True),
    "Gemm with a row as bias": (("Gemm", (4, 5), (1, 5)), {}, 1, 1, True),
    "MatMul": (("MatMul", (4, 5)), {}, 1, 1, True),
}


@pytest.mark.parametrize("case", QUANTIZED.values(), ids=QUANTIZED.keys())
def test_quantized(graph: Callable[..., ir.Graph], case: Any) -> None:
    (op, *constants), attributes, axis, groups, integer = case
    g = graph(op, *constants, **attributes)
    (layer,), skipped = find_layers(g)
    assert skipped == []
    assert (layer.name, layer.node_name, layer.op_type) == ("fc", "node", op)
    assert (layer.channel_axis, layer.groups, layer.integer) == (axis, groups, integer)
    assert (layer.input, layer.output, layer.weight) == ("x", "y", "fc.weight")
    assert weight_array(g, layer).shape == constants[0]
    bias = bias_array(g, layer)
    if len(constants) == 1:
        assert layer.bias is None
        assert bias is None
    else:
        assert bias is not None
        assert bias.shape == (int(np.prod(constants[1])),)


SKIPPED = {
    "four-dimensional Conv": (("Conv", (6, 4, 3, 3, 3, 3)), {}, "over one to three axes are quantized, this one has 4"),
    "Conv over nothing": (("Conv", (6, 4)), {}, "this one has 0"),
    "SAME_UPPER": (("Conv", (6, 4, 3, 3)), {"auto_pad": "SAME_UPPER"}, "auto_pad"),
    "output_shape": (("ConvTranspose", (4, 3, 2, 2)), {"output_shape": [9, 9]}, "output_shape"),
    "transA": (("Gemm", (4, 5)), {"transA": 1}, "transA"),
    "alpha": (("Gemm", (4, 5), (5,)), {"alpha": 2.0}, "alpha or beta"),
    "beta": (("Gemm", (4, 5), (5,)), {"beta": 0.5}, "alpha or beta"),
    "scalar bias": (("Gemm", (4, 5), (1,)), {}, "one number per output"),
    "scalar bias without a shape": (("Gemm", (4, 1), ()), {}, "one number per output"),
    "a column as bias": (("Gemm", (4, 5), (5, 1)), {}, "one number per output"),
    "a bias of its own for each row": (("Gemm", (4, 5), (5, 5)), {}, "one number per output"),
    "batched constant": (("MatMul", (2, 4, 5)), {}, "3-dimensional"),
    "half": (("Conv", np.ones((6, 4, 3, 3), np.float16)), {}, "float16"),
    "double": (("MatMul", np.ones((4, 5))), {}, "float64"),
    "empty": (("MatMul", np.ones((4, 0), F32)), {}, "empty"),
}


@pytest.mark.parametrize("case", SKIPPED.values(), ids=SKIPPED.keys())
def test_skipped_with_a_reason(graph: Callable[..., ir.Graph], case: Any) -> None:
    (op, *constants), attributes, reason = case
    layers, (skipped,) = find_layers(graph(op, *constants, **attributes))
    assert layers == []
    assert (skipped.node_name, skipped.op_type) == ("node", op)
    assert reason in skipped.reason


def two_inputs(make_model: Callable[..., onnx.ModelProto], order: list[str]) -> ir.Graph:
    node = helper.make_node("MatMul", order, ["y"], name="node")
    inputs = {n: ("N", 4, 4) for n in ("a", "b") if n in order}
    return ir.from_proto(make_model([node], inputs, {"y": None}, {"w": np.ones((4, 4), F32)})).graph


@pytest.mark.parametrize(
    ("order", "reason"),
    [(["a", "b"], "computed at run time"), (["w", "a"], "first operand"), (["w", "w"], "first input")],
    ids=["attention", "weight first", "constants"],
)
def test_matmul_without_a_constant_second(
    make_model: Callable[..., onnx.ModelProto], order: list[str], reason: str
) -> None:
    layers, (skipped,) = find_layers(two_inputs(make_model, order))
    assert layers == []
    assert reason in skipped.reason


def test_bias_computed_at_run_time(make_model: Callable[..., onnx.ModelProto]) -> None:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="node")
    proto = make_model([node], {"x": ("N", 4), "b": (5,)}, {"y": None}, {"w": np.ones((4, 5), F32)})
    _, (skipped,) = find_layers(ir.from_proto(proto).graph)
    assert "bias" in skipped.reason


def test_a_weight_that_is_a_graph_input_with_a_default_is_no_constant(
    make_model: Callable[..., onnx.ModelProto],
) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="node")
    proto = make_model([node], {"x": ("N", 4), "w": (4, 5)}, {"y": None}, {"w": np.ones((4, 5), F32)})
    layers, (skipped,) = find_layers(ir.from_proto(proto).graph)
    assert layers == []
    assert "run time" in skipped.reason


def test_operators_of_other_domains_are_not_ours_and_named(make_model: Callable[..., onnx.ModelProto]) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="node", domain="com.example")
    proto = make_model([node], {"x": ("N", 4)}, {"y": None}, {"w": np.ones((4, 5), F32)})
    layers, (skipped,) = find_layers(ir.from_proto(proto).graph)
    assert layers == []
    assert (skipped.node_name, skipped.op_type) == ("node", "Conv")
    assert "com.example" in skipped.reason


def test_order_and_names(residual_net: Any, varied_net: Any) -> None:
    for proto, names in (
        (residual_net(), ["c1", "c2", "c3", "logits"]),
        (varied_net(), ["stem", "depthwise", "dilated", "grouped", "up", "head"]),
    ):
        layers, skipped = find_layers(ir.from_proto(proto).graph)
        assert [layer.name for layer in layers] == names
        assert skipped == []


def test_a_weight_without_a_module_path_takes_the_node_s_name(make_model: Callable[..., onnx.ModelProto]) -> None:
    node = helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/head/MatMul")
    constants = {"onnx::MatMul_7": np.ones((4, 5), F32)}
    (layer,), _ = find_layers(ir.from_proto(make_model([node], {"x": ("N", 4)}, {"y": None}, constants)).graph)
    assert layer.name == "/head/MatMul"


COLLIDING = {
    # (node name, weight) of each layer, and the names they get.
    "a module path before a node's name": ([("x", "w"), ("n", "x.weight")], ["w", "x"]),
    "the weight's name taken too": ([("x", "w"), ("n", "x.weight"), ("w", "v")], ["w_1", "x", "w"]),
    "numbers": ([("x", "w"), ("n", "x.weight"), ("w", "v"), ("w_1", "u")], ["w_2", "x", "w", "w_1"]),
    "no collision": ([("x", "w"), ("n", "y.weight")], ["x", "y"]),
}


@pytest.mark.parametrize(("pairs", "names"), COLLIDING.values(), ids=COLLIDING.keys())
@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "backwards"])
def test_no_two_layers_go_by_one_name(
    make_model: Callable[..., onnx.ModelProto], pairs: list[tuple[str, str]], names: list[str], backwards: bool
) -> None:
    """Whatever the order of the nodes: in an exported file it is another one."""
    nodes = [helper.make_node("MatMul", ["x", w], [f"y{i}"], name=n) for i, (n, w) in enumerate(pairs)]
    outputs = {f"y{i}": None for i in range(len(pairs))}
    if backwards:
        nodes.reverse()
    constants = {w: np.ones((4, 5), F32) for _, w in pairs}
    layers, _ = find_layers(ir.from_proto(make_model(nodes, {"x": ("N", 4)}, outputs, constants)).graph)
    assert [layer.name for layer in layers] == (names[::-1] if backwards else names)


def test_readers_of_one_weight_have_names_of_their_own(make_model: Callable[..., onnx.ModelProto]) -> None:
    nodes = [helper.make_node("MatMul", ["x", "fc.weight"], [f"y{i}"], name=f"n{i}") for i in range(3)]
    outputs = {f"y{i}": None for i in range(3)}
    proto = make_model(nodes, {"x": ("N", 4)}, outputs, {"fc.weight": np.ones((4, 5), F32)})
    layers, _ = find_layers(ir.from_proto(proto).graph)
    assert [layer.name for layer in layers] == ["fc", "fc.weight", "fc.weight_1"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["weight", "bias"])
def test_values_that_no_grid_holds_are_named(residual_net: Any, value: float, where: str) -> None:
    proto = residual_net()
    for tensor in proto.graph.initializer:
        if tensor.name == f"logits.{where}":
            array = numpy_helper.to_array(tensor).copy()
            array.flat[3] = value
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    with pytest.raises(BadWeightsError, match=f"logits.*{where}"):
        find_layers(ir.from_proto(proto).graph)
