"""Where the QuantizeLinear/DequantizeLinear pairs go, graph by graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from efrapq.graph.layers import find_layers
from efrapq.graph.placement import Placement, activation_after, place

F32 = np.float32


def placed(proto: onnx.ModelProto, act_bits: int = 8, edge_bits: int = 8) -> Placement:
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(proto)).graph
    layers, _ = find_layers(graph)
    return place(graph, layers, act_bits, edge_bits)


def without_batchnorm(net: Any) -> onnx.ModelProto:
    n = net()
    a = n.op("Relu", n.conv("input", "c1", 3, 4), "a1")
    b = n.op("Relu", n.conv(a, "c2", 4, 4), "a2")
    d = n.op("Relu", n.op("Add", [n.conv(b, "c3", 4, 4), a], "sum"), "a3")
    e = n.op("MaxPool", d, "pool", kernel_shape=[2, 2], strides=[2, 2])
    f = n.op("Flatten", n.op("GlobalAveragePool", e, "gap"), "flat")
    model: onnx.ModelProto = n.model(n.gemm(f, "logits", 4, 5))
    return model


def test_residual_network(net: Any) -> None:
    """Pairs stand behind the activation functions, at both inputs of the Add, and never at the graph's output."""
    placement = placed(without_batchnorm(net))
    assert list(placement.grids) == ["input", "a1", "a2", "c3", "a3", "gap"]
    assert placement.same == {"pool": "a3", "flat": "gap"}
    assert placement.source("flat") == "gap"
    assert "flat" in placement
    assert "logits" not in placement
    assert "c1" not in placement


def test_four_bit_activations_and_edges(net: Any) -> None:
    placement = placed(without_batchnorm(net), act_bits=4)
    # The last layer reads `flat`, which lives on the grid of `gap`.
    assert placement.grids == {"input": 8, "a1": 4, "a2": 4, "c3": 4, "a3": 4, "gap": 8}
    assert placed(without_batchnorm(net), act_bits=4, edge_bits=4).grids == dict.fromkeys(placement.grids, 4)


def test_edges_never_get_fewer_bits_than_the_rest(net: Any) -> None:
    placement = placed(without_batchnorm(net), act_bits=8, edge_bits=4)
    assert placement.grids == dict.fromkeys(["input", "a1", "a2", "c3", "a3", "gap"], 8)


@pytest.mark.parametrize("act_bits", [32, 64])
def test_float_activations(net: Any, act_bits: int) -> None:
    assert placed(without_batchnorm(net), act_bits=act_bits) == Placement()


def test_concatenation(net: Any) -> None:
    n = net()
    a, b = (n.op("Relu", n.conv("input", f"c{i}", 3, 4), f"a{i}") for i in (1, 2))
    c = n.op("Concat", [a, b, n.op("MaxPool", "input", "pool", kernel_shape=[1, 1])], "cat", axis=1)
    placement = placed(n.model(n.conv(c, "out", 11, 2)))
    assert set(placement.grids) == {"input", "a1", "a2", "cat"}
    assert placement.same == {"pool": "input"}


MOVING = {
    "MaxPool": ("MaxPool", {"kernel_shape": [2, 2]}, []),
    "Flatten": ("Flatten", {}, []),
    "Transpose": ("Transpose", {"perm": [0, 1, 3, 2]}, []),
    "Reshape": ("Reshape", {}, [np.array([0, -1, 4, 4])]),
    "Slice": ("Slice", {}, [np.array([1]), np.array([5]), np.array([2])]),
    "Pad": ("Pad", {}, [np.array([0, 0, 1, 1, 0, 0, 1, 1])]),
    "Pad with zero": ("Pad", {}, [np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.array(0, F32)]),
    "DepthToSpace": ("DepthToSpace", {"blocksize": 2}, []),
}


@pytest.mark.parametrize(("op", "attributes", "constants"), MOVING.values(), ids=MOVING.keys())
def test_moving_operators_share_their_input_s_grid(net: Any, op: str, attributes: Any, constants: Any) -> None:
    n = net()
    a = n.op("Relu", n.conv("input", "c1", 3, 4), "a1")
    names = [n.constant(f"k{i}", c) for i, c in enumerate(constants)]
    n.op(op, [a, *names], "moved", **attributes)
    n.op("Sigmoid", "moved", "out")
    placement = placed(n.model("out"))
    assert placement.same == {"moved": "a1"}
    assert set(placement.grids) == {"input", "a1"}


