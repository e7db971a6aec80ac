"""What gets quantized, and why the rest does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, count

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from efrapq.errors import BadWeightsError
from efrapq.graph import constants as const
from efrapq.io.text import printable

__all__ = ["WEIGHT_OPS", "Layer", "Skipped", "find_layers"]

WEIGHT_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

# Heavy operators that are never quantized, and why.
FLOAT_OPS = {
    "Attention": "its products are of what is computed at run time",
    "DeformConv": "deformable convolutions are not quantized",
    "Einsum": "products written as Einsum are not quantized: export them as MatMul",
    "GRU": "recurrent layers are not quantized",
    "LSTM": "recurrent layers are not quantized",
    "RNN": "recurrent layers are not quantized",
}


# Of ONNX Runtime's own: those that are heavy without a constant matrix, and those whose matrices are looked up in.
HEAVY_OWN = frozenset({"FusedMatMul", "MultiHeadAttention", "GroupQueryAttention"})
TABLES_OWN = frozenset({"EmbedLayerNormalization"})


@dataclass(frozen=True)
class Layer:
    """One node with a constant weight.

    name: what the user reads (the weight's module path where it has one), unique in the graph. channel_axis: of the
    weight's output channels. groups: of a convolution. weight, bias: initializer names. integer: whether ONNX Runtime
    has an integer kernel for it.
    """

    name: str
    node: ir.Node
    weight: str
    bias: str | None
    channel_axis: int
    groups: int = 1

    @property
    def op_type(self) -> str:
        return self.node.op_type

    @property
    def node_name(self) -> str:
        return str(self.node.name)

    @property
    def input(self) -> str:
        value = self.node.inputs[0]
        assert value is not None
        return str(value.name)

    @property
    def output(self) -> str:
        return str(self.node.outputs[0].name)

    @property
    def integer(self) -> bool:
        return self.op_type != "ConvTranspose"


@dataclass(frozen=True)
class Skipped:
    """A heavy node that stays float, and the reason in words."""

    node_name: str
    op_type: str
    reason: str


def find_layers(graph: ir.Graph) -> tuple[list[Layer], list[Skipped]]:
    """The quantizable layers in topological order, and the nodes with weights of their own that are left float.

    Raises BadWeightsError naming a layer with NaN or infinity.
    """
    layers: list[Layer] = []
    skipped: list[Skipped] = []
    for node in graph:
        skipped += _inside(node)
        if node.domain not in ("", "ai.onnx"):
            skipped += _own(node)
            continue
        if node.op_type in FLOAT_OPS:
            skipped.append(Skipped(str(node.name), node.op_type, FLOAT_OPS[node.op_type]))
        if node.op_type not in WEIGHT_OPS:
            continue
        found = _layer(node)
        if isinstance(found, Skipped):
            skipped.append(found)
        else:
            layers.append(found)
    layers = _uniquely_named(layers)
    for layer in layers:
        _require_finite(graph, layer)
    return layers, skipped


def weight_array(graph: ir.Graph, layer: Layer) -> NDArray[np.float32]:
    """The layer's float weight in its ONNX layout."""
    return const.array(graph.initializers[layer.weight]).astype(np.float32, copy=False)


def bias_array(graph: ir.Graph, layer: Layer) -> NDArray[np.float32] | None:
    """The layer's float bias, (O,), or None."""
    if layer.bias is None:
        return None
    return const.array(graph.initializers[layer.bias]).astype(np.float32, copy=False).reshape(-1)


def _inside(node: ir.Node) -> Iterator[Skipped]:
    """What an If, Loop or Scan computes in its subgraphs."""
    for attribute in node.attributes.values():
        if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        for graph in [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs():
            for inner in graph.all_nodes():
                if inner.op_type in WEIGHT_OPS | FLOAT_OPS.keys() and inner.domain in ("", "ai.onnx"):
                    name = str(inner.name or inner.outputs[0].name)
                    yield Skipped(name, inner.op_type, f"it stands inside a subgraph of {node.op_type} {node.name}")


def _own(node: ir.Node) -> Iterator[Skipped]:
    """A heavy operator of ONNX Runtime's own: one that holds a matrix, or multiplies two."""
    held = (const.constant_or_none(value) for value in node.inputs)
    matrices = any(tensor is not None and len(const.sizes(tensor)) > 1 for tensor in held)
    if node.op_type in HEAVY_OWN or (matrices and node.op_type not in TABLES_OWN):
        yield Skipped(str(node.name), node.op_type, f"an operator of {node.domain}, not of the ONNX standard")


def _layer(node: ir.Node) -> Layer | Skipped:
    def no(reason: str) -> Skipped:
        return Skipped(str(node.name), node.op_type, reason)

    weight_value = node.inputs[1]
    weight = const.array_or_none(weight_value)
    if weight is None or weight_value is None:
        if node.op_type == "MatMul" and const.array_or_none(node.inputs[0]) is not None:
            return no("its constant is the first operand, not the second")
        return no("its weight is computed at run time")
    if const.array_or_none(node.inputs[0]) is not None:
        return no("its first input is a constant")
    if weight.dtype != np.float32:
        return no(f"its weight is {weight.dtype}, not float32")
    if weight.size == 0:
        return no("its weight is empty")
    bias_value = node.inputs[2] if len(node.inputs) > 2 else None
    bias = const.array_or_none(bias_value)
    if bias_value is not None and bias is None:
        return no("its bias is computed at run time")
    groups, axis = 1, 0
    if node.op_type in ("Conv", "ConvTranspose"):
        groups = node.attributes.get_int("group", 1)
        axis = 0 if node.op_type == "Conv" else 1
        if weight.ndim not in (3, 4, 5):
            return no(f"convolutions over one to three axes are quantized, this one has {weight.ndim - 2}")
        if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return no("its padding depends on the input's size (auto_pad)")
        if node.op_type == "ConvTranspose" and "output_shape" in node.attributes:
            return no("its padding depends on the input's size (output_shape)")
    elif node.op_type == "Gemm":
        if node.attributes.get_int("transA", 0):
            return no("it transposes its input (transA)")
        if node.attributes.get_float("alpha", 1.0) != 1.0 or node.attributes.get_float("beta", 1.0) != 1.0:
            return no("its alpha or beta is not 1")
        axis = 0 if node.attributes.get_int("transB", 0) else 1
        # By shape: (O, 1) holds as many numbers, but adds one to each row of the batch.
        if bias is not None and bias.shape not in ((weight.shape[axis],), (1, weight.shape[axis])):
            return no("its bias is not one number per output")
    else:
        if weight.ndim != 2:
            return no(f"its constant is {weight.ndim}-dimensional")
        axis = 1
    assert weight_value.name is not None
    return Layer(
        name=_display_name(weight_value.name, str(node.name)),
        node=node,
        weight=weight_value.name,
        bias=bias_value.name if bias_value is not None else None,
        channel_axis=axis,
        groups=groups,
    )


def _display_name(weight: str, node: str) -> str:
    return weight.removesuffix(".weight") if weight.endswith(".weight") else node


def _uniquely_named(layers: list[Layer]) -> list[Layer]:
    """The layers with no name twice: codes, reports and the file's records are kept by name.

    Who keeps a name that several want depends on the weights' and nodes' own names alone, never on the order of the
    graph, which is another one in an exported file. A module path goes before a node's name.
    """

    def rank(layer: Layer) -> tuple[bool, str, str]:
        return not layer.weight.endswith(".weight"), layer.weight, layer.node_name

    names: dict[int, str] = {}
    taken: set[str] = set()
    ranked = sorted(range(len(layers)), key=lambda i: rank(layers[i]))
    # Two rounds: a layer whose name is free keeps it whatever the others fall back on.
    for index in ranked:
        if layers[index].name not in taken:
            taken.add(layers[index].name)
            names[index] = layers[index].name
    for index in ranked:
        if index not in names:
            names[index] = next(name for name in _other_names(layers[index]) if name not in taken)
            taken.add(names[index])
    return [replace(layer, name=names[index]) for index, layer in enumerate(layers)]


def _other_names(layer: Layer) -> Iterator[str]:
    return chain([layer.weight], (f"{layer.weight}_{number}" for number in count(1)))


def _require_finite(graph: ir.Graph, layer: Layer) -> None:
    for what, array in (("weight", weight_array(graph, layer)), ("bias", bias_array(graph, layer))):
        if array is not None and not np.isfinite(array).all():
            raise BadWeightsError(
                f"layer {printable(layer.name)}: its {what} holds NaN or infinity; the model is broken"
            )
