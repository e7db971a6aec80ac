"""Where QuantizeLinear/DequantizeLinear pairs go, so that integer kernels fuse from the first layer to the last.

ONNX Runtime runs an operator on integers when every data input comes from a DequantizeLinear and its output goes to
a QuantizeLinear. A Relu or Clip between a layer and its QuantizeLinear disappears when the grid starts at 0, so the
pair goes behind it. Operators that only move or select values keep their input's grid.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from efrapq.graph import constants as const
from efrapq.graph.layers import Layer

__all__ = ["Placement", "activation_after", "place"]

# Operators with an integer kernel that computes, so that the output has a grid of its own.
COMPUTING_OPS = frozenset({"Add", "AveragePool", "GlobalAveragePool", "Concat"})
# Operators that move or select values: the output lives on the input's grid.
MOVING_OPS = frozenset(
    {"MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad", "Identity", "DepthToSpace"}
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

    Inputs of the first and the last layer get `edge_bits` where that is more.
    """
    if act_bits >= 32:
        return Placement()
    integer_layers = {layer.node_name: layer for layer in layers if layer.integer}
    quantized: set[str] = set()

    def quantize_output(node: ir.Node) -> None:
        after = activation_after(node.outputs[0])
        value = (after or node).outputs[0]
        if not value.is_graph_output():
            quantized.add(str(value.name))

    for layer in integer_layers.values():
        quantized.add(layer.input)
        quantize_output(layer.node)
    changed = True
    while changed:
        before = len(quantized)
        for node in graph:
            if node.op_type not in COMPUTING_OPS | MOVING_OPS or node.outputs[0].is_graph_output():
                continue
            inputs = _data_inputs(node)
            if inputs is None:
                continue
            after = activation_after(node.outputs[0]) if node.op_type in COMPUTING_OPS else None
            output = str((after or node).outputs[0].name)
            if after is not None and after.outputs[0].is_graph_output():
                continue
            if output in quantized or any(name in quantized for name in inputs):
                quantized.update(inputs)
                quantized.add(output)
        changed = len(quantized) != before
    return _resolve(graph, layers, quantized, act_bits, edge_bits)


def _data_inputs(node: ir.Node) -> list[str] | None:
    """The names of the operator's float inputs; None if one is a constant or the operator cannot be integer."""
    if node.op_type == "Pad" and not _pads_with_zero(node):
        return None
    if node.op_type == "MaxPool" and len(node.outputs) > 1 and node.outputs[1].uses():
        return None
    values = node.inputs if node.op_type in ("Add", "Concat") else node.inputs[:1]
    names = []
    for value in values:
        if value is None or const.array_or_none(value) is not None or value.dtype not in (None, ir.DataType.FLOAT):
            return None
        names.append(str(value.name))
    return names


def _pads_with_zero(node: ir.Node) -> bool:
    if node.attributes.get_string("mode", "constant") != "constant":
        return False
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return True
    constant = const.array_or_none(value)
    return constant is not None and not constant.any()


def _keeps_grid(node: ir.Node) -> bool:
    """Whether every output value is one of the input's values, or the zero that each grid holds."""
    if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
        return _pads_with_zero(node)
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
            if position == 0 and _keeps_grid(node) and source is not None and source.name in quantized:
                same[name] = str(source.name)
            else:
                order.append(name)
    placement = Placement(dict.fromkeys(order, act_bits), same)
    if layers:
        for layer in (layers[0], layers[-1]):
            if layer.input in placement:
                placement.grids[placement.source(layer.input)] = max(act_bits, edge_bits)
    return placement
