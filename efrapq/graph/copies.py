"""Copies of values, to be rounded where float operators read the value itself.

What a LayerNormalization gives goes to matrices, which compute on integers, and to the sum behind them, which is float.
One pair for all readers would round what the sum reads, for nothing. In the graph such a copy is an Identity's output.
In a file there is none: the QuantizeLinear reads the value, and so do the float operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from efrapq.graph import constants as const
from efrapq.graph.layers import Layer
from efrapq.graph.placement import Placement, computes_integers, place

__all__ = ["copied_from", "copy_for", "place_copies", "round_copies"]


def place_copies(graph: ir.Graph, layers: list[Layer], act_bits: int, edge_bits: int = 8) -> Placement:
    """`place`, on the graph with its copies, which are made here."""
    placement = place(graph, layers, act_bits, edge_bits)
    return place(graph, layers, act_bits, edge_bits) if round_copies(graph, layers, placement) else placement


def round_copies(graph: ir.Graph, layers: Sequence[Layer], placement: Placement) -> int:
    """Give every placed value that a float operator makes, and that float operators read beside integer ones, a copy
    for the integer ones; how many there are. With any, the placement is another.
    """
    integer = {layer.node_name for layer in layers if layer.integer}
    weighted = {layer.node_name for layer in layers}
    values = {str(v.name): v for v in (*graph.inputs, *(o for node in graph for o in node.outputs))}
    count = 0
    for name in placement.grids:
        value = values[name]
        producer = value.producer()
        if producer is not None and computes_integers(producer, placement, integer):
            continue
        uses = list(value.uses())
        # A layer reads what was calibrated for it, whatever it computes with.
        rounded = [u for u in uses if u.node.name in weighted or computes_integers(u.node, placement, integer)]
        if 0 < len(rounded) < len(uses):
            copy_for(graph, value, [(u.node, u.idx) for u in rounded])
            count += 1
    return count


def copy_for(graph: ir.Graph, value: ir.Value, readers: Sequence[tuple[ir.Node, int]]) -> ir.Value:
    """A copy of the value that these (node, input) read in its place."""
    name = const.fresh_name(graph, f"{value.name}.copy")
    node = ir.node("Identity", [value], name=name)
    copy = node.outputs[0]
    copy.name, copy.type, copy.shape = name, value.type, value.shape
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    for reader, position in readers:
        reader.replace_input_with(position, copy)
    return copy


def copied_from(value: ir.Value) -> ir.Value | None:
    """The value that this one is a copy of."""
    producer = value.producer()
    if producer is None or producer.op_type != "Identity" or value.is_graph_output():
        return None
    return producer.inputs[0]
