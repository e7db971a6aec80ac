"""Reading a QDQ file back into codes, grids and the float graph between them.

The inverse of `efrapq.exporters.qdq`: what is exported again, or compared with what was solved, is what the file
holds, not what somebody remembers having written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from efrapq.errors import UnsupportedModelError
from efrapq.exporters.guard import strip_guard
from efrapq.exporters.profile import SYMMETRIC_ZERO_POINT
from efrapq.graph import constants as const
from efrapq.graph.copies import copy_for
from efrapq.graph.layers import WEIGHT_OPS, Layer, find_layers
from efrapq.graph.outside import attach
from efrapq.graph.prepare import name_nodes
from efrapq.graph.quantized import QuantizedModel, QuantizedWeight
from efrapq.grid import ActivationGrid
from efrapq.io import FileTensor, printable

__all__ = ["read_quantized"]

# Types of activation codes: their bits and their lowest value.
CODE_TYPES = {ir.DataType.UINT8: (8, 0), ir.DataType.INT8: (8, -128), ir.DataType.UINT4: (4, 0)}


def read_quantized(proto: onnx.ModelProto, outside: Mapping[str, FileTensor] | None = None) -> QuantizedModel:
    """Parse a QDQ graph. outside: its initializers whose data are in files. Raises UnsupportedModelError where the
    file quantizes in a way efrapq does not write.
    """
    model = ir.from_proto(proto)
    if outside:
        attach(model, outside)
    strip_guard(model)
    graph = model.graph
    held: dict[str, QuantizedWeight] = {}
    activations: dict[str, ActivationGrid] = {}
    for node in list(graph):
        _pad_reals(graph, node)
    for node in list(graph):
        if node.op_type != "DequantizeLinear":
            continue
        codes = _constant_codes(node)
        if codes is None:
            name, grid = _activation(node)
            activations[name] = grid
        elif codes.dtype == ir.DataType.INT32:
            _restore_constant(graph, node, _dequantize_bias(node, codes.numpy()))
        else:
            weight = _weight(node, codes)
            # Only its place is needed: as reals, the weights of a large model would be four times as large again.
            reals = const.lazily(weight.dequantized, ir.DataType.FLOAT, weight.shape)
            name = _restore_constant(graph, node, reals)
            held[name] = weight
    quantizers = [node for node in graph if node.op_type == "QuantizeLinear"]
    beside = [node for node in quantizers if _read_beside(node)]
    chains = [(*_bypass(node), node in beside) for node in quantizers]
    common.RemoveUnusedNodesPass()(model)
    # Only now, so that nodes without a name are counted as they are in the float model.
    name_nodes(graph)
    copies: dict[str, list[str]] = {}
    for source, readers, shared in chains:
        if shared and readers:
            copies.setdefault(str(source.name), []).append(str(copy_for(graph, source, readers).name))
    activations = {name: grid for value, grid in activations.items() for name in copies.get(value, [value])}
    layers, _ = find_layers(graph)
    metadata = dict(model.metadata_props)
    bits = _recorded_bits(metadata)
    weights = {}
    quantized_layers = []
    for layer in layers:
        if layer.weight in held:
            if len(list(graph.initializers[layer.weight].uses())) > 1:
                raise UnsupportedModelError(f"{printable(layer.weight)}: a quantized weight that several nodes share")
            weights[layer.name] = _for_layer(held.pop(layer.weight), layer, bits)
            quantized_layers.append(layer)
    if held:
        raise UnsupportedModelError(f"{printable(next(iter(held)))}: a quantized weight that efrapq would leave float")
    if len(weights) != len(quantized_layers):
        raise UnsupportedModelError("two quantized layers go by one name")
    if not weights:
        raise UnsupportedModelError("the file holds no quantized Conv, Gemm or MatMul weight")
    return QuantizedModel(model, quantized_layers, weights, activations, metadata)


def _constant_codes(node: ir.Node) -> ir.TensorProtocol | None:
    """The constant that a DequantizeLinear reads, directly or through the Cast of int4 to int8; None if it is none."""
    source = node.inputs[0]
    producer = source.producer() if source is not None else None
    if producer is None or producer.op_type != "Cast":
        return const.constant_or_none(source)
    codes = const.constant_or_none(producer.inputs[0])
    if codes is not None and (codes.dtype, producer.attributes.get_int("to")) != (ir.DataType.INT4, ir.DataType.INT8):
        kind = codes.dtype.name.lower()
        raise UnsupportedModelError(f"{printable(str(node.name))}: its weight codes are {kind} behind a Cast")
    return codes


def _for_layer(weight: QuantizedWeight, layer: Layer, recorded: dict[str, int]) -> QuantizedWeight:
    """The weight with the width that the file records, its scales along the layer's output channels."""
    name, axis, scale = printable(layer.name), weight.axis, weight.scale
    if axis != layer.channel_axis:
        if weight.block or (scale != scale[0]).any():
            raise UnsupportedModelError(f"{name}: its scales do not run along its output channels")
        axis = layer.channel_axis
        scale = np.full(weight.shape[axis], scale[0], np.float32)
    bits = recorded.get(layer.name, weight.bits)
    solved = QuantizedWeight(weight.stored, scale, axis, bits, weight.block, weight.unsigned)
    codes, low, high = weight.codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # Narrow codes may travel in a wider type, where a target has no int4; never the other way round.
    if solved.container_bits > weight.bits or codes.min() < low or codes.max() > high:
        raise UnsupportedModelError(f"{name}: the efrapq.bits record says {bits} bits, its codes say otherwise")
    return solved


