"""A second output that says of each sample at how many ends of activation grids it arrived.

What reaches past its grid is clipped, and a backdoor can wait for just that: in the float network the trigger is
silenced by values that the file cuts off (docs/THREAT-MODEL.md). Where nothing is clipped, the file computes what the
float network computes, to within rounding. So the codes themselves tell which answers to trust, whatever the trigger
looks like: an activation that was clipped has the first or the last code of its grid.

A value at an end need not have been clipped: the largest of the calibration images lies there, too. An end counts for
nothing where no value can lie beyond it (after a Sigmoid), or where what is computed from the value no longer changes
there (before a HardSwish, the ends that `calibration.live_range` moves inwards).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from efrapq.errors import UnsupportedModelError
from efrapq.graph import constants as const
from efrapq.graph.bounds import output_bounds
from efrapq.graph.copies import copied_from
from efrapq.graph.placement import MOVING_OPS
from efrapq.graph.quantized import QuantizedModel
from efrapq.grid import ActivationGrid
from efrapq.io import printable

__all__ = ["GUARD_KEY", "Guard", "Watched", "guard_of", "guard_position", "plan_guard", "strip_guard"]

# Where a file's metadata say what it watches.
GUARD_KEY = "efrapq.guard"

MOST_AXES = 8
# Below and above which arguments a function changes by no more than a code of 8 bits, of results that span 4.
FLAT = {
    "Elu": (-4.5, math.inf),
    "Erf": (-2.0, 2.0),
    "Gelu": (-2.5, math.inf),
    "HardSwish": (-3.0, math.inf),
    "Mish": (-6.0, math.inf),
    "Relu": (0.0, math.inf),
    "Selu": (-5.0, math.inf),
    "Sigmoid": (-6.0, 6.0),
    "Softplus": (-4.5, math.inf),
    "Tanh": (-3.4, 3.4),
}
# The same of a value times its own Sigmoid or HardSigmoid.
GATED = {"HardSigmoid": (-3.0, math.inf), "Sigmoid": (-6.0, math.inf)}


@dataclass(frozen=True)
class Watched:
    """An activation that can be clipped: of how many axes, and at which ends of its grid."""

    rank: int
    low: bool
    high: bool


@dataclass(frozen=True)
class Guard:
    """What a file watches. output: its name. watched: by the value's name."""

    output: str
    watched: Mapping[str, Watched]

    def to_json(self) -> str:
        return json.dumps({"output": self.output, "watched": {name: astuple(w) for name, w in self.watched.items()}})


def guard_of(metadata: Mapping[str, str]) -> Guard | None:
    """As it is recorded; None where there is none. Raises UnsupportedModelError for a record that is none of ours."""
    record = metadata.get(GUARD_KEY)
    if record is None:
        return None
    try:
        document = json.loads(record)
        watched = {str(name): Watched(*given) for name, given in document["watched"].items()}
        output = str(document["output"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise UnsupportedModelError(f"the file's {GUARD_KEY} record is unreadable") from exc
    if not all(isinstance(w.rank, int) and 2 <= w.rank <= MOST_AXES for w in watched.values()):
        raise UnsupportedModelError(f"the file's {GUARD_KEY} record holds no numbers of axes")
    return Guard(output, watched)


def plan_guard(quantized: QuantizedModel) -> Guard:
    """What there is to watch in a model: where a value can be clipped, as the float graph says; of values with the same
    codes the first, and none of the graph's inputs.

    Raises UnsupportedModelError where nothing can be clipped, and for values that do not hold the samples of the
    graph's first input on their first axis.
    """
    graph, grids = quantized.model.graph, quantized.activations
    found = {}
    for value in (output for node in graph for output in node.outputs):
        grid = grids.get(str(value.name))
        ends = None if grid is None else _watched(copied_from(value) or value, grid, grids, graph)
        if ends is not None:
            found[str(value.name)] = ends
    if not found:
        raise UnsupportedModelError("no activation of this model can be clipped: --guard has nothing to watch")
    return Guard(const.fresh_name(graph, "clipped"), found)


def _watched(
    value: ir.Value, grid: ActivationGrid, grids: Mapping[str, ActivationGrid], graph: ir.Graph
) -> Watched | None:
    node = value.producer()
    if node is None:
        return None
    before = node.inputs[0] if node.inputs else None
    if node.op_type in MOVING_OPS and before is not None and grids.get(str(before.name)) == grid:
        return None
    least, most = output_bounds(node)
    # Past these the value itself says nothing more.
    flat = [_flat(use.node, value) for use in value.uses()]
    if flat:
        least, most = max(least, min(ends[0] for ends in flat)), min(most, max(ends[1] for ends in flat))
    (bottom, top), near = grid.limits, grid.scale / 2
    low, high = grid.zero_point > grid.qmin and bottom > least + near, top < most - near
    return Watched(_rank(value, graph), low, high) if low or high else None


def _flat(reader: ir.Node, value: ir.Value) -> tuple[float, float]:
    """Below and above which values of its argument a reader's result stays what it is."""
    if reader.op_type == "Clip":
        return output_bounds(reader)
    if reader.op_type == "HardSigmoid":
        alpha, beta = reader.attributes.get_float("alpha", 0.2), reader.attributes.get_float("beta", 0.5)
        return -beta / alpha, (1 - beta) / alpha
    if reader.op_type == "Mul":
        gates = [v.producer() for v in reader.inputs if v is not None and v is not value]
        for gate in gates:
            if gate is not None and gate.op_type in GATED and gate.inputs[0] is value:
                return GATED[gate.op_type]
    return FLAT.get(reader.op_type, (-math.inf, math.inf))


def _rank(value: ir.Value, graph: ir.Graph) -> int:
    """How many axes the value has, the first of which counts samples."""
    first, shape = graph.inputs[0].shape, value.shape
    if first and shape and 1 < len(shape) <= MOST_AXES:
        counts = [dims[0] if isinstance(dims[0], int) else None for dims in (first, shape)]
        if counts[0] == counts[1]:
            return len(shape)
    raise UnsupportedModelError(
        f"activation {printable(str(value.name))} does not hold one sample after the other as the input does: --guard "
        "cannot say which of them are clipped"
    )


def guard_position(metadata: Mapping[str, str], outputs: Sequence[str | None]) -> int | None:
    """Which of a file's outputs counts what was clipped; None where none does. It is never the first, which answers.

    Raises UnsupportedModelError for a record that is none of ours.
    """
    guard = guard_of(metadata)
    return None if guard is None or guard.output not in outputs[1:] else outputs.index(guard.output, 1)


def strip_guard(model: ir.Model) -> None:
    """Take the output away, in place, and what computes it. The metadata still name it."""
    outputs = model.graph.outputs
    position = guard_position(model.metadata_props, [output.name for output in outputs])
    if position is not None:
        del outputs[position]
        common.RemoveUnusedNodesPass()(model)
