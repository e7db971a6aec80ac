"""The grid of each placed value, from what it holds in the float network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from efrapq.calibration.live_range import follower, live_range
from efrapq.calibration.ranges import calibrate, extremes
from efrapq.calibration.stress import Stressed
from efrapq.graph.bounds import output_bounds
from efrapq.graph.executor import Executor
from efrapq.graph.placement import Placement
from efrapq.grid import ActivationGrid, activation_grid

__all__ = ["Calibrator", "Limits"]

# Lowest and highest value of an activation's range.
Limits = tuple[float, float]


# How many times as far as on the images patches or triggers drive an activation that gets 8 bits where fewer are asked
# for and the others may be mixed (docs/THREAT-MODEL.md has the figures).
DRIVEN_FAR = 1.25


class Calibrator:
    """Chooses grids for the placed values of one graph. method: as `calibrate` takes it. limits: by name, of the values
    whose range is known already. headroom: the factor by which a range reaches beyond what the calibration shows, for
    `minmax`; not of the graph's inputs, and not beyond what an operator can give. stressed: by name, what values are
    under patches and triggers, for which ranges are chosen as well; driven: by name, how many times as far that
    reaches. mixed: 8 bits, and min-max ranges, for those that this drives far.
    """

    def __init__(
        self,
        graph: ir.Graph,
        executor: Executor,
        placement: Placement,
        method: str,
        limits: Mapping[str, Limits] | None = None,
        device: torch.device | str = "cpu",
        headroom: float = 1.0,
        stressed: Mapping[str, Stressed] | None = None,
        *,
        mixed: bool = False,
    ) -> None:
        self.executor, self.placement, self.method, self.device = executor, placement, method, device
        self.known = limits or {}
        self.headroom, self.mixed = headroom, mixed
        self.stressed = stressed or {}
        self.driven: dict[str, float] = {}
        self.values = {str(v.name): v for v in (*graph.inputs, *(o for node in graph for o in node.outputs))}

    def grid(self, name: str, chunks: Sequence[Tensor]) -> ActivationGrid:
        """From the value's float chunks. Raises UnsupportedModelError if they hold NaN or infinities."""
        bits = self.placement.grids[name]
        if name in self.known:
            extremes(chunks, name)
            return activation_grid(*self.known[name], bits)
        beside = self.stressed[name].spread if name in self.stressed else None
        limits = self.limits(name, chunks)
        if self._bits(name) > bits:
            return calibrate(chunks, self._bits(name), "minmax", name, limits)
        return calibrate(chunks, bits, self.method, name, limits, beside)

    def _bits(self, name: str) -> int:
        """Of the value's grid, once it is known how far it is driven."""
        bits = self.placement.grids[name]
        return max(bits, 8) if self.mixed and self.driven.get(name, 1.0) > DRIVEN_FAR else bits

    @property
    def wider(self) -> list[str]:
        """The values that got more bits than they were placed with, of those that have a grid by now."""
        return [name for name in self.driven if self._bits(name) > self.placement.grids[name]]

    def limits(self, name: str, chunks: Sequence[Tensor]) -> Limits:
        """What the value reaches, as far as it matters to what is computed from it alone."""
        low, high = self._widened(name, *extremes(chunks, name))
        behind = follower(self.executor, self.values[name], chunks[0].dim())
        if behind is None or low >= high:
            return low, high
        placed = self.placement
        results = {r: placed.grids[placed.source(r)] for r in behind.results if r in placed}
        if self.mixed:  # how far these are driven is not known yet
            results = {name: max(bits, 8) for name, bits in results.items()}
        return live_range(behind, self.executor, low, high, self._bits(name), results, self.device)

    def _widened(self, name: str, low: float, high: float) -> Limits:
        value = self.values[name]
        node = value.producer()
        if node is None:
            return low, high
        if name in self.stressed:
            before = max(high, 0.0) - min(low, 0.0)
            low, high = min(low, self.stressed[name].low), max(high, self.stressed[name].high)
            if before > 0:
                self.driven[name] = (max(high, 0.0) - min(low, 0.0)) / before
        least, most = output_bounds(node)
        # What the calibration shows stays inside, whatever rounding made of an operator's bounds.
        return min(low, max(self.headroom * low, least)), max(high, min(self.headroom * high, most))
