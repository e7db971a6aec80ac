"""Initializers as arrays, and back: the small vocabulary of graph surgery on constants.

A constant is a tensor in memory or an `ir.LazyTensor`: one in a file, or computed from one. Its array is made each
time that it is asked for, and is the caller's to drop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = [
    "array",
    "array_or_none",
    "changed",
    "constant_or_none",
    "fresh_name",
    "initializer",
    "ints",
    "lazily",
    "replace_input",
    "sizes",
]


def array(value: ir.Value) -> NDArray[np.generic]:
    """The constant held by a value; ValueError if it holds none."""
    if value.const_value is None:
        raise ValueError(f"{value.name} is not a constant")
    return value.const_value.numpy()


def array_or_none(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The constant held by a value, or None. A graph input with a default is not a constant."""
    constant = constant_or_none(value)
    return None if constant is None else constant.numpy()


def constant_or_none(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The same, unread: its type and shape are known without its data."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value


def sizes(constant: ir.TensorProtocol) -> tuple[int, ...]:
    """Its dimensions, unread."""
    return tuple(int(d) for d in constant.shape.numpy())


def lazily(make: Callable[[], NDArray[np.generic]], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.LazyTensor:
    """A constant that is computed each time it is asked for."""
    return ir.LazyTensor(lambda: ir.Tensor(make(), dtype), dtype, ir.Shape(shape))


def changed(
    constant: ir.TensorProtocol,
    change: Callable[[NDArray[Any]], NDArray[Any]],
    shape: tuple[int, ...],
    dtype: ir.DataType | None = None,
) -> NDArray[Any] | ir.LazyTensor:
    """`change` of a constant: made now, or of one that is lazy when it is asked for.

    shape: of the result. dtype: of the result, by default the constant's.
    """
    if not isinstance(constant, ir.LazyTensor):
        return change(constant.numpy())
    return lazily(lambda: np.ascontiguousarray(change(constant.numpy())), dtype or constant.dtype, shape)


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
    tensor.name = name
    value = ir.Value(
        name=name,
        shape=ir.Shape(sizes(tensor)),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def replace_input(
    graph: ir.Graph, node: ir.Node, position: int, name: str, data: NDArray[np.generic] | ir.LazyTensor
) -> ir.Value:
    """Make `data` the node's input at `position`, under the old constant's name where nothing else reads it."""
    old = node.inputs[position] if position < len(node.inputs) else None
    if position >= len(node.inputs):
        node.resize_inputs(position + 1)
    node.replace_input_with(position, None)
    if old is not None and not old.uses() and old.name in graph.initializers:
        del graph.initializers[str(old.name)]
    held = data if isinstance(data, ir.LazyTensor) else np.ascontiguousarray(data)
    value = initializer(graph, fresh_name(graph, name), held)
    node.replace_input_with(position, value)
    return value


def ints(node: ir.Node, attribute: str, input_position: int) -> list[int] | None:
    """A list that older opsets hold in an attribute and newer ones in a constant input; None if it is neither."""
    if attribute in node.attributes:
        return [int(v) for v in node.attributes[attribute].as_ints()]
    value = node.inputs[input_position] if len(node.inputs) > input_position else None
    constant = array_or_none(value)
    return None if constant is None else [int(v) for v in constant.reshape(-1)]
