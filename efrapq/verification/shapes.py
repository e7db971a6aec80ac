"""Sizes of the values of an optimized graph, for one sample, from inferred shapes.

ONNX Runtime renames what it rewrites and records no shapes behind its own layout changes (channels last, NCHWc), so
the file's shapes are inferred by onnx and carried through the operators that appear only in the optimized graph, and
through all others by what ONNX says of each (`node_shapes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from efrapq.verification.node_shapes import computed_numbers, inferred, small_constants

if TYPE_CHECKING:
    import onnx

__all__ = ["Shape", "Shapes", "attributes", "graph_shapes"]

Shape = tuple[int, ...]
NCHWC = "com.microsoft.nchwc"
# Tensors that can be shapes, axes or sizes: inference reads their values, those of larger ones it never needs.
READ_BY_INFERENCE = 4096
SAME_AS_FIRST = frozenset(
    {
        "QuantizeLinear", "DequantizeLinear", "Cast", "Relu", "Clip", "Identity", "Sigmoid", "QLinearSigmoid",
        "QLinearLeakyRelu", "QLinearSoftmax", "Softmax", "Gelu", "BiasGelu", "FastGelu", "QuickGelu",
        "LayerNormalization", "SkipLayerNormalization",
    }
)  # fmt: skip
BROADCAST = {"Add": (0, 1), "Mul": (0, 1), "Sub": (0, 1), "QLinearAdd": (0, 3), "QLinearMul": (0, 3)}
POOLS = frozenset({"MaxPool", "NhwcMaxPool", "AveragePool", "QLinearAveragePool"})
# Products of matrices → the position of the second.
PRODUCTS = {"FusedMatMul": 1, "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1, "QGemm": 3}
FLOATS_OF_INTEGERS = frozenset({"MatMulIntegerToFloat", "DynamicQuantizeMatMul"})
GLOBAL_POOLS = frozenset({"GlobalAveragePool", "GlobalMaxPool", "QLinearGlobalAveragePool"})
CONVS = frozenset({"Conv", "FusedConv", "QLinearConv", "ConvInteger", "NhwcFusedConv"})


@dataclass(frozen=True)
class Shapes:
    """dims: value name → dimensions, for the values that are known. types: value name → element type
    (TensorProto.DataType), 0 or missing where it is not known. batch: the samples that these dimensions hold.
    """

    dims: Mapping[str, Shape]
    types: Mapping[str, int]
    batch: int = 1


def graph_shapes(
    original: onnx.ModelProto, optimized: onnx.ModelProto, inputs: Mapping[str, Sequence[int]] | None = None
) -> Shapes:
    """Shapes of the optimized graph's values. inputs: sizes of dynamic dimensions, input name → dimensions.

    The first dimension of an input counts samples: one where it is dynamic, else as many as the first input says. Once
    it is dynamic in one of them it is in all: others carry the batch further behind, or none.
    """
    known, batch = _inferred(original, inputs or {})
    symbols = _symbols(optimized, known)
    stated = [*optimized.graph.input, *optimized.graph.value_info, *optimized.graph.output]
    recorded = {v.name: shape for v in stated if (shape := _concrete(v, symbols)) is not None}
    dims = {n: known[n] for v in optimized.graph.input if (n := v.name) in known}
    types = _walk(optimized, dims, partial(_carried, known=known), recorded | known)
    return Shapes(dims, types, batch)


def _walk(
    model: onnx.ModelProto,
    dims: dict[str, Shape],
    first: Callable[[onnx.NodeProto, Mapping[str, Shape]], Shape | None],
    otherwise: Mapping[str, Shape],
) -> dict[str, int]:
    """Add the sizes of all values to `dims`, which has the inputs', node by node; returns the element types.

    first: what knows an operator's first output before ONNX's inference is asked. otherwise: sizes where that fails.
    """
    graph = model.graph
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    stated = [*graph.input, *graph.value_info, *graph.output]
    types = {v.name: v.type.tensor_type.elem_type for v in stated if v.type.tensor_type.elem_type}
    types |= {t.name: t.data_type for t in graph.initializer}
    dims |= {t.name: tuple(t.dims) for t in graph.initializer}
    numbers = small_constants(graph)
    for node in graph.node:
        told = first(node, dims)
        by_schema = inferred(node, dims, types, numbers, opset)
        for position, name in enumerate(node.output):
            kind, shape = by_schema.get(name, (0, None))
            if told is not None and not position:
                shape = told
            elif shape is None:
                shape = otherwise.get(name)
            if name and shape is not None:
                dims[name] = shape
            if name:
                types.setdefault(name, kind or _output_type(node, types))
        numbers |= computed_numbers(node, dims, numbers, opset)
    return types


def _output_type(node: onnx.NodeProto, types: Mapping[str, int]) -> int:
    """For values whose type the optimized graph does not record: the runtime's own operators. 0 if unknown. QGemm gives
    floats unless it has a scale for its output.
    """
    if node.op_type == "QuantizeLinear" and len(node.input) > 2:
        return types.get(node.input[2], 2)
    if node.op_type == "DequantizeLinear":
        return types.get(node.input[1], 1)
    if node.op_type in FLOATS_OF_INTEGERS or (node.op_type == "QGemm" and not "".join(node.input[7:])):
        return 1
    return types.get(node.input[0], 0) if node.input else 0


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The node's attributes as Python values."""
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _inferred(original: onnx.ModelProto, inputs: Mapping[str, Sequence[int]]) -> tuple[dict[str, Shape], int]:
    """What onnx infers with the inputs' sizes filled in, and how many samples the first input holds."""
    import onnx

    slim = _without_weights(original)
    constants = {t.name for t in slim.graph.initializer}
    fed = [v for v in slim.graph.input if v.name not in constants]
    batch = _batch([[d.dim_value for d in v.type.tensor_type.shape.dim] for v in fed])
    for value in fed:
        dims = value.type.tensor_type.shape.dim
        sizes = inputs.get(value.name, ())
        for axis, dim in enumerate(dims):
            if dim.dim_value > 0:
                continue
            if axis == 0:
                dim.dim_value = 1
            elif len(sizes) == len(dims):
                dim.dim_value = sizes[axis]
    try:
        # Without data propagation, which computes a vast Range number by number; `_walk` follows what is small.
        slim = onnx.shape_inference.infer_shapes(slim)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return {}, batch  # unknown shapes are a result: the figures that need them are null
    values = [*slim.graph.input, *slim.graph.value_info, *slim.graph.output]
    known = {v.name: shape for v in values if (shape := _concrete(v, {})) is not None}
    dims = {v.name: known[v.name] for v in slim.graph.input if v.name in known}
    _walk(slim, dims, lambda node, dims: None, known)
    return dims, batch