def test_chains_of_moving_operators_have_one_source(net: Any) -> None:
    n = net()
    a = n.op("MaxPool", n.op("Relu", n.conv("input", "c1", 3, 4), "a1"), "pool", kernel_shape=[2, 2], strides=[2, 2])
    b = n.op("Flatten", n.op("Transpose", a, "turned", perm=[0, 2, 3, 1]), "flat")
    placement = placed(n.model(n.gemm(b, "logits", 64, 3)), act_bits=4)
    assert placement.same == {"pool": "a1", "turned": "pool", "flat": "turned"}
    assert placement.source("flat") == "a1"
    assert placement.grids == {"input": 8, "a1": 8}


@pytest.mark.parametrize(
    ("attributes", "constants"),
    [({"mode": "reflect"}, []), ({}, [np.array(1, F32)])],
    ids=["reflect", "a value that the grid may not hold"],
)
def test_padding_that_is_not_zero_stays_float(net: Any, attributes: Any, constants: Any) -> None:
    n = net()
    a = n.op("Relu", n.conv("input", "c1", 3, 4), "a1")
    names = [n.constant(f"k{i}", c) for i, c in enumerate([np.array([0, 0, 1, 1, 0, 0, 1, 1]), *constants])]
    n.op("Sigmoid", n.op("Pad", [a, *names], "moved", **attributes), "out")
    assert set(placed(n.model("out")).grids) == {"input", "a1"}
    assert not placed(n.model("out")).same


PADDING = {
    "zero": ({}, [np.array(0, F32)], True),
    "no value": ({}, [], True),
    "a value that the grid may not hold": ({}, [np.array(9, F32)], False),
    "reflect": ({"mode": "reflect"}, [], True),
    "edge": ({"mode": "edge"}, [], True),
}


@pytest.mark.parametrize(("attributes", "constants", "shared"), PADDING.values(), ids=PADDING.keys())
def test_padding_before_a_layer(net: Any, attributes: Any, constants: Any, shared: bool) -> None:
    """The layer wants its input on a grid: the one before the Pad only where that holds what is padded with."""
    n = net()
    a = n.op("Relu", n.conv("input", "c1", 3, 4), "a1")
    names = [n.constant(f"k{i}", c) for i, c in enumerate([np.array([0, 0, 1, 1, 0, 0, 1, 1]), *constants])]
    placement = placed(n.model(n.conv(n.op("Pad", [a, *names], "padded", **attributes), "out", 4, 2, pads=[0] * 4)))
    assert placement.same == ({"padded": "a1"} if shared else {})
    assert set(placement.grids) == ({"input", "a1"} if shared else {"input", "a1", "padded"})


def test_padding_with_a_value_computed_at_run_time_has_its_own_grid(net: Any) -> None:
    n = net()
    a = n.op("Relu", n.conv("input", "c1", 3, 4), "a1")
    value = n.op("ReduceMax", a, "peak", keepdims=0)
    pads = n.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    placement = placed(n.model(n.conv(n.op("Pad", [a, pads, value], "padded"), "out", 4, 2, pads=[0] * 4)))
    assert placement.same == {}
    assert "padded" in placement.grids


@pytest.mark.parametrize("source", ["constant", "float"])
def test_moving_operators_of_what_has_no_grid_own_theirs(net: Any, source: str) -> None:
    n = net()
    n.conv("input", "c1", 3, 4)
    value = n.constant("k", np.ones((1, 4, 8, 8), F32)) if source == "constant" else n.op("Sigmoid", "c1", "a1")
    moved = n.op("Transpose", value, "moved", perm=[0, 1, 3, 2])
    placement = placed(n.model(n.op("Add", [n.conv(moved, "c2", 4, 4), "c1"], "out")))
    if source == "constant":
        assert placement.same == {}
        assert set(placement.grids) == {"input", "moved", "c1", "c2"}
    else:
        assert placement.same == {"moved": "a1"}
        assert set(placement.grids) == {"input", "a1", "c1", "c2"}


def test_max_pool_with_indices_stays_float(net: Any) -> None:
    n = net()
    a = n.op("Relu", n.conv("input", "c1", 3, 4), "a1")
    node = onnx.helper.make_node("MaxPool", [a], ["pool", "indices"], name="p", kernel_shape=[2, 2])
    n.nodes.append(node)
    cast = n.op("Cast", "indices", "as_float", to=onnx.TensorProto.FLOAT)
    n.op("Mul", ["pool", cast], "out")
    assert "pool" not in placed(n.model("out"))


