"""What a model costs: multiply-accumulates of an operator, bytes of constants, the peak of activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from efrapq.verification.shapes import CONVS, Shape, Shapes, attributes

if TYPE_CHECKING:
    import onnx

__all__ = ["activation_peak", "multiply_accumulates", "weight_bytes"]

HALF_BYTE = (21, 22)  # TensorProto.UINT4, INT4
QUANTIZED_INPUTS = {
    # operator → positions of (codes, scales and zero points, bias)
    "DequantizeLinear": ((0,), (1, 2), ()),
    "QuantizeLinear": ((), (1, 2), ()),
    "QLinearConv": ((3,), (1, 2, 4, 5, 6, 7), (8,)),
    "QLinearMatMul": ((3,), (1, 2, 4, 5, 6, 7), ()),
    "QGemm": ((3,), (1, 2, 4, 5, 7, 8), (6,)),
    "MatMulNBits": ((1,), (2, 3), (5,)),
    "MatMulInteger": ((1,), (2, 3), ()),
    "ConvInteger": ((1,), (2, 3), ()),
    "MatMulIntegerToFloat": ((1,), (2, 3, 4, 5), (6,)),
    "DynamicQuantizeMatMul": ((1,), (2, 3), (4,)),
}
RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})
BIASED = frozenset({"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm"})


def multiply_accumulates(node: onnx.NodeProto, shapes: Shapes) -> int | None:
    """Of one convolution, matrix product, recurrent layer or attention in any of the runtime's forms, for one sample;
    None if unknown. Of attention, the two products over all pairs of positions, masked or not.
    """
    dims = shapes.dims
    if node.op_type in RECURRENT | ATTENTION | {"DynamicQuantizeLSTM", "Einsum"}:
        total = _others(node, dims)
        return None if total is None else total // shapes.batch
    data, result = dims.get(node.input[0]), dims.get(node.output[0])
    if data is None or result is None:
        return None
    found = attributes(node)
    op = node.op_type
    if op in CONVS or op in ("ConvTranspose", "DeformConv"):
        weight = dims.get(node.input[3 if op == "QLinearConv" else 1])
        if weight is None or len(weight) < 3:
            return None
        if op == "ConvTranspose":
            return math.prod(data) * math.prod(weight[1:]) // shapes.batch
        last = bool(found.get("channels_last", 0)) or op == "NhwcFusedConv"
        # From the data, not the weight: the runtime pads the weight's channels to its block.
        channels = data[-1 if last else 1] // max(int(found.get("group", 1)), 1)
        return math.prod(result) * channels * math.prod(weight[2:]) // shapes.batch
    if not data:
        return None
    if op == "MatMulNBits":
        inner = int(found.get("K", data[-1]))
    else:
        inner = data[-2] if found.get("transA") and len(data) > 1 else data[-1]
    return math.prod(result) * inner // shapes.batch


def _others(node: onnx.NodeProto, dims: Mapping[str, Shape]) -> int | None:
    """Multiply-accumulates of a run of what is neither a convolution nor a product of two matrices."""
    inputs = [dims.get(name) for name in node.input]
    result = next((dims[name] for name in node.output if name in dims), None)
    if node.op_type == "Einsum":
        return _einsum(str(attributes(node)["equation"], "utf-8"), inputs)
    data, second = (*inputs, None, None)[:2]
    if data is None or second is None or len(data) < 3:
        return None
    if node.op_type in ATTENTION:
        if result is None or (node.domain and node.op_type == "Attention"):
            return None  # the runtime's own has its projections in it
        # (B, S, H), or (B, heads, S, size of a head): all but the positions of the keys is in queries and result.
        return math.prod(data[:-1]) * second[-2] * (data[-1] + result[-1])
    recurrent = inputs[2] if len(inputs) > 2 else None
    if recurrent is None or len(second) != 3 or len(recurrent) != 3:
        return None
    return data[0] * data[1] * (math.prod(second) + math.prod(recurrent))


def _einsum(equation: str, inputs: list[Shape | None]) -> int | None:
    """The product of the sizes of all indices; None where an ellipsis hides some."""
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, inputs, strict=False):
        if shape is None or len(term) != len(shape) or not term.isalpha():
            return None
        sizes |= dict(zip(term, shape, strict=True))
    return math.prod(sizes.values()) if len(terms) == len(inputs) else None


def activation_peak(optimized: onnx.ModelProto, shapes: Shapes) -> int | None:
    """The most bytes of values alive at once, for one sample: nodes run in the graph's order, a value lives from the
    node that makes it to the last that reads it, inputs from the start and outputs to the end. Nothing is shared or
    written in place, as the runtime may do. Constants do not count, but what is computed from them at run time does.
    None where a size is not known.
    """
    graph = optimized.graph
    constants = {t.name for t in graph.initializer}
    sizes = _value_bytes(optimized, shapes)
    last: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in [*node.input, *node.output]:
            last[name] = index
    for value in graph.output:
        last[value.name] = len(graph.node)
    alive = [v.name for v in graph.input if v.name not in constants]
    peak = 0
    for index, node in enumerate(graph.node):
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            return None  # what runs inside a branch or a loop is not known
        alive += [name for name in node.output if name]
        counted = [sizes.get(name) for name in alive]
        if None in counted:
            return None
        peak = max(peak, sum(size or 0 for size in counted))
        alive = [name for name in alive if last.get(name, -1) > index]
    return peak


def weight_bytes(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of the file's constants as stored: codes, scales (with zero points), biases, float weights that are left,
    and other (shapes, axes, …).
    """
    graph = model.graph
    roles = _roles(graph)
    found = dict.fromkeys(("codes", "scales", "biases", "float", "other"), 0)
    for name, tensor in _constants(graph):
        role = roles.get(name, "float" if tensor.data_type in (1, 10, 11, 16) else "other")
        if role == "codes" and tensor.data_type == 6:  # int32: only biases have it
            role = "biases"
        found[role] += len(tensor.raw_data) or _bytes(tuple(tensor.dims), tensor.data_type)
    return found


