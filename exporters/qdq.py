"""The QuantizeLinear/DequantizeLinear nodes that all targets share, and the one function that writes them.

Names say what a value was in the float graph: `w.codes` → DequantizeLinear → `w`; `x` → QuantizeLinear → `x.codes` →
DequantizeLinear → `x.real`. `efrapq.exporters.readback` relies on the structure only, never on the names.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from efrapq.exporters.guard import GUARD_KEY, Guard, Watched, guard_of
from efrapq.exporters.guard_nodes import guard_nodes
from efrapq.exporters.opset import to_opset
from efrapq.exporters.profile import Profile
from efrapq.exporters.saturation import saturating_layers
from efrapq.exporters.shapes import fix_shapes
from efrapq.graph import constants as const
from efrapq.graph.copies import copied_from
from efrapq.graph.layers import Layer, bias_array
from efrapq.graph.outside import put_outside
from efrapq.graph.placement import activation_after, pads_with_zero
from efrapq.graph.prepare import name_nodes
from efrapq.graph.quantized import QuantizedModel, QuantizedWeight
from efrapq.grid import ActivationGrid
from efrapq.io.onnx_data import OnnxParts

__all__ = ["INT4_OPSET", "INT8_OPSET", "build", "build_parts"]

INT8_OPSET = 17
INT4_OPSET = 21
SETTINGS_KEY = "efrapq.settings"
# A signed code is the unsigned one less this.
SIGNED = 128


def build(quantized: QuantizedModel, profile: Profile) -> onnx.ModelProto:
    """Write the QDQ graph of a quantized model for one target. The quantized model is not modified."""
    return _finished(_built(quantized, profile), quantized, profile)


def build_parts(quantized: QuantizedModel, profile: Profile, most: int) -> OnnxParts:
    """The same with the large constants outside, where all constants together have more than `most` bytes."""
    model = _built(quantized, profile)
    outside = put_outside(model.graph) if sum(_bytes(v) for v in model.graph.initializers.values()) > most else {}
    return OnnxParts(_finished(model, quantized, profile), outside)


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes


def _finished(model: ir.Model, quantized: QuantizedModel, profile: Profile) -> onnx.ModelProto:
    proto = ir.to_proto(model)
    # Sizes of the values between: every reader infers them, and in small networks they are a tenth of the file.
    del proto.graph.value_info[:]
    return fix_shapes(proto, quantized.metadata) if profile.fixed_shapes else proto


def _built(quantized: QuantizedModel, profile: Profile) -> ir.Model:
    grids = {name: profile.grid(grid) for name, grid in quantized.activations.items()}
    int4 = {layer.name for layer in quantized.layers if _is_int4(layer, quantized, profile)}
    uint4 = profile.four_bit_activations == "uint4" and any(grid.bits == 4 for grid in grids.values())
    blocks = any(weight.block for weight in quantized.weights.values())
    model = to_opset(quantized.model, INT4_OPSET if int4 or uint4 or blocks else INT8_OPSET)
    # A conversion adds nodes without names; reading back would name them, and the file written again would differ.
    name_nodes(model.graph)
    writer = _Writer(model.graph, quantized, profile, grids, int4, model.opset_imports[""])
    writer.write()
    guard = writer.write_guard()
    model.producer_name, model.producer_version = "efrapq", ""
    model.metadata_props.clear()
    model.metadata_props.update(dict(sorted(quantized.metadata.items())))
    if SETTINGS_KEY in model.metadata_props:
        model.metadata_props[SETTINGS_KEY] = _retarget(model.metadata_props[SETTINGS_KEY], profile.name)
    model.metadata_props.pop(GUARD_KEY, None)
    if guard is not None:
        model.metadata_props[GUARD_KEY] = guard.to_json()
    model.metadata_props["efrapq.target"] = profile.name
    model.metadata_props["efrapq.bits"] = json.dumps({n: w.bits for n, w in quantized.weights.items()})
    return model


def _is_int4(layer: Layer, quantized: QuantizedModel, profile: Profile) -> bool:
    """Whether the target takes this layer's codes as int4. Where it does not, they are stored as int8."""
    if quantized.weights[layer.name].container_bits != 4 or layer.op_type not in profile.int4_ops:
        return False
    if profile.int4_beside == "any":
        return True
    inside = layer.input in quantized.activations
    if profile.int4_beside == "float":
        return not inside
    output = (activation_after(layer.node.outputs[0]) or layer.node).outputs[0]
    return inside and output.name in quantized.activations


