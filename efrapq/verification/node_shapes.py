"""Sizes behind one standard operator, by ONNX's own inference, and the small numbers that sizes are computed from.

A size that was dynamic is often computed in the graph: Shape, a few operators on its numbers, Reshape. With the inputs'
sizes known those numbers are, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

__all__ = ["Numbers", "computed_numbers", "inferred", "small_constants"]

# Value name → its numbers, for values small enough to be shapes, axes or sizes.
Numbers = dict[str, NDArray[Any]]
SMALL = 512
STANDARD = ("", "ai.onnx")
ARITHMETIC = frozenset(
    {
        "Abs", "Add", "And", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand",
        "Flatten", "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min",
        "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape",
        "Round", "Shape", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
    }
)  # fmt: skip


def small_constants(graph: onnx.GraphProto) -> Numbers:
    """The initializers that can be shapes, axes or sizes."""
    from onnx import TensorProto, numpy_helper

    kinds = (TensorProto.INT32, TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL)
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type in kinds and tensor.data_location != tensor.EXTERNAL and math.prod(tensor.dims) <= SMALL
    }


def inferred(
    node: onnx.NodeProto,
    dims: Mapping[str, tuple[int, ...]],
    types: Mapping[str, int],
    numbers: Numbers,
    opset: int,
) -> dict[str, tuple[int, tuple[int, ...] | None]]:
    """Output name → (element type, dimensions or None), from all that is known of the inputs; empty for operators that
    are not of the standard, for those with graphs in them, and where an input is unknown. types: TensorProto.DataType,
    float where there is none.
    """
    import onnx
    from onnx import helper, numpy_helper

    inputs = [name for name in node.input if name]
    if node.domain not in STANDARD or any(a.HasField("g") or a.graphs for a in node.attribute):
        return {}
    if any(name not in dims for name in inputs):
        return {}
    try:
        found = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(node.op_type, opset, ""),
            node,
            {name: helper.make_tensor_type_proto(types.get(name, 1), dims[name]) for name in inputs},
            {name: numpy_helper.from_array(numbers[name], name) for name in inputs if name in numbers},
            opset_imports=[helper.make_opsetid("", opset)],
        )
    except (
        onnx.checker.ValidationError,
        onnx.defs.SchemaError,
        onnx.shape_inference.InferenceError,
        RuntimeError,
        ValueError,
    ):
        return {}  # an unknown size is a result: the figures that need it are null
    return {name: (kind.tensor_type.elem_type, _sizes(kind)) for name, kind in found.items()}


def computed_numbers(
    node: onnx.NodeProto, dims: Mapping[str, tuple[int, ...]], numbers: Numbers, opset: int
) -> Numbers:
    """The numbers that a node makes of known ones, or of a known shape; empty where they are no small matter."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    if node.domain not in STANDARD or node.op_type not in ARITHMETIC:
        return {}
    if any(name not in dims or math.prod(dims[name]) > SMALL for name in node.output if name):
        return {}
    if node.op_type in ("Shape", "Size") and node.input[0] in dims:
        feeds: Numbers = {node.input[0]: np.broadcast_to(np.float32(0), dims[node.input[0]])}
    else:
        given = {name: numbers.get(name) for name in node.input if name}
        feeds = {name: array for name, array in given.items() if array is not None}
        if len(feeds) < len(given):
            return {}
    try:
        graph = helper.make_graph([node], "one", _unknown(list(feeds)), _unknown(list(node.output)))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        with np.errstate(all="ignore"):
            made = ReferenceEvaluator(model).run(None, feeds)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return {}  # whatever NumPy says of operators that make no sense
    return {name: np.asarray(array) for name, array in zip(node.output, made, strict=True) if name}


def _unknown(names: list[str]) -> list[onnx.ValueInfoProto]:
    import onnx

    return [onnx.ValueInfoProto(name=name) for name in names]


def _sizes(kind: onnx.TypeProto) -> tuple[int, ...] | None:
    if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    found = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.tensor_type.shape.dim]
    return tuple(found) if min(found, default=0) >= 0 else None
