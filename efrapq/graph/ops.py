"""The table of ONNX operators that efrapq computes in torch, and so differentiates."""

from __future__ import annotations

from efrapq.graph.ops_call import Op
from efrapq.graph.ops_math import MATH_OPS
from efrapq.graph.ops_neural import NEURAL_OPS
from efrapq.graph.ops_quant import QUANT_OPS
from efrapq.graph.ops_reduce import REDUCE_OPS
from efrapq.graph.ops_shape import SHAPE_OPS

__all__ = ["HOST_INPUTS", "OPS", "standard_domain", "supports"]

# (domain, operator) → function; the domain of the ONNX standard is "".
OPS: dict[tuple[str, str], Op] = {
    ("", name): op for table in (MATH_OPS, NEURAL_OPS, QUANT_OPS, REDUCE_OPS, SHAPE_OPS) for name, op in table.items()
}

# Inputs whose numbers are read on the CPU; all others must lie on the device of the data.
HOST_INPUTS: dict[tuple[str, str], frozenset[int]] = {
    ("", "CastLike"): frozenset({1}),
    ("", "ConstantOfShape"): frozenset({0}),
    ("", "CumSum"): frozenset({1}),
    ("", "Dropout"): frozenset({1, 2}),
    ("", "Expand"): frozenset({1}),
    ("", "Pad"): frozenset({1, 2, 3}),
    ("", "Reshape"): frozenset({1}),
    ("", "Slice"): frozenset({1, 2, 3, 4}),
    ("", "Split"): frozenset({1}),
    ("", "Squeeze"): frozenset({1}),
    ("", "Tile"): frozenset({1}),
    ("", "Unsqueeze"): frozenset({1}),
} | {key: frozenset({1}) for key in OPS if key[1].startswith("Reduce")}


def standard_domain(domain: str) -> str:
    """The domain as the table has it: the ONNX standard's goes by two names."""
    return "" if domain == "ai.onnx" else domain


def supports(domain: str, op_type: str) -> bool:
    """Whether the operator is computed in torch; any other runs through ONNX Runtime, without gradient."""
    return (standard_domain(domain), op_type) in OPS