def test_an_add_of_a_constant_stays_float(net: Any) -> None:
    n = net()
    a = n.op("Relu", n.conv("input", "c1", 3, 4), "a1")
    b = n.op("Add", [a, n.constant("k", np.ones((1, 4, 1, 1), F32))], "shifted")
    placement = placed(n.model(n.op("Sigmoid", b, "out")))
    assert set(placement.grids) == {"input", "a1"}


# Products of matrices give integers to those who read integers.


def encoder(net: Any) -> onnx.ModelProto:
    """A layer of BERT's without attention: what a matrix gives is added in float, and read by a norm."""
    n = net()
    x = n.op("Flatten", "input", "flat")
    x = n.op("Softmax", n.gemm(x, "g1", 192, 8), "norm1")
    y = n.gemm(n.op("Relu", n.gemm(x, "g2", 8, 16), "wide"), "g3", 16, 8)
    x = n.op("Softmax", n.op("Add", [y, x], "sum"), "norm2")
    model: onnx.ModelProto = n.model(n.gemm(x, "logits", 8, 5))
    return model


def test_what_float_operators_read_of_a_matrix_stays_float(net: Any) -> None:
    placement = placed(encoder(net))
    assert list(placement.grids) == ["input", "norm1", "wide", "norm2"]
    assert placement.same == {"flat": "input"}


def test_a_matrix_gives_integers_to_the_layer_that_reads_them(net: Any) -> None:
    n = net()
    x = n.gemm(n.op("Flatten", "input", "flat"), "g1", 192, 8)
    x = n.op("Reshape", [x, n.constant("shape", np.array([-1, 2, 2, 2]))], "image")
    a = n.conv(x, "c1", 2, 2)
    placement = placed(n.model(n.conv(n.op("Add", [a, x], "sum"), "out", 2, 2)))
    assert list(placement.grids) == ["input", "g1", "c1", "sum"]
    assert placement.same == {"flat": "input", "image": "g1"}


def test_a_sum_of_a_float_is_float(net: Any) -> None:
    n = net()
    a = n.op("Relu", n.conv("input", "c1", 3, 4), "a1")
    y = n.op("Add", [n.conv(a, "c2", 4, 4), n.op("Tanh", a, "t")], "sum")
    assert list(placed(n.model(n.conv(y, "out", 4, 2))).grids) == ["input", "a1", "c2", "sum"]


def attention(net: Any, *, weights: str | None) -> onnx.ModelProto:
    """Queries times keys times values; weights: the operator between the products."""
    n = net()
    flat = n.op("Flatten", "input", "flat")
    shape = n.constant("shape", np.array([-1, 4, 2]))
    q, k, v = (n.op("Reshape", [n.gemm(flat, name, 192, 8), shape], f"{name}.heads") for name in ("q", "k", "v"))
    y = n.op("MatMul", [q, n.op("Transpose", k, "k.t", perm=[0, 2, 1])], "scores")
    y = n.op("MatMul", [y if weights is None else n.op(weights, y, "weights"), v], "mixed")
    model: onnx.ModelProto = n.model(n.gemm(n.op("Flatten", y, "joined"), "logits", 8, 5))
    return model


def test_products_of_integers_are_integer(net: Any) -> None:
    """Of queries and keys; behind a Softmax there are floats, and what meets them need not be rounded."""
    placement = placed(attention(net, weights="Softmax"))
    assert list(placement.grids) == ["input", "q", "k", "mixed"]
    assert placement.same == {"flat": "input", "q.heads": "q", "k.heads": "k", "k.t": "k.heads", "joined": "mixed"}
    placement = placed(attention(net, weights=None))
    assert list(placement.grids) == ["input", "q", "k", "v", "scores", "mixed"]


# Which activation functions a grid absorbs.


def after(net: Any, op: str, *limits: float | None, second_reader: bool = False, output: bool = False) -> str | None:
    n = net()
    c = n.conv("input", "c1", 3, 4)
    names = ["" if v is None else n.constant(f"k{i}", np.array(v, F32)) for i, v in enumerate(limits)]
    y = n.op(op, [c, *names], "act")
    n.op("Add", [y, c], "out") if second_reader else n.op("Sigmoid", y, "out")
    proto = n.model("out")
    if output:
        proto.graph.output.append(onnx.helper.make_tensor_value_info("c1", onnx.TensorProto.FLOAT, None))
    graph = ir.from_proto(proto).graph
    layers, _ = find_layers(graph)
    found = activation_after(layers[0].node.outputs[0])
    return None if found is None else found.op_type


