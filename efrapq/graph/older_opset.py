"""Models of older opsets, brought up to a newer one.

The converter of ONNX does most of it. What it renames without saying what the older form meant is put right here:
Resize counted pixels from the corner before opset 11, and Hardmax took all axes from the given one on together before
opset 13. (ONNX operator changelog; ONNX Runtime's kernels of these versions.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from efrapq.errors import UnsupportedModelError
from efrapq.graph.dialect import all_graphs
from efrapq.io.text import printable

if TYPE_CHECKING:
    import onnx

__all__ = ["at_least"]


def at_least(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The model at `opset` or its own newer one; the proto is not modified. opset: 13 or newer.

    Raises UnsupportedModelError where it cannot be converted.
    """
    import onnx
    from onnx import checker, shape_inference, version_converter

    current = next((o.version for o in proto.opset_import if o.domain == ""), 0)
    if current >= opset or current == 0:
        return proto
    plain = onnx.ModelProto.FromString(proto.SerializeToString())
    _flatten_hardmax(plain)
    try:
        converted: onnx.ModelProto = version_converter.convert_version(plain, opset)
    except (RuntimeError, ValueError, checker.ValidationError, shape_inference.InferenceError) as exc:
        reason = printable((str(exc).strip().splitlines() or [type(exc).__name__])[0])
        raise UnsupportedModelError(
            f"opset {current} could not be converted to {opset} ({reason}); export it again with opset {opset} or newer"
        ) from exc
    if current < 11:
        _count_from_the_corner(converted)
    return converted


def _flatten_hardmax(proto: onnx.ModelProto) -> None:
    """Hardmax over all axes from the given one on: of the matrix that has them in its rows."""
    from onnx import helper

    for graph in all_graphs(proto.graph):
        for index in reversed([i for i, node in enumerate(graph.node) if node.op_type == "Hardmax"]):
            node = graph.node[index]
            axis = next((int(a.i) for a in node.attribute if a.name == "axis"), 1)
            source, result = node.input[0], node.output[0]
            shape, flat, chosen = (f"{result}_{what}" for what in ("shape", "matrix", "hardmax"))
            around = [
                helper.make_node("Shape", [source], [shape]),
                helper.make_node("Flatten", [source], [flat], axis=axis),
                helper.make_node("Hardmax", [flat], [chosen], name=node.name, axis=1),
                helper.make_node("Reshape", [chosen, shape], [result]),
            ]
            del graph.node[index]
            for made in reversed(around):
                graph.node.insert(index, made)


def _count_from_the_corner(proto: onnx.ModelProto) -> None:
    from onnx import helper, numpy_helper

    for graph in all_graphs(proto.graph):
        constants = {tensor.name: tensor for tensor in graph.initializer}
        constants |= {
            node.output[0]: attribute.t
            for node in graph.node
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        }
        for node in graph.node:
            if node.op_type != "Resize":
                continue
            scales = constants.get(node.input[2]) if len(node.input) > 2 else None
            shrinks = scales is not None and bool((numpy_helper.to_array(scales) < 1).any())
            node.attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
            node.attribute.append(helper.make_attribute("nearest_mode", "ceil" if shrinks else "floor"))
