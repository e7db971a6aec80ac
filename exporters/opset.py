"""Moving a graph to another opset: relabelled where no operator notices, converted where one does."""

from __future__ import annotations

import onnx_ir as ir
from onnx import checker, defs, shape_inference, version_converter

from efrapq.errors import UnsupportedModelError

__all__ = ["IR_VERSIONS", "to_opset"]

# The IR version that goes with an opset (ONNX specification, Versioning).
IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}


def to_opset(model: ir.Model, opset: int) -> ir.Model:
    """The model at `opset`, with the IR version that belongs to it; the model given is not modified.

    A graph that uses something which `opset` cannot say keeps its own, newer one.
    """
    current = model.opset_imports[""]
    moved = model.clone()
    if current != opset:
        if all(_same_meaning(node, current, opset) for node in model.graph.all_nodes()):
            moved.opset_imports[""] = opset
        elif current < opset:
            try:
                moved = ir.from_proto(version_converter.convert_version(ir.to_proto(model), opset))
            except (RuntimeError, ValueError, checker.ValidationError, shape_inference.InferenceError) as exc:
                raise UnsupportedModelError(
                    f"opset {current} could not be converted to {opset} ({exc}); export the model at opset {opset}"
                ) from exc
    moved.ir_version = IR_VERSIONS.get(moved.opset_imports[""], max(model.ir_version, 10))
    return moved


def _same_meaning(node: ir.Node, current: int, wanted: int) -> bool:
    """Whether the node, as written, says the same thing in both opsets: each input and attribute exists in both."""
    if node.domain not in ("", "ai.onnx"):
        return True
    try:
        here = defs.get_schema(node.op_type, current, "")
        there = defs.get_schema(node.op_type, wanted, "")
    except defs.SchemaError:
        return False
    if here.since_version == there.since_version:
        return True
    inputs = len(node.inputs)
    return there.min_input <= inputs <= there.max_input and set(node.attributes) <= set(there.attributes)
