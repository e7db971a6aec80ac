"""ONNX Runtime's fused operators with weights, as the standard operators that they were made from.

A model that ONNX Runtime has saved after its own optimizations holds them in its domain com.microsoft
(ContribOperators.md of ONNX Runtime). What has weights is taken apart here, so that its weights are layers like any
others; what cannot be stays, and is left float by name. The rest, as Gelu and SkipLayerNormalization, is run as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from efrapq.graph import constants as const
from efrapq.graph.dialect import all_graphs

if TYPE_CHECKING:
    import onnx

__all__ = ["DOMAIN", "unfuse"]

DOMAIN = "com.microsoft"
# Activation → what its parameters are called, in the order in which FusedConv lists them.
ACTIVATIONS = {
    "Relu": (), "Sigmoid": (), "Tanh": (), "Softplus": (), "Softsign": (), "LeakyRelu": ("alpha",), "Elu": ("alpha",),
    "ThresholdedRelu": ("alpha",), "HardSigmoid": ("alpha", "beta"), "Clip": ("min", "max"),
}  # fmt: skip
# Since these opsets, Clip and Split take their numbers as inputs.
CLIP_BY_INPUTS, SPLIT_BY_INPUTS = 11, 13


def unfuse(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model without fused convolutions, matrix products and attention, as far as they can be told apart; `proto`
    itself, which is not modified, where it has none.
    """
    if not any(n.domain == DOMAIN and n.op_type in _PARTS for g in all_graphs(proto.graph) for n in g.node):
        return proto
    model: ir.Model = ir.from_proto(proto)
    opset = model.opset_imports.get("", 1)
    for graph in model.graphs():
        for node in list(graph):
            if node.domain == DOMAIN and node.op_type in _PARTS:
                made = _PARTS[node.op_type](graph, node, opset)
                if made:
                    _put_in_place(graph, node, made)
    if all(node.domain != DOMAIN for node in model.graph.all_nodes()):
        model.opset_imports.pop(DOMAIN, None)
    return ir.to_proto(model)


def _put_in_place(graph: ir.Graph, node: ir.Node, made: Sequence[ir.Node]) -> None:
    """The first node made keeps the name, the last one the output."""
    old, new = node.outputs[0], made[-1].outputs[0]
    made[0].name = node.name
    for step, part in enumerate(made[:-1]):
        for output in part.outputs:
            output.name = output.name or const.fresh_name(graph, f"{old.name}_part_{step}")
            output.type = output.type or old.type
    name, new.type, new.shape = old.name, old.type, old.shape
    graph.insert_after(node, made)
    old.name = None
    new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _conv(graph: ir.Graph, node: ir.Node, opset: int) -> list[ir.Node]:
    """act(Conv(X, W, B) + Z)."""
    source, weight, bias, added = (*node.inputs, None, None)[:4]
    kept = {k: v for k, v in node.attributes.items() if k not in ("activation", "activation_params")}
    conv = ir.node("Conv", [source, weight, bias] if bias is not None else [source, weight])
    conv.attributes.update(kept)
    made = [conv]
    if added is not None:
        made.append(ir.node("Add", [conv.outputs[0], added]))
    parameters = node.attributes.get_floats("activation_params", ())
    return _activated(graph, made, node, list(parameters), opset)


def _gemm(graph: ir.Graph, node: ir.Node, opset: int) -> list[ir.Node]:
    gemm = ir.node("Gemm", list(node.inputs))
    gemm.attributes.update({k: v for k, v in node.attributes.items() if not k.startswith("activation")})
    given = [node.attributes.get_float(f"activation_{name}", None) for name in ("alpha", "beta")]
    return _activated(graph, [gemm], node, [number for number in given if number is not None], opset)