def _recorded_bits(metadata: dict[str, str]) -> dict[str, int]:
    try:
        bits = {str(k): int(v) for k, v in json.loads(metadata.get("efrapq.bits", "{}")).items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as exc:
        raise UnsupportedModelError("the file's efrapq.bits record is unreadable") from exc
    if not all(2 <= b <= 8 for b in bits.values()):
        raise UnsupportedModelError("the file's efrapq.bits record holds widths other than 2 to 8")
    return bits


def _scale_of(node: ir.Node) -> NDArray[np.float32]:
    held = const.array_or_none(node.inputs[1])
    if held is None or held.dtype != np.float32:
        raise UnsupportedModelError(f"{printable(str(node.name))}: its scale is not a constant float32")
    scale = held.astype(np.float32, copy=False)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise UnsupportedModelError(f"{printable(str(node.name))}: its scale is not positive and finite")
    return scale


def _zero_point_of(node: ir.Node) -> NDArray[np.generic] | None:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return None
    zero_point = const.array_or_none(value)
    if zero_point is None:
        raise UnsupportedModelError(f"{printable(str(node.name))}: its zero point is computed at run time")
    return zero_point


def _weight(node: ir.Node, constant: ir.TensorProtocol) -> QuantizedWeight:
    name = printable(str(node.name))
    zero_point = _zero_point_of(node)
    kind, shape = constant.dtype, const.sizes(constant)
    unsigned = kind == ir.DataType.UINT8 and zero_point is not None and bool((zero_point == SYMMETRIC_ZERO_POINT).all())
    if kind in (ir.DataType.UINT8, ir.DataType.UINT4) and not unsigned:
        raise UnsupportedModelError(f"{name}: its weight codes are unsigned, and not around {SYMMETRIC_ZERO_POINT}")
    if kind not in (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.UINT8):
        raise UnsupportedModelError(f"{name}: its weight codes are {kind.name.lower()}")
    codes = const.changed(constant, _signed if unsigned else _int8, shape, ir.DataType.INT8)
    if not unsigned and zero_point is not None and zero_point.astype(np.int64).any():
        raise UnsupportedModelError(f"{name}: its weight is asymmetric (zero point is not 0)")
    scale = _scale_of(node)
    axis = node.attributes.get_int("axis", 1)
    if axis < 0:
        axis += len(shape)
    block = node.attributes.get_int("block_size", 0)
    weight = QuantizedWeight(codes, scale, axis, 4 if kind == ir.DataType.INT4 else 8, unsigned=unsigned)
    if block:
        return _blocked(weight, block, name)
    if scale.size == 1 and 0 <= axis < len(shape):
        weight = replace(weight, scale=np.full(shape[axis], scale.reshape(-1)[0], np.float32))
    if weight.scale.ndim != 1 or not 0 <= axis < len(shape) or shape[axis] != len(weight.scale):
        raise UnsupportedModelError(f"{name}: {scale.size} scales do not fit a weight of shape {shape}")
    return weight


def _int8(codes: NDArray[Any]) -> NDArray[np.int8]:
    return codes.astype(np.int8)


def _signed(codes: NDArray[Any]) -> NDArray[np.int8]:
    return (codes.astype(np.int16) - SYMMETRIC_ZERO_POINT).astype(np.int8)


def _blocked(weight: QuantizedWeight, block: int, name: str) -> QuantizedWeight:
    """A matrix whose runs of `block` codes along its axis so far, its inputs, have a scale each."""
    axis, shape = weight.axis, weight.shape
    if len(shape) != 2 or not 0 <= axis < 2 or block < 0 or shape[axis] % block:
        raise UnsupportedModelError(f"{name}: blocks of {block} do not divide a weight of shape {shape}")
    wanted = list(shape)
    wanted[axis] //= block
    if weight.scale.shape != tuple(wanted):
        raise UnsupportedModelError(f"{name}: scales of shape {weight.scale.shape} do not fit blocks of {block}")
    return replace(weight, axis=1 - axis, block=block, unsigned=False)


def _dequantize_bias(node: ir.Node, codes: NDArray[np.generic]) -> NDArray[np.float32]:
    name = printable(str(node.name))
    scale, zero_point = _scale_of(node), _zero_point_of(node)
    if codes.ndim != 1 or scale.size not in (1, codes.size):
        raise UnsupportedModelError(f"{name}: int32 codes that are not a bias with one scale per output")
    if zero_point is not None and zero_point.any():
        raise UnsupportedModelError(f"{name}: its bias is asymmetric (zero point is not 0)")
    return codes.astype(np.float32) * scale


def _restore_constant(graph: ir.Graph, node: ir.Node, data: np.ndarray | ir.LazyTensor) -> str:
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
    """The name of the float value that a QuantizeLinear → [Clip] → DequantizeLinear chain stands for, and its grid.

    Signed codes are read as unsigned ones: 128 more, which leaves the real numbers as they are.
    """
    name = printable(str(node.name))
    codes = node.inputs[0]
    producer = codes.producer() if codes is not None else None
    clip = producer if producer is not None and producer.op_type == "Clip" else None
    if clip is not None:
        producer = clip.inputs[0].producer() if clip.inputs[0] is not None else None
    if producer is None or producer.op_type != "QuantizeLinear":
        raise UnsupportedModelError(f"{name}: dequantizes something that no QuantizeLinear made")
    scale, zero_point, bits, lowest = _activation_grid(producer)
    if clip is not None:
        bits = min(bits, _clipped_bits(clip, lowest, name))
    back = _scale_of(node), _zero_point_of(node)
    if back[0].size != 1 or float(back[0].reshape(-1)[0]) != scale or _level(back[1]) != zero_point:
        raise UnsupportedModelError(f"{name}: the grids of its QuantizeLinear and DequantizeLinear differ")
    source = producer.inputs[0]
    assert source is not None
    return str(source.name), ActivationGrid(scale, zero_point - lowest, bits)


def _pad_reals(graph: ir.Graph, pad: ir.Node) -> None:
    """Write a Pad of codes, QuantizeLinear → [Clip] → Pad → DequantizeLinear, as one of reals between two pairs."""
    codes = pad.inputs[0] if pad.op_type == "Pad" else None
    producer = codes.producer() if codes is not None else None
    clip = producer if producer is not None and producer.op_type == "Clip" else None
    if clip is not None:
        producer = clip.inputs[0].producer() if clip.inputs[0] is not None else None
    if producer is None or producer.op_type != "QuantizeLinear":
        return
    name = printable(str(pad.name))
    value = pad.inputs[2] if len(pad.inputs) > 2 else None
    constant = None if value is None else const.array_or_none(value)
    # Left out, it is the code 0.
    level = None if value is not None and constant is None else _level(constant)
    constant_mode = pad.attributes.get_string("mode", "constant") == "constant"
    if not constant_mode or level != _level(_zero_point_of(producer)):
        raise UnsupportedModelError(f"{name}: pads codes with something else than their zero point")
    readers = list(pad.outputs[0].uses())
    if pad.outputs[0].is_graph_output() or [use.node.op_type for use in readers] != ["DequantizeLinear"]:
        raise UnsupportedModelError(f"{name}: codes that are padded and not dequantized then")
    dequantize = readers[0].node
    before = ir.node("DequantizeLinear", [codes, *producer.inputs[1:]])
    after = ir.node("QuantizeLinear", [pad.outputs[0], *producer.inputs[1:]])
    graph.insert_after(clip or producer, before)
    graph.insert_after(pad, after)
    pad.replace_input_with(0, before.outputs[0])
    if value is not None:
        pad.replace_input_with(2, None)
        pad.resize_inputs(2 if len(pad.inputs) == 3 else len(pad.inputs))
    written = after.outputs[0]
    if clip is not None:
        again = ir.node("Clip", [written, *clip.inputs[1:]])
        graph.insert_after(after, again)
        written = again.outputs[0]
    dequantize.replace_input_with(0, written)
    real, output = dequantize.outputs[0], pad.outputs[0]
    output.name, real.name = real.name, None
    output.type, output.shape = real.type, real.shape


def _clipped_bits(clip: ir.Node, lowest: int, name: str) -> int:
    """The bits that a Clip leaves of 8-bit codes, which count from `lowest`."""
    limits = [const.array_or_none(v) for v in clip.inputs[1:3]]
    low, high = (lowest - 1 if v is None else int(v.reshape(-1)[0]) for v in [*limits, None, None][:2])
    levels = high - lowest
    bits = max(levels, 0).bit_length()
    if low != lowest or not 2 <= bits <= 7 or levels != 2**bits - 1:
        raise UnsupportedModelError(f"{name}: a Clip of codes to other limits than 0 and 2^bits - 1, bits 2 to 7")
    return bits


def _activation_grid(quantize: ir.Node) -> tuple[float, int, int, int]:
    """(scale, zero_point, bits and lowest value of the code's type) of a QuantizeLinear.

    The type is that of the zero point.
    """
    name = printable(str(quantize.name))
    scale, zero_point = _scale_of(quantize), _zero_point_of(quantize)
    if zero_point is None:
        kind = ir.DataType(quantize.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)
    else:
        kind = ir.DataType.from_numpy(zero_point.dtype)
    if kind not in CODE_TYPES:
        known = ", ".join(k.name for k in CODE_TYPES)
        raise UnsupportedModelError(f"{name}: activation codes of type {kind.name}; {known} are read")
    if scale.size != 1 or (zero_point is not None and zero_point.size != 1):
        raise UnsupportedModelError(f"{name}: only per-tensor activation grids are read")
    return float(scale.reshape(-1)[0]), _level(zero_point), *CODE_TYPES[kind]


def _level(zero_point: NDArray[np.generic] | None) -> int:
    return 0 if zero_point is None else int(zero_point.reshape(-1)[0])


def _read_beside(quantize: ir.Node) -> bool:
    """Whether the value that is quantized is read as it is too."""
    source = quantize.inputs[0]
    return source is not None and any(use.node.op_type != "QuantizeLinear" for use in source.uses())


def _bypass(quantize: ir.Node) -> tuple[ir.Value, list[tuple[ir.Node, int]]]:
    """Cut a QuantizeLinear → [Clip] → DequantizeLinear chain out of the graph: the value that it was about, and what
    reads that instead of the chain's end now.
    """
    source = quantize.inputs[0]
    assert source is not None
    readers: list[tuple[ir.Node, int]] = []
    pending = [quantize.outputs[0]]
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            raise UnsupportedModelError(f"{printable(str(value.name))}: the graph has codes as its output")
        for use in list(value.uses()):
            if use.node.op_type == "Clip":
                pending.append(use.node.outputs[0])
            elif use.node.op_type == "DequantizeLinear":
                real = use.node.outputs[0]
                if real.is_graph_output():
                    # The output would have to lose its name or its grid; no file of ours rounds it.
                    raise UnsupportedModelError(f"{printable(str(real.name))}: the graph's output itself is quantized")
                readers += [(reader.node, reader.idx) for reader in real.uses()]
                real.replace_all_uses_with(source)
            else:
                raise UnsupportedModelError(f"{printable(str(use.node.name))}: {use.node.op_type} computes on codes")
    return source, readers
