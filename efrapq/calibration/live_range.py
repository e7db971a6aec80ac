"""Between which limits an activation still matters to what is computed from it.

HardSwish makes 0 of everything below -3, a Sigmoid 1 of everything far above 0. Where an activation is read by such
functions alone, a grid that reaches further spends its codes on differences that nobody sees: of values from -300 to
246 in front of a HardSwish, as the stem of a mobile network has them, 3 of 256 codes would lie between -3 and 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from efrapq.graph.executor import Executor, reads

__all__ = ["Follower", "follower", "live_range"]

# Operators whose output at a place depends on their inputs at that place, and on nothing else.
POINTWISE = frozenset(
    {
        "Add", "Clip", "Div", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Max", "Min",
        "Mish", "Mul", "Neg", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sub", "Tanh",
    }
)  # fmt: skip
# Points at which the functions are looked at, and how often the place where they begin to change is looked at closer.
POINTS = 257
PASSES = 3
# What is quantized itself changes by less than this part of its step without being seen.
PART_OF_STEP = 0.25


@dataclass(frozen=True)
class Follower:
    """What is computed from one value and constants alone. nodes: in topological order. results: what others read of
    it. shape: of a probe behind its first axis: as long as the constants where they differ, else 1.
    """

    value: str
    nodes: tuple[ir.Node, ...]
    results: tuple[str, ...]
    shape: tuple[int, ...]

    def evaluate(self, executor: Executor, points: Tensor) -> list[Tensor]:
        """The results for these values in all places: (points, …) each."""
        values = {self.value: points.reshape(-1, *[1] * len(self.shape)).expand(-1, *self.shape)}
        for node in self.nodes:
            names = [None if v is None else str(v.name) for v in reads(node)]
            inputs = [None if n is None else values[n] if n in values else executor.constants[n] for n in names]
            values[str(node.outputs[0].name)] = executor.run_node(node, inputs)[0]
        return [values[name].reshape(len(points), -1) for name in self.results]


def follower(executor: Executor, value: ir.Value, rank: int) -> Follower | None:
    """The functions behind a value of so many axes; None where anything else reads the value."""
    inside = {str(value.name)}
    nodes: list[ir.Node] = []
    constants: list[Tensor] = []
    pending = [use.node for use in value.uses()]
    while pending:
        node = pending.pop(0)
        names = [str(v.name) for v in reads(node) if v is not None]
        if node in nodes or node.op_type not in POINTWISE or node.domain not in ("", "ai.onnx"):
            continue
        if not all(name in inside or name in executor.constants for name in names):
            continue  # it comes up again with the last of its inputs, if that is computed here
        nodes.append(node)
        inside.add(str(node.outputs[0].name))
        constants += [executor.constants[name] for name in names if name not in inside]
        pending += [use.node for use in node.outputs[0].uses()]
    held = [value, *(node.outputs[0] for node in nodes)]
    results = [v for v in held if v.is_graph_output() or any(use.node not in nodes for use in v.uses())]
    shape = _probe_shape(constants, rank)
    if not results or value in results or shape is None:
        return None
    return Follower(str(value.name), tuple(nodes), tuple(str(v.name) for v in results), shape)


def live_range(
    found: Follower,
    executor: Executor,
    low: float,
    high: float,
    bits: int,
    result_bits: Mapping[str, int],
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """The part of [low, high] outside of which the functions no longer change. bits: of the value. result_bits: of the
    results that are quantized themselves, by name; changes that their grids hardly show are none.

    An end that moved inwards lies half a step of the grid beyond the place of the first change, so that no rounding of
    the zero point can bring it back into where the functions change.
    """

    def at(points: Tensor) -> list[Tensor]:
        return [y.double().cpu() for y in found.evaluate(executor, points.to(device))]

    spans = [float(y.max() - y.min()) for y in at(torch.linspace(low, high, POINTS))]
    if not all(0 < span < float("inf") for span in spans):  # constant, or not finite: nothing to go by
        return low, high
    limits = [
        PART_OF_STEP * span / (2 ** result_bits[name] - 1) if name in result_bits else 0.0
        for name, span in zip(found.results, spans, strict=True)
    ]

    def first_change(outer: float, inner: float) -> float:
        """From `outer` inwards, the last point at which the functions are what they are at `outer`."""
        start = at(torch.tensor([outer], dtype=torch.float32))
        for _ in range(PASSES):
            points = torch.linspace(outer, inner, POINTS)
            same = torch.ones(POINTS, dtype=torch.bool)
            for y, y0, limit in zip(at(points), start, limits, strict=True):
                same &= ((y - y0).abs() <= limit).all(1)
            last = int(same.long().cumprod(0).sum()) - 1
            if last == POINTS - 1:
                return inner
            outer, inner = float(points[last]), float(points[last + 1])
        return outer

    bottom, top = first_change(low, high), first_change(high, low)
    if bottom >= top:
        return low, high
    beyond = (top - bottom) / (2**bits - 2) / 2
    return max(low, bottom - beyond) if bottom > low else low, min(high, top + beyond) if top < high else high


def _probe_shape(constants: Sequence[Tensor], rank: int) -> tuple[int, ...] | None:
    """None for constants that vary between samples or do not fit each other."""
    sizes = [1] * rank
    for constant in constants:
        if constant.dim() > rank:
            return None
        for axis, size in enumerate(constant.shape, rank - constant.dim()):
            if size != 1 and sizes[axis] not in (1, size):
                return None
            sizes[axis] = max(sizes[axis], size)
    return tuple(sizes[1:]) if rank and sizes[0] == 1 else None
