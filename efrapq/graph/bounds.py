"""What an operator's output cannot be outside of."""

from __future__ import annotations

import math

import onnx_ir as ir

from efrapq.graph import constants as const

__all__ = ["output_bounds"]

BOUNDED = {
    "HardSigmoid": (0.0, 1.0),
    "Relu": (0.0, math.inf),
    "Sigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
}


def output_bounds(node: ir.Node) -> tuple[float, float]:
    """Least and most; infinite where there is none, or where a Clip computes its own at run time."""
    if node.op_type != "Clip":
        return BOUNDED.get(node.op_type, (-math.inf, math.inf))
    ends = [const.array_or_none(end) for end in (*node.inputs[1:], None, None)[:2]]
    low, high = (None if end is None else float(end.reshape(-1)[0]) for end in ends)
    return -math.inf if low is None else low, math.inf if high is None else high
