"""Moving a graph to another opset: relabelled where no operator notices, converted where one does."""

from __future__ import annotations

import onnx_ir as ir
from onnx import checker, defs, shape_inference, version_converter

from efrapq.errors import UnsupportedModelError
from efrapq.graph.outside import set_aside, take_back

__all__ = ["IR_VERSIONS", "to_opset"]

# The IR version that goes with an opset (ONNX specification, Versioning).
IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}

# Operators that one version reads otherwise than the one before, with the same inputs and attributes.
REREAD = {"DFT": 20, "GridSample": 20}
# Values of attributes by the opset that brought them.
NEW_VALUES = {
    ("Pad", "mode"): {"wrap": 19},
    ("Resize", "coordinate_transformation_mode"): {"half_pixel_symmetric": 19},
    ("ScatterElements", "reduction"): {"max": 18, "min": 18},
    ("ScatterND", "reduction"): {"max": 18, "min": 18},
}


# Bytes of constants that the converter is given; a protobuf message holds 2 GiB.
MAX_MESSAGE = 1 << 30


def to_opset(model: ir.Model, opset: int) -> ir.Model:
    """The model at `opset`, with the IR version that belongs to it; the model given is not modified.

    A graph that uses something which `opset` cannot say keeps its own, newer one.
    """
    current = model.opset_imports[""]
    moved = model.clone()
    if current != opset:
        for node in moved.graph.all_nodes():
            _spell_out(node, current, opset)
        if all(_same_meaning(node, current, opset) for node in moved.graph.all_nodes()):
            moved.opset_imports[""] = opset
        elif current < opset:
            try:
                moved = _converted(model.clone(), opset)
            except (RuntimeError, ValueError, checker.ValidationError, shape_inference.InferenceError) as exc:
                raise UnsupportedModelError(
                    f"opset {current} could not be converted to {opset} ({exc}); export the model at opset {opset}"
                ) from exc
            for node in moved.graph.all_nodes():
                _spell_out(node, current, opset)
        else:
            moved = model.clone()
    moved.ir_version = IR_VERSIONS.get(moved.opset_imports[""], max(model.ir_version, 10))
    return moved


def _converted(model: ir.Model, opset: int) -> ir.Model:
    """By ONNX's converter; the model given loses its constants. Those too large for one message go around it."""
    lazy = [v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, ir.LazyTensor)]
    aside = set_aside(model.graph) if sum(tensor.nbytes for tensor in lazy) > MAX_MESSAGE else {}
    converted: ir.Model = ir.from_proto(version_converter.convert_version(ir.to_proto(model), opset))
    take_back(converted, aside)
    return converted


def _spell_out(node: ir.Node, current: int, wanted: int) -> None:
    """State what an older opset leaves unsaid and a newer one takes otherwise."""
    if node.domain not in ("", "ai.onnx"):
        return
    attributes = node.attributes
    if node.op_type == "RoiAlign" and current < 16 <= wanted:
        attributes["coordinate_transformation_mode"] = ir.AttrString(
            "coordinate_transformation_mode", "output_half_pixel"
        )
    elif node.op_type == "Split" and current < 18 <= wanted and (len(node.inputs) < 2 or node.inputs[1] is None):
        attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _same_meaning(node: ir.Node, current: int, wanted: int) -> bool:
    """Whether the node, as written, says the same thing in both opsets: each input and attribute exists in both, and
    neither reads them otherwise."""
    if node.domain not in ("", "ai.onnx"):
        return True
    low, high = sorted((current, wanted))
    if low < REREAD.get(node.op_type, 0) <= high:
        return False
    for (op_type, name), values in NEW_VALUES.items():
        if node.op_type == op_type and wanted < values.get(node.attributes.get_string(name, ""), 0):
            return False
    try:
        here = defs.get_schema(node.op_type, current, "")
        there = defs.get_schema(node.op_type, wanted, "")
    except defs.SchemaError:
        return False
    if here.since_version == there.since_version:
        return True
    inputs = len(node.inputs)
    return there.min_input <= inputs <= there.max_input and set(node.attributes) <= set(there.attributes)
