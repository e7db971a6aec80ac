"""Which axis of an output counts classes: the one that the last layer before it makes.

A shape alone does not say: a detector's (N, 84, 8400) looks like a sequence of 84 scores over 8400 classes. The graph
does: Softmax names its axis, a convolution makes the second one, a matrix product the last. What lies behind them is
followed as long as it moves values without mixing them; a Sigmoid there means that the values exclude each other not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

__all__ = ["ClassAxis", "class_axes"]

# Operators of one value that keep every axis as it is. Where one takes away or adds values, or reshapes, the number
# of classes tells whether the axis is still the same.
KEEPING = frozenset(
    {
        "AveragePool", "BatchNormalization", "Cast", "Clip", "DequantizeLinear", "Dropout", "Elu", "Flatten", "Gelu",
        "HardSwish", "Identity", "LeakyRelu", "LpPool", "MaxPool", "Pad", "PRelu", "QuantizeLinear", "Relu", "Reshape",
        "Resize", "Slice", "Squeeze", "Unsqueeze", "Upsample",
    }
)  # fmt: skip
SUMS = frozenset({"Add", "Sub", "Sum"})
PRODUCTS = frozenset({"Mul", "Div"})
SOFTMAXES = frozenset({"Softmax", "LogSoftmax"})
# From here on their axis counts from the end, and is the last one where it is not named.
SOFTMAX_OPSET = 13


@dataclass(frozen=True)
class ClassAxis:
    """axis: of the output, from the end where it is negative. count: of classes; None if not known."""

    axis: int
    count: int | None = None

    def of(self, shape: Sequence[int]) -> int | None:
        """The axis of an output of this shape, from its front; None if that has no such classes: fewer than two, or
        samples instead.
        """
        axis = self.axis + len(shape) if self.axis < 0 else self.axis
        if not 0 < axis < len(shape) or shape[axis] < 2 or self.count not in (None, shape[axis]):
            return None
        return axis


def class_axes(proto: onnx.ModelProto) -> dict[str, ClassAxis]:
    """Output name → its axis of classes, for the outputs that have one. proto: a float model, as it was imported."""
    graph = proto.graph
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), SOFTMAX_OPSET)
    producers = {name: node for node in graph.node for name in node.output if name}
    constants = {t.name: tuple(t.dims) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = _constant_dims(node)
    found = {output.name: _trace(output.name, producers, constants, opset) for output in graph.output}
    return {name: axis for name, axis in found.items() if axis is not None}


def _trace(
    value: str, producers: Mapping[str, onnx.NodeProto], constants: Mapping[str, tuple[int, ...]], opset: int
) -> ClassAxis | None:
    """From an output back to what makes its classes."""
    transposed: list[tuple[int, ...]] = []  # the orders of axes on the way, the last one first
    for _ in range(len(producers)):
        node = producers.get(value)
        if node is None or not node.input or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type in SOFTMAXES:
            axis = _attribute(node, "axis", -1 if opset >= SOFTMAX_OPSET else 1)
            return _moved(ClassAxis(axis), transposed)
        made = _made_by(node, constants)
        if made is not None:
            return _moved(made, transposed)
        if node.op_type == "Transpose":
            order = tuple(next((a.ints for a in node.attribute if a.name == "perm"), ()))
            if not order:
                return None
            transposed.append(order)
            value = node.input[0]
        elif node.op_type in KEEPING:
            value = node.input[0]
        elif node.op_type in SUMS | PRODUCTS:
            varying = [name for name in node.input if name not in constants]
            if not varying or (node.op_type in PRODUCTS and len(varying) > 1):
                return None
            value = varying[0]
        else:
            return None
    return None


def _made_by(node: onnx.NodeProto, constants: Mapping[str, tuple[int, ...]]) -> ClassAxis | None:
    """The axis that a linear layer makes, and how long; None for anything else."""
    weight = constants.get(node.input[1]) if len(node.input) > 1 else None
    if weight is None or len(weight) < 2:
        return None
    if node.op_type == "Conv":
        return ClassAxis(1, weight[0])
    if node.op_type == "ConvTranspose":
        return ClassAxis(1, weight[1] * _attribute(node, "group", 1))
    if node.op_type == "Gemm":
        return ClassAxis(1, weight[0] if _attribute(node, "transB", 0) else weight[1])
    return ClassAxis(-1, weight[-1]) if node.op_type == "MatMul" else None


def _moved(found: ClassAxis, transposed: Sequence[tuple[int, ...]]) -> ClassAxis | None:
    """Where the axis lies in the output, behind these transpositions, the one nearest to the output first."""
    axis = found.axis
    for order in reversed(transposed):
        axis = axis + len(order) if axis < 0 else axis
        if axis not in order:
            return None
        axis = order.index(axis)
    return ClassAxis(axis, found.count)


def _constant_dims(node: onnx.NodeProto) -> tuple[int, ...]:
    return next((tuple(a.t.dims) for a in node.attribute if a.name == "value"), ())


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)