def _roles(graph: onnx.GraphProto) -> dict[str, str]:
    roles: dict[str, str] = {}
    behind = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Cast" and n.input and n.output}
    for node in graph.node:
        codes, scales, biases = QUANTIZED_INPUTS.get(node.op_type, ((), (), (2,) if node.op_type in BIASED else ()))
        for role, positions in (("codes", codes), ("scales", scales), ("biases", biases)):
            for position in positions:
                if position < len(node.input) and node.input[position]:
                    name = node.input[position]
                    roles.setdefault(behind.get(name, name), role)
    return roles


def _constants(graph: onnx.GraphProto) -> list[tuple[str, onnx.TensorProto]]:
    held = [(t.name, t) for t in graph.initializer]
    for node in graph.node:
        if node.op_type == "Constant" and node.output:
            held += [(node.output[0], a.t) for a in node.attribute if a.name == "value" and a.HasField("t")]
    return held


def _value_bytes(optimized: onnx.ModelProto, shapes: Shapes) -> dict[str, int]:
    """Bytes for one sample of each value whose size is known; what does not depend on the inputs has no batch."""
    graph = optimized.graph
    constants = {t.name for t in graph.initializer}
    fed = {v.name for v in graph.input} - constants
    for node in graph.node:
        if fed.intersection(node.input):
            fed.update(node.output)
    return {
        name: _bytes(shape, shapes.types[name]) // (shapes.batch if name in fed else 1)
        for name, shape in shapes.dims.items()
        if shapes.types.get(name) and name not in constants
    }


def _bytes(shape: Shape, data_type: int) -> int:
    from onnx import helper

    count = math.prod(shape)
    if data_type in HALF_BYTE:
        return -(-count // 2)
    return count * int(helper.tensor_dtype_to_np_dtype(data_type).itemsize)
