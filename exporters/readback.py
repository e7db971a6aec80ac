"""Reading a QDQ file back into codes, grids and the float graph between them.

The inverse of `efrapq.exporters.qdq`: what is exported again, or compared with what was solved, is what the file
holds, not what somebody remembers having written.
"""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from efrapq.errors import UnsupportedModelError
from efrapq.graph import constants as const
from efrapq.graph.layers import WEIGHT_OPS, find_layers
from efrapq.graph.quantized import QuantizedModel, QuantizedWeight
from efrapq.grid import ActivationGrid
from efrapq.io.text import printable

__all__ = ["read_quantized"]


def read_quantized(proto: onnx.ModelProto) -> QuantizedModel:
    """Parse a QDQ graph. Raises UnsupportedModelError where the file quantizes in a way efrapq does not write."""
    model = ir.from_proto(proto)
    graph = model.graph
    held: dict[str, QuantizedWeight] = {}
    activations: dict[str, ActivationGrid] = {}
    for node in list(graph):
        if node.op_type != "DequantizeLinear":
            continue
        source = _through_cast(node.inputs[0])
        codes = const.array_or_none(source)
        if codes is None:
            name, grid = _activation(node)
            activations[name] = grid
        elif codes.dtype == np.int32:
            _restore_constant(graph, node, _dequantize_bias(node, codes))
        else:
            weight = _weight(node, codes, "INT4" if source is not None and source.dtype == ir.DataType.INT4 else "")
            name = _restore_constant(graph, node, weight.dequantized())
            held[name] = weight
    for node in list(graph):
        if node.op_type == "QuantizeLinear":
            _bypass(graph, node)
    common.RemoveUnusedNodesPass()(model)
    layers, _ = find_layers(graph)
    metadata = dict(model.metadata_props)
    bits = _recorded_bits(metadata)
    weights = {}
    quantized_layers = []
    for layer in layers:
        if layer.weight in held:
            weight = held[layer.weight]
            weights[layer.name] = QuantizedWeight(
                weight.codes, weight.scale, weight.axis, bits.get(layer.name, weight.bits)
            )
            quantized_layers.append(layer)
    if not weights:
        raise UnsupportedModelError("the file holds no quantized Conv, Gemm or MatMul weight")
    return QuantizedModel(model, quantized_layers, weights, activations, metadata)


def _through_cast(value: ir.Value | None) -> ir.Value | None:
    producer = value.producer() if value is not None else None
    return producer.inputs[0] if producer is not None and producer.op_type == "Cast" else value


def _recorded_bits(metadata: dict[str, str]) -> dict[str, int]:
    try:
        return {str(k): int(v) for k, v in json.loads(metadata.get("efrapq.bits", "{}")).items()}
    except (ValueError, AttributeError, TypeError) as exc:
        raise UnsupportedModelError("the file's efrapq.bits record is unreadable") from exc


def _scale_of(node: ir.Node) -> NDArray[np.float32]:
    held = const.array_or_none(node.inputs[1])
    if held is None or held.dtype != np.float32:
        raise UnsupportedModelError(f"{printable(str(node.name))}: its scale is not a constant float32")
    scale = held.astype(np.float32, copy=False)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise UnsupportedModelError(f"{printable(str(node.name))}: its scale is not positive and finite")
    return scale


def _zero_point_of(node: ir.Node) -> np.ndarray | None:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return None
    zero_point = const.array_or_none(_through_cast(value))
    if zero_point is None:
        raise UnsupportedModelError(f"{printable(str(node.name))}: its zero point is computed at run time")
    return zero_point.astype(np.int64)


def _weight(node: ir.Node, codes: np.ndarray, element: str) -> QuantizedWeight:
    name = printable(str(node.name))
    zero_point = _zero_point_of(node)
    if zero_point is not None and zero_point.any():
        raise UnsupportedModelError(f"{name}: its weight is asymmetric (zero point is not 0)")
    if codes.dtype == np.uint8:
        raise UnsupportedModelError(f"{name}: its weight codes are unsigned")
    if node.attributes.get_int("block_size", 0):
        raise UnsupportedModelError(f"{name}: its weight is quantized in blocks")
    scale = _scale_of(node)
    axis = node.attributes.get_int("axis", 1)
    if axis < 0:
        axis += codes.ndim
    if scale.size == 1:
        scale = np.full(codes.shape[axis], scale.reshape(-1)[0], np.float32)
    if scale.ndim != 1 or axis >= codes.ndim or codes.shape[axis] != len(scale):
        raise UnsupportedModelError(f"{name}: {scale.size} scales do not fit a weight of shape {codes.shape}")
    return QuantizedWeight(codes.astype(np.int8), scale, axis, 4 if element == "INT4" else 8)


def _dequantize_bias(node: ir.Node, codes: np.ndarray) -> NDArray[np.float32]:
    scale = _scale_of(node)
    return codes.astype(np.float32) * scale


def _restore_constant(graph: ir.Graph, node: ir.Node, data: np.ndarray) -> str:
    """Replace a DequantizeLinear of a constant by the float constant, under the output's name."""
    output = node.outputs[0]
    name = str(output.name)
    readers = list(output.uses())
    if not any(use.node.op_type in WEIGHT_OPS for use in readers):
        raise UnsupportedModelError(f"{printable(name)}: a quantized constant that no Conv, Gemm or MatMul reads")
    output.name = None
    value = const.initializer(graph, name, data)
    output.replace_all_uses_with(value)
    graph.remove(node, safe=True)
    return name


def _activation(node: ir.Node) -> tuple[str, ActivationGrid]:
    """The name of the float value that a QuantizeLinear → [Clip] → DequantizeLinear chain stands for, and its grid."""
    name = printable(str(node.name))
    codes = node.inputs[0]
    producer = codes.producer() if codes is not None else None
    bits = 8
    if producer is not None and producer.op_type == "Clip":
        high = const.array_or_none(producer.inputs[2])
        if high is None:
            raise UnsupportedModelError(f"{name}: a Clip of codes without a constant upper limit")
        bits = int(high.reshape(-1)[0]).bit_length()
        codes = producer.inputs[0]
        producer = codes.producer() if codes is not None else None
    if producer is None or producer.op_type != "QuantizeLinear" or codes is None:
        raise UnsupportedModelError(f"{name}: dequantizes something that no QuantizeLinear made")
    if codes.dtype == ir.DataType.UINT4:
        bits = 4
    zero_point = _zero_point_of(node)
    scale = _scale_of(node)
    if scale.size != 1 or (codes.dtype not in (None, ir.DataType.UINT8, ir.DataType.UINT4)):
        raise UnsupportedModelError(f"{name}: only per-tensor unsigned activation grids are read")
    source = producer.inputs[0]
    assert source is not None
    level = 0 if zero_point is None else int(zero_point.reshape(-1)[0])
    return str(source.name), ActivationGrid(float(scale.reshape(-1)[0]), level, bits)


def _bypass(graph: ir.Graph, quantize: ir.Node) -> None:
    """Cut a QuantizeLinear → [Clip] → DequantizeLinear chain out of the graph."""
    source = quantize.inputs[0]
    assert source is not None
    pending = [quantize.outputs[0]]
    while pending:
        value = pending.pop()
        for use in list(value.uses()):
            if use.node.op_type == "Clip":
                pending.append(use.node.outputs[0])
            elif use.node.op_type == "DequantizeLinear":
                real = use.node.outputs[0]
                ir.convenience.replace_all_uses_with(real, source, replace_graph_outputs=True)
            else:
                raise UnsupportedModelError(f"{printable(str(use.node.name))}: {use.node.op_type} computes on codes")
