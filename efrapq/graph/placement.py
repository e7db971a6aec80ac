"""Where QuantizeLinear/DequantizeLinear pairs go, so that integer kernels fuse from the first layer to the last.

ONNX Runtime runs an operator on integers when every data input comes from a DequantizeLinear and its output goes to
a QuantizeLinear. A Relu or Clip between a layer and its QuantizeLinear disappears when the grid starts at 0, so the
pair goes behind it. Operators that only move or select values keep their input's grid.

A product of matrices (Gemm, MatMul) may give floats from integers, and does so where nothing reads integers: what a
transformer adds up from layer to layer stays float. There are values of 200 beside values of 1 in it, and on a grid
the cosine between an encoder's sentence embeddings and those of the float model was 0.86 instead of 0.99.

What stays float, because ONNX Runtime's CPU provider has no integer kernel: BatchNormalization that no layer before
it takes up, LayerNormalization, Gelu, HardSigmoid, and whatever has a constant among its inputs.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

import onnx_ir as ir

from efrapq.graph import constants as const
from efrapq.graph.layers import Layer

__all__ = ["Placement", "activation_after", "computes_integers", "pads_with_zero", "place"]

# Operators with an integer kernel that computes, so that the output has a grid of its own: from the first integer on.
COMPUTING_OPS = frozenset({"AveragePool", "GlobalAveragePool", "Concat"})
# Those that are worth it only between integers: a sum, a gate, its product, an activation function. Beside a float
# operator they would add a rounding and save nothing.
POINTWISE_OPS = frozenset({"Add", "Mul", "Sigmoid", "LeakyRelu"})
# Weights of these may meet integers and give floats.
PRODUCTS = frozenset({"Gemm", "MatMul"})
# Operators that move or select values: the output lives on the input's grid.
MOVING_OPS = frozenset(
    {
        "DepthToSpace",
        "Flatten",
        "Identity",
        "MaxPool",
        "Pad",
        "Reshape",
        "Resize",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)


@dataclass(frozen=True)
class Placement:
    """grids: value name → activation bits, for values that get a grid of their own, in topological order.
    same: value name → the value whose grid it shares.
    """

    grids: dict[str, int] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)

    def __contains__(self, value: object) -> bool:
        return value in self.grids or value in self.same

    def source(self, value: str) -> str:
        """The value that owns the grid of `value`."""
        while value in self.same:
            value = self.same[value]
        return value


def activation_after(value: ir.Value) -> ir.Node | None:
    """The Relu or zero-based Clip that is the only reader of a value, if it can be absorbed by a grid."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    if node.op_type == "Relu":
        return node
    if node.op_type == "Clip" and len(node.inputs) > 1:
        low = const.array_or_none(node.inputs[1])
        if low is not None and float(low.reshape(-1)[0]) == 0.0:
            return node
    return None


def place(graph: ir.Graph, layers: list[Layer], act_bits: int, edge_bits: int = 8) -> Placement:
    """Decide which values are quantized. act_bits: 4 or 8; 32 leaves all activations float.

    Inputs of the first and the last layer get `edge_bits` where that is more, gates that no layer reads 8.
    """
    if act_bits >= 32:
        return Placement()
    integer_layers = {layer.node_name: layer for layer in layers if layer.integer}
    quantized: set[str] = set()
    optional: set[str] = set()

    for layer in integer_layers.values():
        quantized.add(layer.input)
        value = (activation_after(layer.node.outputs[0]) or layer.node).outputs[0]
        if not value.is_graph_output():
            (optional if layer.op_type in PRODUCTS else quantized).add(str(value.name))
    changed = True
    while changed:
        before = len(quantized)
        for node in graph:
            if node.op_type not in COMPUTING_OPS | MOVING_OPS:
                continue
            inputs, outputs = _data_inputs(node), _placed_outputs(node)
            if inputs is None or outputs is None:
                continue
            # A copy is rounded where the value itself is not.
            if any(name in quantized for name in (inputs if node.op_type == "Identity" else inputs + outputs)):
                quantized.update(inputs + outputs)
        quantized.update(_between_integers(graph, quantized, optional))
        changed = len(quantized) != before
    return _resolve(graph, layers, quantized, act_bits, edge_bits)