def _batch(shapes: Sequence[Sequence[int]]) -> int:
    """How many samples a run of the inputs with these sizes holds; 0 stands for a dynamic one."""
    if not shapes or len(shapes[0]) < 2 or any(shape and shape[0] < 1 for shape in shapes):
        return 1
    return shapes[0][0]


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which large constants keep only their type and dimensions, and the values between forget theirs."""
    import onnx

    slim = onnx.ModelProto(ir_version=model.ir_version)
    slim.opset_import.extend(model.opset_import)
    slim.functions.extend(model.functions)
    slim.graph.name = model.graph.name
    slim.graph.node.extend(model.graph.node)
    slim.graph.input.extend(model.graph.input)
    slim.graph.output.extend(model.graph.output)
    for value in slim.graph.output:
        # A recorded output size may hold a dimension name that contradicts the sizes filled in.
        value.type.tensor_type.ClearField("shape")
    fed = {v.name for v in slim.graph.input}
    for tensor in model.graph.initializer:
        if tensor.data_location != tensor.EXTERNAL and tensor.ByteSize() <= READ_BY_INFERENCE:
            slim.graph.initializer.append(tensor)
        elif tensor.name not in fed:
            slim.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return slim


def _concrete(value: onnx.ValueInfoProto, symbols: Mapping[str, int]) -> Shape | None:
    if not value.type.tensor_type.HasField("shape"):
        return None
    found = []
    for dim in value.type.tensor_type.shape.dim:
        size = dim.dim_value if dim.HasField("dim_value") else symbols.get(dim.dim_param)
        if size is None or size < 0:
            return None
        found.append(size)
    return tuple(found)


def _symbols(optimized: onnx.ModelProto, known: Mapping[str, Shape]) -> dict[str, int]:
    """Dimension names of the optimized graph → their size where onnx inferred the same value."""
    found: dict[str, int] = {}
    for value in [*optimized.graph.input, *optimized.graph.value_info, *optimized.graph.output]:
        dims = value.type.tensor_type.shape.dim
        shape = known.get(value.name, ())
        if len(shape) == len(dims):
            for dim, size in zip(dims, shape, strict=True):
                if dim.dim_param:
                    found.setdefault(dim.dim_param, size)
    return found


def _carried(node: onnx.NodeProto, dims: Mapping[str, Shape], known: Mapping[str, Shape]) -> Shape | None:
    """The first output's shape from the inputs' for an operator that optimization may have made; None if unknown."""
    if node.domain == NCHWC and (named := known.get(node.name.removesuffix("_nchwc"))) is not None:
        # The runtime names the node after the value that it replaces; its own sizes have padded channels.
        return named
    data = dims.get(node.input[0]) if node.input else None
    if data is None:
        return None
    op, found = node.op_type, attributes(node)
    if op == "Transpose":
        order = found.get("perm", range(len(data))[::-1])
        return tuple(data[i] for i in order) if sorted(order) == list(range(len(data))) else None
    if op in SAME_AS_FIRST:
        return data
    if op == "ReorderInput":  # into NCHWc, whose sizes are told as those of NCHW
        return (data[0], data[-1], *data[1:-1]) if found.get("channels_last") else data
    if op == "ReorderOutput" and len(data) > 2:
        channels, places = int(found.get("channels", data[1])), data[2:]
        return (data[0], *places, channels) if found.get("channels_last") else (data[0], channels, *places)
    if op in BROADCAST:
        return _broadcast([dims.get(node.input[i]) for i in BROADCAST[op] if i < len(node.input)])
    if op in PRODUCTS:
        return _multiplied(data, dims.get(node.input[PRODUCTS[op]]), found)
    if op == "MatMulNBits":
        return (*data[:-1], int(found.get("N", 0)))
    if op == "QLinearConcat" or op in CONVS | POOLS | GLOBAL_POOLS:
        return _spatial(node, data, dims, found) if op != "QLinearConcat" else _concatenated(node, dims, found)
    return None


def _broadcast(shapes: Sequence[Shape | None]) -> Shape | None:
    import numpy as np

    present = [s for s in shapes if s is not None]
    if len(present) < len(shapes):
        return None
    try:
        return tuple(np.broadcast_shapes(*present))
    except ValueError:
        return None


def _multiplied(left: Shape, right: Shape | None, found: Mapping[str, Any]) -> Shape | None:
    """Sizes of a product of matrices, each of which may be taken transposed. Batches are where MatMul has them."""
    if right is None or min(len(left), len(right)) < 2 or found.get("transBatchA") or found.get("transBatchB"):
        return None
    batch = _broadcast([left[:-2], right[:-2]])
    if batch is None:
        return None
    return (*batch, left[-1] if found.get("transA") else left[-2], right[-2] if found.get("transB") else right[-1])


def _concatenated(node: onnx.NodeProto, dims: Mapping[str, Shape], found: Mapping[str, Any]) -> Shape | None:
    parts = [dims.get(name) for name in node.input[2::3]]
    axis = found.get("axis", 0)
    first = parts[0] if parts else None
    if first is None or not -len(first) <= axis < len(first):
        return None
    axis %= len(first)
    total = 0
    for part in parts:
        if part is None or len(part) != len(first):
            return None
        total += part[axis]
    return (*first[:axis], total, *first[axis + 1 :])


def _spatial(node: onnx.NodeProto, data: Shape, dims: Mapping[str, Shape], found: Mapping[str, Any]) -> Shape | None:
    """Convolutions and pools, channels first or last."""
    last = bool(found.get("channels_last", 0)) or node.op_type in ("NhwcFusedConv", "NhwcMaxPool")
    channels, places = (data[-1], data[1:-1]) if last else (data[1] if len(data) > 1 else 0, data[2:])
    if not places:
        return None
    if node.op_type in GLOBAL_POOLS:
        sizes: Sequence[int] = [1] * len(places)
    else:
        kernel = found.get("kernel_shape")
        if node.op_type in CONVS:
            weight = dims.get(node.input[3 if node.op_type == "QLinearConv" else 1])
            if weight is None or len(weight) != len(data):
                return None
            channels, kernel = weight[0], kernel or weight[2:]
        computed = _places(places, kernel, found)
        if computed is None:
            return None
        sizes = computed
    return (data[0], *sizes, channels) if last else (data[0], channels, *sizes)


def _places(places: Shape, kernel: Sequence[int] | None, found: Mapping[str, Any]) -> list[int] | None:
    """Spatial sizes behind a sliding window; None where the attributes make no sense."""
    count = len(places)
    strides, dilations = found.get("strides") or [1] * count, found.get("dilations") or [1] * count
    pads = found.get("pads") or [0] * (2 * count)
    if kernel is None or not len(kernel) == len(strides) == len(dilations) == count or min(strides) < 1:
        return None
    if found.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
        return [-(-size // stride) for size, stride in zip(places, strides, strict=True)]
    if found.get("auto_pad") == b"VALID":
        pads = [0] * (2 * count)
    if len(pads) != 2 * count:
        return None
    room = [places[i] + pads[i] + pads[i + count] - dilations[i] * (kernel[i] - 1) - 1 for i in range(count)]
    if found.get("ceil_mode"):
        room = [size + stride - 1 for size, stride in zip(room, strides, strict=True)]
    sizes = [size // stride + 1 for size, stride in zip(room, strides, strict=True)]
    return sizes if min(sizes) > 0 else None
