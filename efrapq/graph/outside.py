"""Initializers whose data stay in their files, as values of a graph: read when asked for, and not kept.

The tools that rewrite whole models (onnxsim, ONNX's shape inference and converters) take them as one message of at
most 2 GiB, and fold what is constant. They are given the graph with these initializers as inputs instead
(`efrapq.io.external.data_as_inputs`), which they cannot read; here they become constants again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from efrapq.graph import constants as const

if TYPE_CHECKING:
    from efrapq.io.external import FileTensor
    from efrapq.io.onnx_data import DataSource

__all__ = ["attach", "fold_moves", "put_outside", "set_aside", "take_back"]

# Bytes of an initializer that is worth a place outside of the graph.
LARGE = 65536


def attach(model: ir.Model, outside: Mapping[str, FileTensor], order: Sequence[str] = ()) -> None:
    """Give the initializers that lie in files their data. Those that are inputs of the graph become initializers.

    order: names in the order in which the graph had them, which is to be that of the result.
    """
    take_back(model, {name: _tensor(held) for name, held in outside.items()})
    graph = model.graph
    known = set(order)
    ordered = [graph.initializers[name] for name in order if name in graph.initializers]
    for value in [*ordered, *(v for n, v in graph.initializers.items() if n not in known)]:
        del graph.initializers[str(value.name)]
        graph.register_initializer(value)


def set_aside(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    """Make inputs of all initializers that are read or computed when asked for; returns their data by name."""
    found: dict[str, ir.TensorProtocol] = {}
    for name, value in list(graph.initializers.items()):
        if isinstance(value.const_value, ir.LazyTensor) and not value.is_graph_input():
            found[name] = value.const_value
            value.const_value = None
            del graph.initializers[name]
            graph.inputs.append(value)
    return found


def take_back(model: ir.Model, tensors: Mapping[str, ir.TensorProtocol]) -> None:
    """The inverse of `set_aside`, for the same graph or one that was made of it."""
    graph = model.graph
    for value in [value for value in graph.inputs if value.name in tensors]:
        graph.inputs.remove(value)
        if value.uses() or value.is_graph_output():
            tensor = tensors[str(value.name)]
            value.const_value = tensor
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(const.sizes(tensor))
            graph.register_initializer(value)
    for name, value in graph.initializers.items():
        if name in tensors:
            value.const_value = tensors[name]


@dataclass(frozen=True)
class _Held:
    """A constant of a graph as the data of a file. See `efrapq.io.onnx_data.DataSource`."""

    constant: ir.TensorProtocol

    @property
    def length(self) -> int:
        return int(self.constant.nbytes)

    def read(self) -> NDArray[np.uint8]:
        array = np.ascontiguousarray(self.constant.numpy()) if self.constant.dtype.bitwidth >= 8 else None
        if array is None or sys.byteorder != "little":
            return np.frombuffer(self.constant.tobytes(), np.uint8)
        return array.reshape(-1).view(np.uint8)


def put_outside(graph: ir.Graph) -> dict[str, DataSource]:
    """Take the data of large initializers out of a graph; it says then only that they are external. By name."""
    found: dict[str, DataSource] = {}
    for name, value in graph.initializers.items():
        constant = value.const_value
        if constant is None or constant.nbytes < LARGE or constant.dtype == ir.DataType.STRING:
            continue
        found[name] = _Held(constant)
        value.const_value = ir.ExternalTensor(
            "", 0, constant.nbytes, constant.dtype, shape=ir.Shape(const.sizes(constant)), name=name
        )
    return found


def fold_moves(graph: ir.Graph) -> None:
    """What only moves or casts a constant that is read when asked for becomes such a constant itself.

    These are the operators that stand between a weight and its layer; onnxsim folds them where it sees the weight.
    """
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        tensor = const.constant_or_none(source)
        if source is None or not isinstance(tensor, ir.LazyTensor) or node.domain not in ("", "ai.onnx"):
            continue
        output = node.outputs[0]
        moved = _moved(node, tensor)
        if moved is None or output.is_graph_output():
            continue
        name = str(output.name)
        output.name = None
        output.replace_all_uses_with(const.initializer(graph, name, _named(moved, name)))
        graph.remove(node, safe=True)
        if not source.uses() and not source.is_graph_output():
            del graph.initializers[str(source.name)]


def _tensor(held: FileTensor) -> ir.LazyTensor:
    kind, shape = ir.DataType(held.data_type), ir.Shape(held.dims)

    def read() -> ir.TensorProtocol:
        data = held.read()
        if kind.bitwidth < 8:
            return ir.PackedTensor(data, kind, shape=shape)
        return ir.Tensor(data.view(kind.numpy()).reshape(held.dims), kind)

    return ir.LazyTensor(read, kind, shape, name=held.name)


def _named(tensor: ir.LazyTensor, name: str) -> ir.LazyTensor:
    return ir.LazyTensor(tensor.raw, tensor.dtype, ir.Shape(const.sizes(tensor)), name=name)


def _moved(node: ir.Node, tensor: ir.LazyTensor) -> ir.LazyTensor | None:
    """The constant that the node makes of a constant; None if it does something else."""
    shape = const.sizes(tensor)
    if node.op_type == "Identity":
        return tensor
    if node.op_type == "Cast":
        kind = ir.DataType(node.attributes.get_int("to", 0))
        if kind not in (ir.DataType.FLOAT, ir.DataType.DOUBLE) or tensor.dtype.numpy() not in _FLOATS:
            return None
        return const.lazily(lambda: tensor.numpy().astype(kind.numpy()), kind, shape)
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", list(range(len(shape)))[::-1])
        axes = [int(axis) for axis in order]
        moved = tuple(shape[axis] for axis in axes)
        return const.lazily(lambda: np.ascontiguousarray(tensor.numpy().transpose(axes)), tensor.dtype, moved)
    new = _reshaped(node, shape)
    return None if new is None else const.lazily(lambda: tensor.numpy().reshape(new), tensor.dtype, new)


# What Cast to float32 or float64 keeps as it is, or rounds in one way only.
_FLOATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


def _reshaped(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    if node.op_type == "Reshape":
        wanted = const.array_or_none(node.inputs[1])
        if wanted is None:
            return None
        sizes = [int(d) for d in wanted.reshape(-1)]
        if not node.attributes.get_int("allowzero", 0):
            sizes = [shape[i] if d == 0 and i < len(shape) else d for i, d in enumerate(sizes)]
        return _checked(shape, lambda empty: empty.reshape(sizes))
    axes = const.ints(node, "axes", 1)
    if node.op_type == "Squeeze":
        return _checked(shape, lambda empty: np.squeeze(empty, None if axes is None else tuple(axes)))
    if node.op_type == "Unsqueeze" and axes is not None:
        return _checked(shape, lambda empty: np.expand_dims(empty, tuple(axes)))
    return None


def _checked(shape: tuple[int, ...], change: Any) -> tuple[int, ...] | None:
    """The shape after a change of shape; None if there is none such."""
    empty: NDArray[np.int8] = np.broadcast_to(np.int8(0), shape)
    try:
        return tuple(change(empty).shape)
    except ValueError:
        return None  # the executor says what is wrong with the node
