"""Which kernels ONNX Runtime chose: integer or float, and if float, why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

__all__ = ["KernelReport", "Unfused", "report_kernels"]

INTEGER_OPS = frozenset(
    {
        "QLinearConv",
        "QGemm",
        "QLinearMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "ConvInteger",
        "DynamicQuantizeMatMul",
    }
)
FLOAT_OPS = frozenset(
    {"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits", "NhwcFusedConv"}
)


@dataclass(frozen=True)
class Unfused:
    """A heavy operator that runs in float, and the rule that it broke."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class KernelReport:
    """Counts over Conv, ConvTranspose, Gemm and MatMul in the optimized graph."""

    integer: int
    float: int
    unfused: list[Unfused] = field(default_factory=list)


def report_kernels(optimized: onnx.ModelProto) -> KernelReport:
    """Count heavy kernels in a graph as ONNX Runtime optimized it."""
    graph = optimized.graph
    producers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    int4 = {t.name for t in graph.initializer if t.data_type in (21, 22)}
    integer = sum(node.op_type in INTEGER_OPS for node in graph.node)
    unfused = [
        Unfused(node.name or node.output[0], node.op_type, _reason(node, producers, readers, int4))
        for node in graph.node
        if node.op_type in FLOAT_OPS
    ]
    return KernelReport(integer, len(unfused), unfused)


def _reason(
    node: onnx.NodeProto, producers: dict[str, onnx.NodeProto], readers: dict[str, list[str]], int4: set[str]
) -> str:
    if node.op_type == "MatMulNBits":
        return "weight-only quantization: integer weights, float arithmetic"
    if node.op_type == "ConvTranspose":
        return "ONNX Runtime's CPU provider has no integer ConvTranspose"
    weight = producers.get(node.input[1])
    if weight is None or weight.op_type != "DequantizeLinear":
        return "its weight is float"
    if weight.input[0] in int4:
        return "its int4 weight is dequantized to float at every inference; export with --target ort-x86"
    data = producers.get(node.input[0])
    if data is None or data.op_type != "DequantizeLinear":
        source = "the graph's input" if data is None else f"a float {data.op_type}"
        return f"its input comes from {source}, not from a DequantizeLinear"
    followers = readers.get(node.output[0], [])
    if followers != ["QuantizeLinear"]:
        after = ", ".join(sorted(set(followers))) or "the graph's output"
        return f"its output goes to {after}, not to one QuantizeLinear"
    return "ONNX Runtime has no integer kernel for this combination of types"
