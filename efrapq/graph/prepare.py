"""From any float ONNX graph to the one that is quantized: simplified, BatchNorm folded, normalized.

After `prepare`: half precision is single, what ONNX Runtime has fused is the standard's again, constants are
initializers, every node has a unique name, every weight has one reader, BatchNorm after a linear layer is gone, a mean
over height and width is a GlobalAveragePool, Gemm has alpha = beta = 1, padding is in numbers where it does not depend
on a size that is dynamic. The result depends on the model alone, so that a file and its float reference can be matched
layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from efrapq.errors import LimitError, UnsupportedModelError
from efrapq.graph import constants as const
from efrapq.graph.dialect import all_graphs, plain_dialect
from efrapq.graph.folding import fold_constants
from efrapq.graph.identity import drop_identities
from efrapq.graph.older_opset import at_least
from efrapq.graph.outside import attach, fold_moves
from efrapq.graph.padding import explicit_padding
from efrapq.graph.unfuse import unfuse
from efrapq.graph.widen import widen, widen_attached
from efrapq.io import data_as_inputs, printable

if TYPE_CHECKING:
    import onnx

    from efrapq.io import FileTensor

__all__ = ["LOWEST_OPSET", "name_nodes", "prepare", "simplify"]

# QuantizeLinear with an axis needs 13; older graphs are converted up.
LOWEST_OPSET = 13
# Trips that a Loop may be written to make: each runs through ONNX Runtime for every chunk of calibration data.
MOST_TRIPS = 100_000
LINEAR_OPS = frozenset({"Conv", "ConvTranspose", "Gemm"})
RANDOM_OPS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


def simplify(proto: onnx.ModelProto, outside: Mapping[str, FileTensor] | None = None) -> ir.Model:
    """The first half of `prepare`: simplified and named, with BatchNorm still in the graph."""
    plain = unfuse(widen(plain_dialect(data_as_inputs(proto)), outside or ()))
    _refuse_endless(plain)
    simplified = fold_constants(at_least(plain, LOWEST_OPSET))
    _refuse_endless(simplified)  # once more: a number of trips may have been computed
    model: ir.Model = ir.from_proto(simplified)
    if outside:
        attach(model, outside, [tensor.name for tensor in proto.graph.initializer])
        widen_attached(model.graph)
    _forget_invented_sizes(model.graph, proto)
    # The user's entries only: onnxsim adds a record of what it did.
    model.metadata_props.clear()
    model.metadata_props.update({p.key: p.value for p in proto.metadata_props})
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    drop_identities(model.graph)
    model.graph.sort()
    fold_moves(model.graph)
    name_nodes(model.graph)
    for node in list(model.graph):
        _drop_dropout(node)
    return model


def prepare(proto: onnx.ModelProto, outside: Mapping[str, FileTensor] | None = None) -> ir.Model:
    """Normalize a float model. outside: its initializers whose data are in files; in the result they are read when
    they are asked for, one at a time. The proto is not modified. Raises UnsupportedModelError, naming the step.
    """
    model = simplify(proto, outside)
    graph = model.graph
    _refuse_random(graph)
    _separate_shared_weights(graph)
    for node in list(graph):
        explicit_padding(node)
        _join_bias(graph, node)
        _fold_batchnorm(graph, node)
        _fold_gemm_factors(graph, node)
        _mean_to_pool(graph, node)
    common.RemoveUnusedNodesPass()(model)
    _require_opset(model)
    _strip(model)
    return model


def _forget_invented_sizes(graph: ir.Graph, proto: onnx.ModelProto) -> None:
    """Dimensions of outputs that had neither a size nor a name: inference names them, and they are to stay as given."""
    stated = {given.name: given.type.tensor_type.shape.dim for given in proto.graph.output}
    for value in graph.outputs:
        dims = stated.get(value.name or "", [])
        if value.shape is None or len(value.shape) != len(dims):
            continue
        unnamed = [not dim.HasField("dim_value") and not dim.dim_param for dim in dims]
        value.shape = ir.Shape(
            [None if u and not isinstance(d, int) else d for u, d in zip(unnamed, value.shape, strict=True)]
        )


def name_nodes(graph: ir.Graph) -> None:
    """Unique names: they identify layers in the evidence. The first node to state a name keeps it."""
    stated = {str(node.name) for node in graph if node.name}
    seen: set[str] = set()
    for index, node in enumerate(graph):
        name = node.name or ""
        if not name or name in seen:
            name = f"{name or node.op_type}_{index}"
            while name in stated or name in seen:
                name = f"{name}_{index}"
            node.name = name
        seen.add(name)


def _refuse_endless(proto: onnx.ModelProto) -> None:
    """Before anything runs the graph: a Loop that is written to make more trips than anybody waits for."""
    from onnx import numpy_helper

    graphs = list(all_graphs(proto.graph))
    nodes = [node for graph in graphs for node in graph.node]
    constants = {tensor.name: tensor for graph in graphs for tensor in graph.initializer}
    constants |= {
        node.output[0]: attribute.t
        for node in nodes
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    for node in nodes:
        tensor = constants.get(node.input[0]) if node.op_type == "Loop" else None
        trips = max(numpy_helper.to_array(tensor).reshape(-1).tolist(), default=0) if tensor is not None else 0
        if trips > MOST_TRIPS:
            raise LimitError(
                f"node {printable(node.name or node.output[0])} (Loop) makes {trips:,} trips; the limit is "
                f"{MOST_TRIPS:,}: export the model without it"
            )


def _refuse_random(graph: ir.Graph) -> None:
    """Two runs of a random operator differ, and so would the float and the quantized network on one input."""
    for node in graph.all_nodes():
        if node.op_type in RANDOM_OPS and node.domain in ("", "ai.onnx"):
            raise UnsupportedModelError(
                f"node {printable(str(node.name))} ({node.op_type}) draws random numbers; export the model in "
                "evaluation mode, or with the numbers as a constant"
            )


def _drop_dropout(node: ir.Node) -> None:
    if node.op_type != "Dropout" or node.outputs[0].is_graph_output():
        return
    training = node.inputs[2] if len(node.inputs) > 2 else None
    mode = const.array_or_none(training)
    if training is not None and (mode is None or mode.any()):
        return  # the executor says that it cannot be run
    source = node.inputs[0]
    assert source is not None
    node.outputs[0].replace_all_uses_with(source)


def _separate_shared_weights(graph: ir.Graph) -> None:
    """Give each reader of a shared initializer its own copy: codes are solved per layer.

    The first reader keeps the original, unless that is an output of the graph too.
    """
    for value in list(graph.initializers.values()):
        uses = list(value.uses())
        if not any(use.node.op_type in LINEAR_OPS | {"MatMul"} for use in uses):
            continue
        for copy_number, use in enumerate(uses if value.is_graph_output() else uses[1:], 1):
            assert value.const_value is not None
            copy = const.changed(value.const_value, lambda array: array, const.sizes(value.const_value))
            name = const.fresh_name(graph, f"{value.name}_{copy_number}")
            use.node.replace_input_with(use.idx, const.initializer(graph, name, copy))


def _fold_batchnorm(graph: ir.Graph, node: ir.Node) -> None:
    """W ← W · γ/√(σ² + ε), b ← (b - μ) · γ/√(σ² + ε) + β, in float64, for the linear layer before it."""
    if node.op_type != "BatchNormalization" or node.attributes.get_int("training_mode", 0) != 0:
        return
    source = node.inputs[0]
    layer = source.producer() if source is not None else None
    if (
        source is None
        or layer is None
        or layer.op_type not in LINEAR_OPS
        or len(list(source.uses())) != 1
        or source.is_graph_output()
        or len([o for o in node.outputs if o.uses() or o.is_graph_output()]) > 1
    ):
        return
    parameters = [const.array_or_none(v) for v in node.inputs[1:5]]
    weight_value = layer.inputs[1]
    weight = const.constant_or_none(weight_value)
    old_bias = layer.inputs[2] if len(layer.inputs) > 2 else None
    bias = const.array_or_none(old_bias) if old_bias is not None else None
    if weight is None or any(p is None for p in parameters) or (old_bias is not None and bias is None):
        return
    if weight.dtype != ir.DataType.FLOAT:
        return  # it stays as it is, and so must its type
    gamma, beta, mean, variance = (np.asarray(p, np.float64) for p in parameters)
    factor = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    shape = const.sizes(weight)
    spread = _spread_over_weight(layer, shape, factor)
    if spread is None:
        return
    shift = (0.0 if bias is None else bias.astype(np.float64)) - mean
    assert weight_value is not None
    assert weight_value.name is not None
    folded = const.changed(weight, lambda array: (array.astype(np.float64) * spread).astype(np.float32), shape)
    const.replace_input(graph, layer, 1, weight_value.name, folded)
    bias_name = old_bias.name if old_bias is not None and old_bias.name else f"{weight_value.name}_bias"
    const.replace_input(graph, layer, 2, bias_name, (shift * factor + beta).astype(np.float32))
    output = layer.outputs[0]
    if node.outputs[0].is_graph_output():
        # The graph's output keeps its name: the layer takes it over.
        name = node.outputs[0].name
        node.outputs[0].name, output.name = f"{name}_unfolded", name
    ir.convenience.replace_all_uses_with(node.outputs[0], output, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _spread_over_weight(layer: ir.Node, shape: tuple[int, ...], factor: np.ndarray) -> np.ndarray | None:
    """The per-channel factor in the weight's layout; None if it does not fit."""
    if layer.op_type == "Conv":
        return factor.reshape(-1, *[1] * (len(shape) - 1)) if len(factor) == shape[0] else None
    if layer.op_type == "Gemm":
        plain = layer.attributes.get_float("alpha", 1.0) == 1.0 and layer.attributes.get_float("beta", 1.0) == 1.0
        if not plain:
            return None
        return factor[:, None] if layer.attributes.get_int("transB", 0) else factor[None, :]
    groups = layer.attributes.get_int("group", 1)
    per_group = factor.reshape(groups, 1, -1, *[1] * (len(shape) - 2))
    repeated = np.repeat(per_group, shape[0] // groups, axis=1)
    return repeated.reshape(shape[0], -1, *[1] * (len(shape) - 2))


def _join_bias(graph: ir.Graph, node: ir.Node) -> None:
    """MatMul of a matrix and then Add of a constant row is a Gemm, whose bias needs no grid of its own."""
    if node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
        return
    product, added = node.inputs
    if const.constant_or_none(product) is not None:
        product, added = added, product
    bias = const.constant_or_none(added)
    matmul = product.producer() if product is not None else None
    if product is None or added is None or bias is None or matmul is None or matmul.op_type != "MatMul":
        return
    weight, source = const.constant_or_none(matmul.inputs[1]), matmul.inputs[0]
    if (
        weight is None
        or len(weight.shape) != 2
        or weight.dtype != ir.DataType.FLOAT
        or const.sizes(bias) not in ((weight.shape[1],), (1, weight.shape[1]))
        or source is None
        or source.shape is None
        or product.is_graph_output()
        or len(list(product.uses())) != 1
    ):
        return
    gemm = ir.node("Gemm", [source, matmul.inputs[1], added], name=matmul.name)
    output = node.outputs[0]
    if len(source.shape) != 2:
        if not isinstance(weight, ir.LazyTensor) or not _over_rows(graph, gemm, source, node):
            return
    else:
        gemm.outputs[0].type, gemm.outputs[0].shape = output.type, output.shape
        graph.insert_after(node, gemm)
        _take_over(output, gemm.outputs[0])
    graph.remove([node, matmul], safe=True)


def _over_rows(graph: ir.Graph, gemm: ir.Node, source: ir.Value, node: ir.Node) -> bool:
    """Put a Gemm over the rows of a tensor of more axes in the place of `node`; whether its sizes allow it.

    onnxsim does this itself where it sees that the weight is constant; one that lies in a file it does not see.
    """
    bias, dims = gemm.inputs[2], list(source.shape or ())
    sizes = [d if isinstance(d, int) else -1 for d in dims]
    if bias is None or len(bias.shape or ()) != 1 or len(sizes) < 3 or sizes.count(-1) > 1 or sizes[-1] < 1:
        return False
    if 0 in sizes:
        return False
    output, (inputs, outputs) = node.outputs[0], (sizes[-1], int(const.array(bias).shape[0]))

    def reshape(value: ir.Value, shape: list[int], word: str) -> ir.Node:
        name = const.fresh_name(graph, f"{output.name}_{word}_shape")
        return ir.node(
            "Reshape",
            [value, const.initializer(graph, name, np.array(shape, np.int64))],
            name=f"{gemm.name}_{word}",
        )

    rows = reshape(source, [-1, inputs], "rows")
    gemm.replace_input_with(0, rows.outputs[0])
    back = reshape(gemm.outputs[0], [*sizes[:-1], outputs], "back")
    rows.outputs[0].name = const.fresh_name(graph, f"{output.name}_rows")
    gemm.outputs[0].name = const.fresh_name(graph, f"{output.name}_flat")
    for made, width in ((rows.outputs[0], inputs), (gemm.outputs[0], outputs)):
        made.type, made.shape = source.type, ir.Shape([None, width])
    back.outputs[0].type, back.outputs[0].shape = output.type, output.shape
    graph.insert_after(node, [rows, gemm, back])
    _take_over(output, back.outputs[0])
    return True


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Let all that reads `old`, the graph's outputs included, read `new` under the old name."""
    name = old.name
    old.name, new.name = f"{name}_replaced", name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _fold_gemm_factors(graph: ir.Graph, node: ir.Node) -> None:
    """alpha into the weight, beta into the bias, and a bias of one number spread over the outputs."""
    if node.op_type != "Gemm":
        return
    for position, key in ((1, "alpha"), (2, "beta")):
        factor = node.attributes.get_float(key, 1.0)
        value = node.inputs[position] if len(node.inputs) > position else None
        held = const.constant_or_none(value)
        if factor == 1.0 or value is None or held is None or held.dtype != ir.DataType.FLOAT:
            continue
        scaled = const.changed(held, partial(np.multiply, np.float32(factor)), const.sizes(held))
        const.replace_input(graph, node, position, value.name or node.name or "", scaled)
        node.attributes.pop(key)
    weight_value, bias_value = (*node.inputs[1:], None)[:2]
    weight, bias = const.constant_or_none(weight_value), const.array_or_none(bias_value)
    if weight is None or bias_value is None or bias is None or bias.size != 1 or bias.dtype != np.float32:
        return
    outputs = const.sizes(weight)[0 if node.attributes.get_int("transB", 0) else 1]
    const.replace_input(graph, node, 2, str(bias_value.name), np.full(outputs, bias.reshape(-1)[0], np.float32))


def _mean_to_pool(graph: ir.Graph, node: ir.Node) -> None:
    """ReduceMean over (2, 3) of a 4-D tensor is GlobalAveragePool, which runs on integers."""
    if node.op_type != "ReduceMean" or node.outputs[0].is_graph_output():
        return
    axes = const.ints(node, "axes", 1)
    source = node.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 4 or axes is None:
        return
    if source.dtype != ir.DataType.FLOAT:
        return
    if sorted(a % 4 for a in axes) != [2, 3]:
        return
    pool = ir.node("GlobalAveragePool", [source], name=node.name)
    pool.outputs[0].name = node.outputs[0].name
    pool.outputs[0].type, pool.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    new: list[ir.Node] = [pool]
    if not node.attributes.get_int("keepdims", 1):
        pool.outputs[0].name = f"{node.outputs[0].name}_pooled"
        pool.outputs[0].shape = None
        flatten = ir.node("Flatten", [pool.outputs[0]], {"axis": 1}, name=f"{node.name}_flatten")
        flatten.outputs[0].name = node.outputs[0].name
        flatten.outputs[0].type, flatten.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        new.append(flatten)
    graph.insert_after(node, new)
    node.outputs[0].replace_all_uses_with(new[-1].outputs[0])
    graph.remove(node, safe=True)


def _require_opset(model: ir.Model) -> None:
    if model.opset_imports.get("", 0) < LOWEST_OPSET:
        raise UnsupportedModelError("the model does not import the ONNX operator set")


def _strip(model: ir.Model) -> None:
    """Stack traces and doc strings carry paths of the machine that exported the model; the user's metadata stays."""
    kept = dict(model.metadata_props)
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.update(kept)
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph:
        for output in node.outputs:
            output.metadata_props.clear()