def _between_integers(graph: ir.Graph, quantized: set[str], optional: set[str]) -> set[str]:
    """The values around pointwise operators that can be computed from integers and are read as integers, and what
    products of two such values read. optional: what could be had as integers.
    """
    supplied = quantized | optional
    wanted = set(quantized)
    possible: list[tuple[list[str], list[str]]] = []
    for node in graph:
        if _multiplies_values(node) and supplied.issuperset(factors := [str(v.name) for v in node.inputs if v]):
            wanted.update(factors)
            supplied.add(str(node.outputs[0].name))
        if node.op_type not in POINTWISE_OPS | MOVING_OPS:
            continue
        inputs, outputs = _data_inputs(node), _placed_outputs(node)
        if inputs is not None and outputs is not None and supplied.issuperset(inputs):
            supplied.update(outputs)
            possible.append((inputs, outputs))
    # Readers come first: an operator is wanted as soon as one of its readers is.
    for inputs, outputs in reversed(possible):
        if not wanted.isdisjoint(outputs):
            wanted.update(inputs + outputs)
    return wanted


def computes_integers(node: ir.Node, placement: Placement, layers: Container[str]) -> bool:
    """Whether a node reads codes and makes codes, as it is placed. layers: the names of the nodes of integer layers."""
    name = str(node.name)
    if name in layers:
        return (activation_after(node.outputs[0]) or node).outputs[0].name in placement
    before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if before is not None and activation_after(before.outputs[0]) is node:
        return computes_integers(before, placement, layers)
    if _multiplies_values(node):
        return all(v is not None and v.name in placement for v in node.inputs)
    if node.op_type not in COMPUTING_OPS | POINTWISE_OPS | MOVING_OPS:
        return False
    inputs, outputs = _data_inputs(node), _placed_outputs(node)
    return inputs is not None and outputs is not None and all(v in placement for v in inputs + outputs)


def _multiplies_values(node: ir.Node) -> bool:
    """Whether it is a product of two matrices that are computed at run time, as attention has them."""
    return node.op_type == "MatMul" and all(v is not None and v.const_value is None for v in node.inputs)


def _placed_outputs(node: ir.Node) -> list[str] | None:
    """The values that pairs behind the node stand at; None if one of them is the graph's output."""
    after = None if node.op_type in MOVING_OPS else activation_after(node.outputs[0])
    values = [*(node.outputs if node.op_type == "Split" else node.outputs[:1]), *(after.outputs if after else ())]
    if any(value.is_graph_output() for value in values):
        return None
    return [str(value.name) for value in (after.outputs if after else values)]


def _data_inputs(node: ir.Node) -> list[str] | None:
    """The names of the operator's float inputs; None if one is a constant or the operator cannot be integer."""
    if node.op_type == "Pad" and not pads_with_zero(node):
        return None
    if node.op_type == "Resize" and not _repeats(node):
        return None
    if node.op_type == "MaxPool" and len(node.outputs) > 1 and node.outputs[1].uses():
        return None
    values = node.inputs if node.op_type in ("Add", "Concat", "Mul") else node.inputs[:1]
    names = []
    for value in values:
        if value is None or const.array_or_none(value) is not None or value.dtype not in (None, ir.DataType.FLOAT):
            return None
        names.append(str(value.name))
    return names


def pads_with_zero(node: ir.Node) -> bool:
    """Whether a Pad adds the one value that every grid holds."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return False
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return True
    constant = const.array_or_none(value)
    return constant is not None and not constant.any()


def _repeats(resize: ir.Node) -> bool:
    """Whether a Resize repeats pixels. Cropping puts a value of its own outside of what it crops."""
    cropping = resize.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    return resize.attributes.get_string("mode", "nearest") == "nearest" and not cropping


def _keeps_grid(node: ir.Node) -> bool:
    """Whether every output value is one of the input's values, or the zero that each grid holds."""
    if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
        return pads_with_zero(node)
    if node.op_type == "Resize":
        return _repeats(node)
    return node.op_type in MOVING_OPS


def _resolve(graph: ir.Graph, layers: list[Layer], quantized: set[str], act_bits: int, edge_bits: int) -> Placement:
    same: dict[str, str] = {}
    order: list[str] = [str(v.name) for v in graph.inputs if v.name in quantized]
    for node in graph:
        for position, output in enumerate(node.outputs):
            name = str(output.name)
            if name not in quantized:
                continue
            source = node.inputs[0] if node.inputs else None
            if (
                (position == 0 or node.op_type == "Split")
                and _keeps_grid(node)
                and source is not None
                and source.name in quantized
            ):
                same[name] = str(source.name)
            else:
                order.append(name)
    placement = Placement(dict.fromkeys(order, act_bits), same)
    read_by_layers = {placement.source(layer.input) for layer in layers}
    for node in graph:
        gate = str(node.outputs[0].name)
        if node.op_type == "Sigmoid" and gate in placement.grids and gate not in read_by_layers:
            # Narrow codes save something where a layer reads them; a gate only scales what has a grid of its own.
            placement.grids[gate] = max(act_bits, 8)
    if layers:
        for layer in (layers[0], layers[-1]):
            if layer.input in placement:
                placement.grids[placement.source(layer.input)] = max(act_bits, edge_bits)
    return placement