def test_relu_and_zero_based_clip_are_absorbed(net: Any) -> None:
    assert after(net, "Relu") == "Relu"
    assert after(net, "Clip", 0.0, 6.0) == "Clip"
    assert after(net, "Clip", 0.0) == "Clip"


@pytest.mark.parametrize(
    ("op", "limits"),
    [("Clip", (-1.0, 1.0)), ("Clip", (1.0, 6.0)), ("Clip", (None, 6.0)), ("Clip", ()), ("Sigmoid", ()), ("Tanh", ())],
    ids=["around zero", "above zero", "no lower limit", "no limits", "sigmoid", "tanh"],
)
def test_other_functions_are_not(net: Any, op: str, limits: tuple[float | None, ...]) -> None:
    assert after(net, op, *limits) is None


def test_nothing_is_absorbed_past_another_reader_or_an_output(net: Any) -> None:
    assert after(net, "Relu", second_reader=True) is None
    assert after(net, "Relu", output=True) is None


def test_layers_left_float_do_not_ask_for_grids(net: Any) -> None:
    n = net()
    a = n.op("Sigmoid", n.conv("input", "c1", 3, 4), "a1")
    # Its padding depends on the input's size: such a convolution stays float.
    b = n.op("Sigmoid", n.conv(a, "c2", 4, 4, auto_pad="SAME_UPPER"), "a2")
    n.nodes[-2].attribute.remove(next(x for x in n.nodes[-2].attribute if x.name == "pads"))
    proto = n.model(n.conv(b, "c3", 4, 2))
    assert set(placed(proto).grids) == {"input", "c1", "a2"}


def test_transposed_convolutions_read_what_they_are_given(varied_net: Callable[..., onnx.ModelProto]) -> None:
    """No integer kernel exists: its input keeps the grid of the layer before, its output gets none by itself."""
    placement = placed(varied_net())
    assert list(placement.grids) == ["input", "a1", "a2", "a3", "a4", "a5", "gap"]
    assert placement.same == {"flat": "gap"}


# Pointwise operators: integers only between integers.


def squeeze_excite(net: Any, gate: str = "Sigmoid") -> onnx.ModelProto:
    n = net()
    a = n.op("Relu", n.conv("input", "c1", 3, 4), "a1")
    s = n.op("Relu", n.conv(n.op("GlobalAveragePool", a, "gap"), "s1", 4, 2, 1), "s2")
    g = n.op(gate, n.conv(s, "s3", 2, 4, 1), "gate")
    model: onnx.ModelProto = n.model(n.conv(n.op("Mul", [a, g], "scaled"), "out", 4, 2))
    return model


def test_squeeze_excite(net: Any) -> None:
    placement = placed(squeeze_excite(net))
    assert list(placement.grids) == ["input", "a1", "gap", "s2", "s3", "gate", "scaled"]
    assert not placement.same


def test_a_gate_without_an_integer_kernel_keeps_its_product_float(net: Any) -> None:
    assert list(placed(squeeze_excite(net, "HardSigmoid")).grids) == ["input", "a1", "gap", "s2", "s3", "scaled"]


def test_a_gate_keeps_eight_bits(net: Any) -> None:
    grids = placed(squeeze_excite(net), act_bits=4).grids
    assert grids == {"input": 8, "a1": 4, "gap": 4, "s2": 4, "s3": 4, "gate": 8, "scaled": 8}  # the last layer's input
    assert placed(squeeze_excite(net), act_bits=4, edge_bits=4).grids["gate"] == 8


def test_a_gate_that_a_layer_reads_has_the_bits_of_its_inputs(net: Any) -> None:
    n = net()
    g = n.op("Sigmoid", n.conv("input", "c1", 3, 4), "gate")
    y = n.op("Mul", [n.conv(n.op("Transpose", g, "turned", perm=[0, 1, 3, 2]), "c2", 4, 4), g], "scaled")
    placement = placed(n.model(n.conv(y, "out", 4, 2)), act_bits=4)
    assert placement.grids == {"input": 8, "c1": 4, "gate": 4, "c2": 4, "scaled": 8}
    assert placement.same == {"turned": "gate"}