def _activated(
    graph: ir.Graph, made: list[ir.Node], node: ir.Node, parameters: list[float], opset: int
) -> list[ir.Node]:
    """The nodes with the activation that `node` states behind them; none if it is not known."""
    activation = node.attributes.get_string("activation", "")
    if not activation:
        return made
    if activation not in ACTIVATIONS or len(parameters) > len(ACTIVATIONS[activation]):
        return []
    source = made[-1].outputs[0]
    if activation == "Clip" and opset >= CLIP_BY_INPUTS:
        limits = [_constant(graph, f"{node.outputs[0].name}_limit", np.array(p, np.float32)) for p in parameters]
        return [*made, ir.node("Clip", [source, *limits])]
    named = dict(zip(ACTIVATIONS[activation], parameters, strict=False))
    return [*made, ir.node(activation, [source], named)]


def _matmul(graph: ir.Graph, node: ir.Node, opset: int) -> list[ir.Node]:
    """alpha · op(A) op(B), each transposed in its last two axes where it says so."""
    flags = node.attributes
    if flags.get_int("transBatchA", 0) or flags.get_int("transBatchB", 0):
        return []
    made, operands = [], []
    for value, flag in zip(node.inputs, ("transA", "transB"), strict=True):
        if flags.get_int(flag, 0):
            rank = len(value.shape) if value is not None and value.shape is not None else 0
            if rank < 2:
                return []
            made.append(ir.node("Transpose", [value], {"perm": [*range(rank - 2), rank - 1, rank - 2]}))
            value = made[-1].outputs[0]
        operands.append(value)
    made.append(ir.node("MatMul", operands))
    alpha = flags.get_float("alpha", 1.0)
    if alpha != 1.0:
        factor = _constant(graph, f"{node.outputs[0].name}_alpha", np.array(alpha, np.float32))
        made.append(ir.node("Mul", [made[-1].outputs[0], factor]))
    return made


def _attention(graph: ir.Graph, node: ir.Node, opset: int) -> list[ir.Node]:
    """The projections to queries, keys and values as one matrix, before the runtime's MultiHeadAttention."""
    source, weight, bias, mask, past, added = (*node.inputs, *[None] * 6)[:6]
    flags = node.attributes
    held = const.constant_or_none(weight)
    # One length a sample is a mask that MultiHeadAttention does not take on a CPU.
    lengths = mask is not None and (mask.shape is None or len(mask.shape) != 2)
    further = any(output.uses() or output.is_graph_output() for output in node.outputs[1:])
    rotary = flags.get_int("do_rotary", 0) != 0
    if source is None or held is None or past is not None or lengths or further or rotary:
        return []
    width = const.sizes(held)[-1]
    sizes = [int(size) for size in flags.get_ints("qkv_hidden_sizes", ())] or [width // 3] * 3
    if len(sizes) != 3 or sum(sizes) != width:
        return []
    made = [ir.node("MatMul", [source, weight])]
    if bias is not None:
        made.append(ir.node("Add", [made[-1].outputs[0], bias]))
    projected = made[-1].outputs[0]
    if opset >= SPLIT_BY_INPUTS:
        counts = _constant(graph, f"{node.outputs[0].name}_sizes", np.array(sizes, np.int64))
        made.append(ir.node("Split", [projected, counts], {"axis": 2}, num_outputs=3))
    else:
        made.append(ir.node("Split", [projected], {"axis": 2, "split": sizes}, num_outputs=3))
    for output, what in zip(made[-1].outputs, ("query", "key", "value"), strict=True):
        output.name = const.fresh_name(graph, f"{node.outputs[0].name}_{what}")
    attend = ir.node("MultiHeadAttention", [*made[-1].outputs, None, mask, added], domain=DOMAIN)
    stated = ("num_heads", "scale", "mask_filter_value", "unidirectional")
    attend.attributes.update({k: v for k, v in flags.items() if k in stated})
    return [*made, attend]


def _constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    return const.initializer(graph, const.fresh_name(graph, name), array)


_PARTS = {"Attention": _attention, "FusedConv": _conv, "FusedGemm": _gemm, "FusedMatMul": _matmul}
