"""Half precision made single: a graph that computes in float16 or bfloat16 becomes one that computes in float32.

Every number of the two is a number of float32, so the weights are what they were. Only what the half-precision graph
would round between its operators is no longer rounded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from efrapq.graph.constants import fresh_name, lazily, sizes
from efrapq.graph.dialect import all_graphs, plain_dialect

if TYPE_CHECKING:
    import onnx

    from efrapq.io.onnx_data import DataSource

__all__ = ["halves", "runnable", "widen", "widen_attached"]

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Attributes in which the operators of these domains say an element type (TensorProto.DataType).
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype", "softmax_precision", "stash_type")
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")


def halves(proto: onnx.ModelProto) -> list[str]:
    """Which of float16 and bfloat16 a model holds tensors of, as ONNX calls them in lower case."""
    found = {kind for kind in _element_types(proto) if kind in {int(half) for half in HALF}}
    return [half.name.lower() for half in HALF if int(half) in found]


def widen(proto: onnx.ModelProto, data: Collection[str] = ()) -> onnx.ModelProto:
    """The same model in float32; `proto` itself, which is not modified, where nothing in it is half precision.

    Inputs and outputs of float16 stay, with a Cast behind or before them: who calls the model need not know. Those of
    bfloat16 become float32, since NumPy has no such type to call it with. data: inputs of the graph that are
    initializers really; these become float32. The model has no functions: see `efrapq.graph.dialect`.
    """
    if not halves(proto):
        return proto
    model: ir.Model = ir.from_proto(proto)
    graph = model.graph
    for inner in model.graphs():
        for constant in list(inner.initializers.values()):
            if constant.const_value is not None:
                constant.const_value = _wide_constant(constant.const_value)
    kept_inputs = [v for v in graph.inputs if v.dtype == ir.DataType.FLOAT16 and v.name not in data]
    kept_outputs = [v.dtype == ir.DataType.FLOAT16 for v in graph.outputs]
    for value in _values(model):
        if value.type is not None:
            value.type = _wide_type(value.type)
    for node in model.graph.all_nodes():
        for attribute in list(node.attributes.values()):
            node.attributes[attribute.name] = _wide_attribute(node, attribute)
    for position, is_half in enumerate(kept_outputs):
        if is_half and not graph.outputs[position].is_graph_input():
            _cast_output(graph, position)
    for value in kept_inputs:
        _cast_input(graph, value)
    return ir.to_proto(model)


def widen_attached(graph: ir.Graph) -> None:
    """The initializers that are read when they are asked for, too: `widen` saw inputs in their place."""
    for value in graph.initializers.values():
        if isinstance(value.const_value, ir.LazyTensor) and value.const_value.dtype in HALF:
            value.const_value = _wide_constant(value.const_value)
            value.type = ir.TensorType(ir.DataType.FLOAT)


def _wide_constant(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A constant of half precision in float32, where it is lazy still lazy; any other as it is."""
    if tensor.dtype not in HALF:
        return tensor
    if isinstance(tensor, ir.LazyTensor):
        return lazily(lambda: tensor.numpy().astype(np.float32), ir.DataType.FLOAT, sizes(tensor))
    if isinstance(tensor, ir.ExternalTensor):  # its data are elsewhere, and `runnable` widens them there
        shape = ir.Shape(sizes(tensor))
        return ir.ExternalTensor("", 0, 2 * tensor.nbytes, ir.DataType.FLOAT, shape=shape, name=str(tensor.name))
    return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def runnable(
    proto: onnx.ModelProto, outside: Mapping[str, DataSource]
) -> tuple[onnx.ModelProto, Mapping[str, DataSource]]:
    """A float model and its data as ONNX Runtime runs them on a CPU: it has no kernels for bfloat16."""
    if "bfloat16" not in halves(proto):
        return proto, outside
    wide = widen(plain_dialect(proto))
    kinds = {tensor.name: ir.DataType(tensor.data_type) for tensor in proto.graph.initializer}
    return wide, {name: _Widened(held, kinds[name]) if kinds[name] in HALF else held for name, held in outside.items()}


@dataclass(frozen=True)
class _Widened:
    """Data of half precision, as those of float32. See `efrapq.io.onnx_data.DataSource`."""

    held: DataSource
    kind: ir.DataType

    @property
    def length(self) -> int:
        return 2 * self.held.length

    def read(self) -> NDArray[np.uint8]:
        return self.held.read().view(self.kind.numpy()).astype("<f4").view(np.uint8)


def _element_types(proto: onnx.ModelProto) -> Iterator[int]:
    """Of all tensors that a model declares, and of those that its operators are told to make."""
    functions = [node for function in proto.functions for node in function.node]
    for graph in all_graphs(proto.graph):
        yield from (tensor.data_type for tensor in graph.initializer)
        yield from (tensor.values.data_type for tensor in graph.sparse_initializer)
        yield from (value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info))
        for node in graph.node:
            yield from _node_types(node)
    for node in functions:
        yield from _node_types(node)


def _node_types(node: onnx.NodeProto) -> Iterator[int]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t.data_type
        if attribute.name in TYPE_ATTRIBUTES:
            yield attribute.i


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _wide_type(kind: ir.TypeProtocol) -> ir.TypeProtocol:
    """The type with its tensors, which may be in sequences, in float32."""
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        return type(kind)(_wide_type(kind.elem_type))
    return ir.TensorType(ir.DataType.FLOAT) if kind.dtype in HALF else kind


def _wide_attribute(node: ir.Node, attribute: ir.Attr) -> ir.Attr:
    name, kind, held = attribute.name, attribute.type, attribute.value
    if kind == ir.AttributeType.TENSOR:
        return ir.AttrTensor(name, _wide_constant(held))
    if kind == ir.AttributeType.TENSORS:
        return ir.AttrTensors(name, [_wide_constant(tensor) for tensor in held])
    if kind == ir.AttributeType.TYPE_PROTO:
        return ir.AttrTypeProto(name, ir.TypeAndShape(_wide_type(held.type), held.shape))
    if kind == ir.AttributeType.INT and name in TYPE_ATTRIBUTES and node.domain in DOMAINS and held in HALF:
        return ir.AttrInt64(name, int(ir.DataType.FLOAT))
    return attribute


def _cast_input(graph: ir.Graph, value: ir.Value) -> None:
    """Let what reads an input read it as float32."""
    value.type = ir.TensorType(ir.DataType.FLOAT16)
    readers = list(value.uses())
    if not readers:
        return
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
    wide = cast.outputs[0]
    wide.name = fresh_name(graph, f"{value.name}_float")
    wide.type, wide.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    for reader in readers:
        reader.node.replace_input_with(reader.idx, wide)
    graph.insert_before(graph[0], cast)


def _cast_output(graph: ir.Graph, position: int) -> None:
    """Give an output out as float16, under its name."""
    wide = graph.outputs[position]
    name = wide.name
    wide.name = fresh_name(graph, f"{name}_float")
    cast = ir.node("Cast", [wide], {"to": int(ir.DataType.FLOAT16)})
    narrow = cast.outputs[0]
    narrow.name, narrow.type, narrow.shape = name, ir.TensorType(ir.DataType.FLOAT16), wide.shape
    graph.append(cast)
    graph.outputs[position] = narrow