def test_a_reshaped_gate(net: Any) -> None:
    """As networks write it whose gate comes from linear layers."""
    n = net()
    a = n.conv("input", "c1", 3, 4)
    f = n.op("Flatten", n.op("GlobalAveragePool", a, "gap"), "flat")
    g = n.op("Sigmoid", n.gemm(f, "s1", 4, 4), "gate")
    g = n.op("Unsqueeze", [g, n.constant("axes", np.array([2, 3]))], "wide")
    placement = placed(n.model(n.conv(n.op("Relu", n.op("Mul", [a, g], "product"), "a2"), "out", 4, 2)))
    assert list(placement.grids) == ["input", "c1", "gap", "s1", "gate", "a2"]
    assert placement.same == {"flat": "gap", "wide": "gate"}


def test_silu(net: Any) -> None:
    n = net()
    a = n.conv("input", "c1", 3, 4)
    b = n.op("Mul", [a, n.op("Sigmoid", a, "gate")], "silu")
    assert list(placed(n.model(n.conv(b, "out", 4, 2))).grids) == ["input", "c1", "gate", "silu"]


@pytest.mark.parametrize("op", ["Sigmoid", "LeakyRelu"])
def test_what_only_floats_read_stays_float(net: Any, op: str) -> None:
    n = net()
    a = n.op(op, n.conv("input", "c1", 3, 4), "act")
    b = n.op("Mul", [a, n.constant("k", np.array(2, F32))], "doubled")
    assert list(placed(n.model(n.op("Tanh", b, "out"))).grids) == ["input", "c1"]


def test_a_product_with_a_float_stays_float(net: Any) -> None:
    """It would need a QuantizeLinear more than its float form, and its Sigmoid would be rounded for nothing."""
    n = net()
    a = n.conv("input", "c1", 3, 4)
    y = n.op("Mul", [n.op("Mul", [a, n.op("Sigmoid", a, "gate")], "silu"), n.op("Tanh", a, "t")], "product")
    assert list(placed(n.model(n.conv(y, "out", 4, 2))).grids) == ["input", "c1", "product"]


def test_a_product_with_a_constant_stays_float(net: Any) -> None:
    n = net()
    y = n.op("Mul", [n.conv("input", "c1", 3, 4), n.constant("k", np.ones((1, 4, 1, 1), F32))], "scaled")
    assert list(placed(n.model(n.conv(y, "out", 4, 2))).grids) == ["input", "c1", "scaled"]


def test_a_product_at_the_output_stays_float(net: Any) -> None:
    n = net()
    a = n.conv("input", "c1", 3, 4)
    assert list(placed(n.model(n.op("Mul", [a, n.op("Sigmoid", a, "gate")], "out"))).grids) == ["input", "c1"]


# Resize and Split.


@pytest.mark.parametrize(
    ("attributes", "moves"),
    [
        ({"mode": "nearest"}, True),
        ({}, True),
        ({"mode": "linear"}, False),
        ({"mode": "nearest", "coordinate_transformation_mode": "tf_crop_and_resize"}, False),
    ],
    ids=["nearest", "default", "linear", "crops"],
)
def test_only_a_resize_that_repeats_pixels_shares_its_input_s_grid(net: Any, attributes: Any, moves: bool) -> None:
    n = net()
    a = n.op("Relu", n.conv("input", "c1", 3, 4), "a1")
    roi = n.constant("roi", np.array([0, 0, 0, 0, 1, 1, 1, 1], F32))
    b = n.op("Resize", [a, roi, n.constant("scales", np.array([1, 1, 2, 2], F32))], "wide", **attributes)
    placement = placed(n.model(n.conv(b, "out", 4, 2)))
    assert placement.same == ({"wide": "a1"} if moves else {})
    assert list(placement.grids) == (["input", "a1"] if moves else ["input", "a1", "wide"])


def split(net: Any, output: str) -> onnx.ModelProto:
    n = net()
    a = n.op("Relu", n.conv("input", "c1", 3, 4), "a1")
    sizes = n.constant("sizes", np.array([1, 3]))
    n.nodes.append(onnx.helper.make_node("Split", [a, sizes], ["left", "right"], name="split", axis=1))
    c = n.conv("right", "c2", 3, 3)
    return n.model(n.conv(n.op("Concat", [c, "left"], "cat", axis=1), "out", 4, 2) if output == "out" else "left")


def test_all_parts_of_a_split_share_its_input_s_grid(net: Any) -> None:
    placement = placed(split(net, "out"))
    assert placement.same == {"left": "a1", "right": "a1"}
    assert list(placement.grids) == ["input", "a1", "c2", "cat"]


def test_a_part_of_a_split_that_is_the_output_stays_float(net: Any) -> None:
    placement = placed(split(net, "left"))
    assert placement.same == {"right": "a1"}
    assert list(placement.grids) == ["input", "a1", "c2"]
