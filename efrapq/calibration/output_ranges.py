"""Activation ranges by what they do to the model's outputs, instead of to the activation.

A few positions of a few images can hold values twenty standard deviations out, on which next to nothing depends: the
late residual streams of MobileNetV2 do. A grid that reaches them is too coarse for all others, and by squared error it
has to reach them. So each activation is put on a grid alone, the rest of the network being float, and its range is
the one with which the model's outputs move least. Errors of different activations add up as if they were
independent, so that one activation after the other is chosen as if it were the only one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from efrapq.calibration.feeds import Feeds
from efrapq.calibration.placed import Calibrator, Limits
from efrapq.graph.executor import Executor
from efrapq.graph.placement import Placement
from efrapq.grid import ActivationGrid, activation_grid
from efrapq.progress import Reporter

__all__ = ["choose_limits"]

# Samples that are looked at, and how many of them at a time.
SAMPLES = 32
PIECE = 8
# Of all activations' noise: what makes less of it than this is left as it is.
SHARE = 1 / 100
# What an end of a range is multiplied by in one step, how often at most, and how many steps in a row may bring nothing.
NARROWING = 0.85
STEPS = 32
MISSES = 2
# Which ends move together: both, then each alone.
MOVES = ((1, 1), (1, 0), (0, 1))


def choose_limits(
    graph: ir.Graph,
    executor: Executor,
    placement: Placement,
    inputs: Sequence[Tensor] | Sequence[Feeds],
    device: torch.device,
    memory: int | None,
    reporter: Reporter,
) -> dict[str, Limits]:
    """The ranges, by value name, of those activations that the outputs are better off with than with the `mse` range.

    inputs: of the calibration, as `streaming_pass` takes them; the first few samples are used, as many as `memory`
    bytes of activations hold. Empty where the model has no float output.
    """
    with torch.no_grad():
        search = _Search(graph, executor, placement, _pieces(graph, inputs), device, memory)
        grids = {name: search.calibrator.grid(name, search.all(name)) for name in placement.grids}
        with reporter.task("ranges", 2.0 * len(grids)) as task:
            noise = {}
            for name, grid in grids.items():
                noise[name] = search.noise(name, grid, 1)
                task.advance(name, 1.0)
            least = SHARE * sum(noise.values())
            found = {}
            for name, grid in grids.items():
                if noise[name] > least and (limits := search.narrowed(name, grid)) is not None:
                    found[name] = limits
                task.advance(name, 1.0)
    return found


def _pieces(graph: ir.Graph, inputs: Sequence[Tensor] | Sequence[Feeds]) -> list[dict[str, Tensor]]:
    """Inputs by name, a few samples at a time, until there are enough."""
    pieces: list[dict[str, Tensor]] = []
    count = 0
    for chunk in inputs:
        if isinstance(chunk, Feeds):
            parts, sizes = [dict(chunk.tensors)], [chunk.samples]
        else:
            split = torch.split(chunk[: SAMPLES - count], PIECE)
            parts, sizes = [{str(graph.inputs[0].name): x} for x in split], [len(x) for x in split]
        pieces += parts
        count += sum(sizes)
        if count >= SAMPLES:
            break
    return pieces


class _Search:
    """The float values of all placed activations on some inputs, and what the outputs become when one is rounded.

    memory: bytes that may be kept; past it fewer pieces are looked at, one at least.
    """

    def __init__(
        self,
        graph: ir.Graph,
        executor: Executor,
        placement: Placement,
        pieces: Sequence[Mapping[str, Tensor]],
        device: torch.device,
        memory: int | None = None,
    ) -> None:
        self.executor = executor
        self.calibrator = Calibrator(graph, executor, placement, "mse", device=device)
        self.placed = list(placement.grids)
        outputs = [str(v.name) for v in graph.outputs]
        wanted = list(dict.fromkeys([*self.placed, *outputs]))
        self.pieces: list[dict[str, Tensor]] = []
        for piece in pieces:
            self.pieces.append({**piece, **self.executor.run(piece, wanted)})
            size = sum(x.nbytes for x in self.pieces[-1].values())
            if memory is not None and (len(self.pieces) + 1) * size > memory:
                break
        self.outputs = [name for name in outputs if self.pieces[0][name].is_floating_point()]
        self.energies = {name: [_energy(piece[name]) for piece in self.pieces] for name in self.outputs}
        self.inputs = [str(v.name) for v in graph.inputs if str(v.name) in pieces[0]]

    def all(self, name: str) -> list[Tensor]:
        """The float values of one activation."""
        return [piece[name] for piece in self.pieces]

    def noise(self, name: str, grid: ActivationGrid, pieces: int | None = None, enough: float = math.inf) -> float:
        """How far the outputs move, as a part of their own energy and summed over them, when this activation alone is
        on the grid. pieces: how many are looked at, by default all. enough: past it, it does not matter by how much.
        """
        known = [*self.inputs, *self.placed[: self.placed.index(name)]]
        signal = {output: sum(energies[:pieces]) for output, energies in self.energies.items()}
        noise = 0.0
        for piece in self.pieces[:pieces]:
            # What lies before it is fed, so that only what lies behind is run.
            feeds = {n: piece[n] for n in known} | {name: grid.fake_quantize(piece[name])}
            for output, y in self.executor.run(feeds, self.outputs).items():
                if signal[output] > 0:
                    noise += _energy(y - piece[output]) / signal[output]
            if noise >= enough:
                break
        return noise

    def narrowed(self, name: str, grid: ActivationGrid) -> Limits | None:
        """The range with less noise than this grid, and the least; None if there is none."""
        low, high = self.calibrator.limits(name, self.all(name))
        noise = self.noise(name, grid)
        best: Limits | None = None
        ends = tried = (1.0, 1.0)

        def improves() -> bool:
            nonlocal noise, best
            limits = low * tried[0], high * tried[1]
            found = self.noise(name, activation_grid(*limits, grid.bits), enough=noise)
            if found >= noise:
                return False
            noise, best = found, limits
            return True

        improves()
        for down, up in MOVES if low < 0 < high else MOVES[:1]:
            tried, missed = ends, 0
            for _ in range(STEPS):
                tried = tried[0] * NARROWING**down, tried[1] * NARROWING**up
                if improves():
                    ends, missed = tried, 0
                elif (missed := missed + 1) > MISSES:
                    break
        return best


def _energy(x: Tensor) -> float:
    return float(x.double().square().sum())
