"""Initializers as arrays, and back: the small vocabulary of graph surgery on constants."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["array", "array_or_none", "fresh_name", "initializer", "ints", "replace_input"]


def array(value: ir.Value) -> NDArray[np.generic]:
    """The constant held by a value; ValueError if it holds none."""
    if value.const_value is None:
        raise ValueError(f"{value.name} is not a constant")
    return value.const_value.numpy()


def array_or_none(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The constant held by a value, or None. A graph input with a default is not a constant."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def fresh_name(graph: ir.Graph, wanted: str) -> str:
    """`wanted`, or `wanted_1`, … if the graph has such a value already."""
    taken = set(graph.initializers) | {v.name for v in graph.inputs} | {o.name for n in graph for o in n.outputs}
    name, number = wanted, 0
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    return name


def initializer(graph: ir.Graph, name: str, data: NDArray[np.generic] | ir.TensorProtocol) -> ir.Value:
    """Register a new initializer."""
    tensor = ir.tensor(data, name=name) if isinstance(data, np.ndarray) else data
    value = ir.Value(
        name=name,
        shape=ir.Shape([int(d) for d in tensor.numpy().shape]),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def replace_input(graph: ir.Graph, node: ir.Node, position: int, name: str, data: NDArray[np.generic]) -> ir.Value:
    """Make `data` the node's input at `position`, under the old constant's name where nothing else reads it."""
    old = node.inputs[position] if position < len(node.inputs) else None
    if position >= len(node.inputs):
        node.resize_inputs(position + 1)
    node.replace_input_with(position, None)
    if old is not None and not old.uses() and old.name in graph.initializers:
        del graph.initializers[str(old.name)]
    value = initializer(graph, fresh_name(graph, name), np.ascontiguousarray(data))
    node.replace_input_with(position, value)
    return value


def ints(node: ir.Node, attribute: str, input_position: int) -> list[int] | None:
    """A list that older opsets hold in an attribute and newer ones in a constant input; None if it is neither."""
    if attribute in node.attributes:
        return [int(v) for v in node.attributes[attribute].as_ints()]
    value = node.inputs[input_position] if len(node.inputs) > input_position else None
    constant = array_or_none(value)
    return None if constant is None else [int(v) for v in constant.reshape(-1)]