def _retarget(record: str, target: str) -> str:
    """The settings record with this file's target; a record that says it already, or is none of ours, as it is."""
    try:
        settings = json.loads(record)
    except (ValueError, RecursionError):
        return record
    if not isinstance(settings, dict) or settings.get("target", target) == target:
        return record
    return json.dumps(settings | {"target": target}, sort_keys=True)


class _Writer:
    def __init__(
        self,
        graph: ir.Graph,
        quantized: QuantizedModel,
        profile: Profile,
        grids: dict[str, ActivationGrid],
        int4: set[str],
        opset: int,
    ) -> None:
        self.graph = graph
        self.quantized = quantized
        self.profile = profile
        self.grids = grids
        self.int4 = int4
        self.opset = opset
        self.unsigned = {s.layer for s in saturating_layers(quantized)} if profile.unsigned_weights else set()
        self.nodes = {str(node.name): node for node in graph}
        self.node_names = set(self.nodes)
        self.parameters: dict[ActivationGrid, tuple[ir.Value, ir.Value]] = {}
        self.limits: dict[int, ir.Value] = {}
        # Whose values are quantized in their place.
        self.copies: list[ir.Value] = []
        # By the name of what a Pad makes: the codes that it pads, their scale and zero_point.
        self.padded: dict[str, tuple[ir.Value, ir.Value, ir.Value]] = {}
        self.guard = guard_of(quantized.metadata) if profile.guards else None
        # Codes that can be at an end of their grid.
        self.watched: list[tuple[ir.Value, Watched]] = []

    @property
    def offset(self) -> int:
        """What a stored activation code lies below the grid's own, which counts from 0."""
        return SIGNED if self.profile.signed_activations else 0

    def write(self) -> None:
        for layer in self.quantized.layers:
            node = self.nodes[layer.node_name]
            weight = self.quantized.weights[layer.name]
            self._write_weight(node, layer, weight)
            if layer.op_type in self.profile.int32_bias_ops and layer.input in self.grids:
                self._write_bias(node, layer, weight)
        values = {str(v.name): v for v in self.graph.inputs}
        values |= {str(o.name): o for node in self.graph for o in node.outputs}
        for name, grid in self.grids.items():
            if name in self.padded:
                self._write_padded(values[name])
            else:
                self._write_activation(values[name], grid)
        for copy in self.copies:
            identity = copy.producer()
            assert identity is not None
            self.graph.remove(identity, safe=True)
        self.graph.sort()

    def constant(self, name: str, data: np.ndarray | ir.LazyTensor) -> ir.Value:
        return const.initializer(self.graph, const.fresh_name(self.graph, name), data)

    def emit(
        self, op: str, inputs: list[ir.Value], wanted: str, dtype: ir.DataType, **attributes: int | list[int]
    ) -> ir.Value:
        name = const.fresh_name(self.graph, wanted)
        node_name = name
        while node_name in self.node_names:
            node_name += "_"
        self.node_names.add(node_name)
        node = ir.node(op, inputs, attributes, name=node_name)
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(dtype)
        self.graph.append(node)
        return node.outputs[0]

    def _write_weight(self, node: ir.Node, layer: Layer, weight: QuantizedWeight) -> None:
        old = node.inputs[1]
        assert old is not None
        node.replace_input_with(1, None)
        del self.graph.initializers[str(old.name)]
        four = layer.name in self.int4
        shift = SIGNED if layer.name in self.unsigned else 0
        element = ml_dtypes.int4 if four else np.uint8 if shift else np.int8
        codes = self.constant(f"{old.name}.codes", _stored(weight, shift, element))
        if four and self.profile.int4_through_cast and not weight.block:
            codes = self.emit("Cast", [codes], f"{old.name}.int8", ir.DataType.INT8, to=int(ir.DataType.INT8))
            element = np.int8
        scale = self.constant(f"{old.name}.scale", weight.scale)
        zero_point = self.constant(f"{old.name}.zero_point", np.full(weight.scale.shape, shift, element))
        along = {"axis": 1 - weight.axis, "block_size": weight.block} if weight.block else {"axis": weight.axis}
        real = self.emit("DequantizeLinear", [codes, scale, zero_point], str(old.name), ir.DataType.FLOAT, **along)
        real.shape = ir.Shape(weight.shape)
        node.replace_input_with(1, real)

    def _write_bias(self, node: ir.Node, layer: Layer, weight: QuantizedWeight) -> None:
        bias = bias_array(self.graph, layer)
        if bias is None:
            return
        old = node.inputs[2]
        assert old is not None
        groups = len(bias) // len(weight.scale)
        step = np.tile(weight.scale, groups) * np.float32(self.grids[layer.input].scale)
        codes = _bias_codes(bias, step)
        node.replace_input_with(2, None)
        if not old.uses():
            del self.graph.initializers[str(old.name)]
        name = const.fresh_name(self.graph, str(old.name))
        codes_value = self.constant(f"{old.name}.codes", codes)
        scale = self.constant(f"{old.name}.scale", step.astype(np.float32))
        real = self.emit("DequantizeLinear", [codes_value, scale], name, ir.DataType.FLOAT, axis=0)
        node.replace_input_with(2, real)

    def _grid_constants(self, name: str, grid: ActivationGrid) -> tuple[ir.Value, ir.Value]:
        """Scale and zero_point initializers; values on the same grid share them."""
        if grid not in self.parameters:
            uint4 = grid.bits == 4 and self.profile.four_bit_activations == "uint4"
            element = ml_dtypes.uint4 if uint4 else np.int8 if self.profile.signed_activations else np.uint8
            zero_point = np.array(grid.zero_point - self.offset).astype(element)
            self.parameters[grid] = (
                self.constant(f"{name}.scale", np.array(grid.scale, np.float32)),
                self.constant(f"{name}.zero_point", zero_point),
            )
        return self.parameters[grid]

    def _write_activation(self, value: ir.Value, grid: ActivationGrid) -> None:
        if grid.bits < 8 and self.profile.four_bit_activations == "clip":
            value = self._without_upper_limit(value, grid)
        readers = list(value.uses())
        name = str(value.name)
        scale, zero_point = self._grid_constants(name, grid)
        dtype = zero_point.dtype
        assert dtype is not None
        source = copied_from(value)
        if source is not None:
            self.copies.append(value)
        codes = self.emit("QuantizeLinear", [source or value, scale, zero_point], f"{name}.codes", dtype)
        if self.guard is not None and name in self.guard.watched:
            self.watched.append((codes, self.guard.watched[name]))
        if grid.bits < 8 and dtype != ir.DataType.UINT4:
            low = self._limit(-self.offset)
            high = self._limit(grid.qmax - self.offset)
            codes = self.emit("Clip", [codes, low, high], f"{name}.clipped", dtype)
        pads = [use for use in readers if self._pads_codes(use, grid)]
        for use in pads:
            self.padded[str(use.node.outputs[0].name)] = codes, scale, zero_point
        readers = [use for use in readers if use not in pads]
        if not readers:
            return
        real = self.emit("DequantizeLinear", [codes, scale, zero_point], f"{name}.real", ir.DataType.FLOAT)
        real.shape = value.shape
        for use in readers:
            use.node.replace_input_with(use.idx, real)

    def write_guard(self) -> Guard | None:
        """The output that counts what arrived at an end of its grid, and what it is; None where nothing is watched."""
        if self.guard is None or not self.watched:
            return None
        count = guard_nodes(self, self.guard.output, self.watched, -self.offset, 255 - self.offset)
        first = self.graph.inputs[0].shape
        count.shape = ir.Shape([first[0] if first is not None else None])
        self.graph.outputs.append(count)
        self.graph.sort()
        return replace(self.guard, output=str(count.name))

    def _pads_codes(self, use: Any, grid: ActivationGrid) -> bool:
        """Whether the reader is a Pad with zeros whose output is on the same grid, and nothing but an activation."""
        output = use.node.outputs[0]
        return (
            self.profile.pads_codes
            and use.node.op_type == "Pad"
            and use.idx == 0
            and pads_with_zero(use.node)
            and self.grids.get(str(output.name)) == grid
            and not output.is_graph_output()
        )

    def _write_padded(self, output: ir.Value) -> None:
        """Pad the codes with the zero point: ONNX Runtime takes no pair away from around a Pad, as it does from around
        other operators that move values.
        """
        name = str(output.name)
        codes, scale, zero_point = self.padded[name]
        pad = output.producer()
        assert pad is not None
        readers = list(output.uses())
        old = pad.inputs[2] if len(pad.inputs) > 2 else None
        pad.resize_inputs(max(len(pad.inputs), 3))
        pad.replace_input_with(0, codes)
        pad.replace_input_with(2, zero_point)
        if old is not None and not old.uses() and old.name in self.graph.initializers:
            del self.graph.initializers[str(old.name)]
        output.name = const.fresh_name(self.graph, f"{name}.codes")
        output.type = codes.type
        real = self.emit("DequantizeLinear", [output, scale, zero_point], name, ir.DataType.FLOAT)
        real.shape = output.shape
        for use in readers:
            use.node.replace_input_with(use.idx, real)

    def _without_upper_limit(self, value: ir.Value, grid: ActivationGrid) -> ir.Value:
        """The value made by a Relu instead of a Clip, where the grid saturates no later than the Clip does.

        ONNX Runtime fuses a Clip into the layer before it only if all 256 codes of the QuantizeLinear lie within the
        Clip's limits, and of a grid of fewer bits in uint8 they do not. A Relu it fuses wherever zero_point is 0.
        """
        clip = value.producer()
        if clip is None or clip.op_type != "Clip" or grid.zero_point != 0 or value.is_graph_output():
            return value
        low, high = (const.array_or_none(v) for v in (*clip.inputs[1:], None, None)[:2])
        if low is None or high is None or float(low.reshape(-1)[0]) != 0.0:
            return value
        if np.rint(np.float32(high.reshape(-1)[0]) / np.float32(grid.scale)) < grid.qmax:
            return value
        limits = clip.inputs[1:]
        relu = ir.node("Relu", [clip.inputs[0]], name=clip.name)
        relu.outputs[0].name, relu.outputs[0].type, relu.outputs[0].shape = value.name, value.type, value.shape
        self.graph.insert_after(clip, relu)
        value.replace_all_uses_with(relu.outputs[0])
        self.graph.remove(clip, safe=True)
        for limit in limits:
            if limit is not None and limit.name in self.graph.initializers and not limit.uses():
                del self.graph.initializers[str(limit.name)]
        return relu.outputs[0]

    def _limit(self, level: int) -> ir.Value:
        """The shared constant that a Clip of activation codes needs."""
        if level not in self.limits:
            element = np.int8 if self.profile.signed_activations else np.uint8
            self.limits[level] = self.constant(f"efrapq.level_{level}", np.array(level, element))
        return self.limits[level]


def _stored(weight: QuantizedWeight, shift: int, element: Any) -> NDArray[np.generic] | ir.LazyTensor:
    """The codes as the file holds them: `shift` above what they are, of NumPy's type `element`."""

    def converted(codes: NDArray[np.int8]) -> NDArray[np.generic]:
        shifted = codes.astype(np.int16) + shift if shift else codes
        return shifted.astype(element, copy=False)

    if isinstance(weight.stored, np.ndarray):
        return converted(weight.stored)
    return const.changed(weight.stored, converted, weight.shape, ir.DataType.from_numpy(np.dtype(element)))


def _bias_codes(bias: NDArray[np.float32], step: NDArray[np.float32]) -> NDArray[np.int32]:
    """int32 codes of a bias. Beyond 22 significant bits they are rounded: a longer code would not come back from the
    float32 that it is read into, and the same file exported again would differ.
    """
    codes = np.rint(bias.astype(np.float64) / step)
    spacing = 2.0 ** np.maximum(np.frexp(codes)[1] - 22, 0)
    rounded: NDArray[np.float64] = np.rint(codes / spacing) * spacing
    return np.clip(rounded, -(2**31), 2**31 - 1).astype(np.int32)
