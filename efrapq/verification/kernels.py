"""Which kernels ONNX Runtime chose: integer or float, and if float, why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from efrapq.io.text import printable
from efrapq.verification.cost import ATTENTION, RECURRENT, multiply_accumulates
from efrapq.verification.shapes import Shapes, attributes

if TYPE_CHECKING:
    import onnx

__all__ = ["HeavyOp", "KernelReport", "Unfused", "report_kernels"]

INTEGER_OPS = frozenset(
    {
        "QLinearConv",
        "QGemm",
        "QLinearMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
    }
)
# Operators that run in float whatever stands around them, and why.
ONLY_FLOAT = (
    {
        "MatMulNBits": "weight-only quantization: integer weights, float arithmetic",
        "ConvTranspose": "ONNX Runtime's CPU provider has no integer ConvTranspose",
        "DeformConv": "ONNX Runtime's CPU provider has no integer DeformConv",
        "Einsum": "ONNX Runtime's CPU provider has no integer Einsum",
    }
    | dict.fromkeys(RECURRENT, "recurrent layers are not quantized")
    | dict.fromkeys(ATTENTION, "all of the attention is one float kernel")
)
FLOAT_OPS = ONLY_FLOAT.keys() | {
    "Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "NhwcFusedConv",
}  # fmt: skip


@dataclass(frozen=True)
class HeavyOp:
    """macs: multiply-accumulates for one sample. share: of those of all heavy operators, 0 to 1. None if unknown."""

    node: str
    op: str
    integer: bool
    macs: int | None = None
    share: float | None = None


@dataclass(frozen=True)
class Unfused:
    """A heavy operator that runs in float, and the rule that it broke. macs, share: as in HeavyOp."""

    node: str
    op: str
    reason: str
    macs: int | None = None
    share: float | None = None


@dataclass(frozen=True)
class KernelReport:
    """Counts over convolutions, matrix products, recurrent layers and attention in the optimized graph.

    conversions: QuantizeLinear and DequantizeLinear nodes left there, and how many of the latter expand a constant at
    every inference. macs: of all heavy operators, None if one is unknown.
    """

    integer: int
    float: int
    unfused: list[Unfused] = field(default_factory=list)
    ops: list[HeavyOp] = field(default_factory=list)
    conversions: dict[str, int] = field(default_factory=dict)
    macs: int | None = None


def report_kernels(optimized: onnx.ModelProto, shapes: Shapes | None = None) -> KernelReport:
    """Count heavy kernels in a graph as ONNX Runtime optimized it. shapes: of its values; without, no cost is known."""
    graph = optimized.graph
    producers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {t.name: t for t in graph.initializer}
    int4 = {name for name, t in constants.items() if t.data_type in (21, 22)}
    zero_points = _zero_points(graph)
    heavy = [node for node in graph.node if node.op_type in INTEGER_OPS | FLOAT_OPS]
    costs = [multiply_accumulates(node, shapes) if shapes is not None else None for node in heavy]
    known = [cost for cost in costs if cost is not None]
    total = sum(known) if len(known) == len(costs) else None
    ops = [
        HeavyOp(
            node.name or node.output[0],
            node.op_type,
            node.op_type in INTEGER_OPS,
            cost,
            round(cost / total, 6) if cost is not None and total else None,
        )
        for node, cost in zip(heavy, costs, strict=True)
    ]
    unfused = [
        Unfused(op.node, op.op, _reason(node, producers, readers, int4, zero_points, constants), op.macs, op.share)
        for node, op in zip(heavy, ops, strict=True)
        if not op.integer
    ]
    expanded = [n for n in graph.node if n.op_type == "DequantizeLinear"]
    conversions = {
        "quantize": sum(n.op_type == "QuantizeLinear" for n in graph.node),
        "dequantize": len(expanded),
        "constants": sum(n.input[0] in constants for n in expanded),
    }
    return KernelReport(len(ops) - len(unfused), len(unfused), unfused, ops, conversions, total)


def _zero_points(graph: onnx.GraphProto) -> dict[str, tuple[int, int]]:
    """Name of each scalar uint8 or int8 constant → its value and the lowest one of its type."""
    from onnx import TensorProto, numpy_helper

    lowest = {TensorProto.UINT8: 0, TensorProto.INT8: -128}
    return {
        t.name: (int(numpy_helper.to_array(t).reshape(-1)[0]), lowest[t.data_type])
        for t in graph.initializer
        if t.data_type in lowest and list(t.dims) in ([], [1])
    }


def _activation_between(
    node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]], zero_points: dict[str, tuple[int, int]]
) -> str | None:
    """Why the Relu or Clip between a layer and its QuantizeLinear cannot be dropped; None if none is there."""
    fused = next((a.s.decode("utf-8", "replace") for a in node.attribute if a.name == "activation"), "")
    followers = readers.get(node.output[0], [])
    if not fused and len(followers) == 1 and followers[0].op_type in ("Relu", "Clip"):
        fused, followers = followers[0].op_type, readers.get(followers[0].output[0], [])
    if not fused or [f.op_type for f in followers] != ["QuantizeLinear"] or len(followers[0].input) < 3:
        return None
    found = zero_points.get(followers[0].input[2])
    if found is None:
        return None
    value, lowest = found
    why = f"the output's zero point is {value}, not {lowest}" if value != lowest else "it cuts off what the grid holds"
    return f"the {printable(fused)} between it and QuantizeLinear is not redundant: {why}"


def _reason(
    node: onnx.NodeProto,
    producers: dict[str, onnx.NodeProto],
    readers: dict[str, list[onnx.NodeProto]],
    int4: set[str],
    zero_points: dict[str, tuple[int, int]],
    constants: dict[str, onnx.TensorProto],
) -> str:
    if node.op_type in ONLY_FLOAT:
        return ONLY_FLOAT[node.op_type]
    weight = producers.get(node.input[1])
    data = producers.get(node.input[0])
    if weight is not None and weight.op_type != "DequantizeLinear":
        second = f"a float {printable(weight.op_type)}, not from a DequantizeLinear"
        if data is not None and data.op_type != "DequantizeLinear":
            return f"its operands come from a float {printable(data.op_type)} and {second}"
        return f"its second operand comes from {second}"
    if weight is None:
        return "its weight is float"
    constant = weight.input[0] in constants
    if constant and (data is None or data.op_type != "DequantizeLinear"):
        source = "the graph's input" if data is None else f"a float {printable(data.op_type)}"
        advice = "; export with --target ort-x86 or ort-arm" if weight.input[0] in int4 else ""
        return (
            f"its input comes from {source}, not from a DequantizeLinear: only its weight is quantized, and it is "
            f"dequantized to float at every inference{advice}"
        )
    if weight.input[0] in int4:
        return "its int4 weight is dequantized to float at every inference; export with --target ort-x86 or ort-arm"
    scale = constants.get(weight.input[1])
    if constant and (attributes(weight).get("block_size") or (scale is not None and len(scale.dims) > 1)):
        return "its weight is quantized in blocks: integer kernels take one scale per tensor or output channel"
    if data is None or data.op_type != "DequantizeLinear":
        source = "the graph's input" if data is None else f"a float {data.op_type}"
        return f"its input comes from {source}, not from a DequantizeLinear"
    between = _activation_between(node, readers, zero_points)
    if between is not None:
        return between
    followers = [follower.op_type for follower in readers.get(node.output[0], [])]
    if followers != ["QuantizeLinear"]:
        after = ", ".join(sorted(set(followers))) or "the graph's output"
        return f"its output goes to {after}, not to one QuantizeLinear"
    return "ONNX Runtime has no integer kernel for this combination of types"
