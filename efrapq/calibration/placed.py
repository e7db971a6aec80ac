"""The grid of each placed value, from what it holds in the float network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from efrapq.calibration.live_range import follower, live_range
from efrapq.calibration.ranges import calibrate, extremes
from efrapq.graph.executor import Executor
from efrapq.graph.placement import Placement
from efrapq.grid import ActivationGrid, activation_grid

__all__ = ["Calibrator", "Limits"]

# Lowest and highest value of an activation's range.
Limits = tuple[float, float]


class Calibrator:
    """Chooses grids for the placed values of one graph. method: as `calibrate` takes it. limits: by name, of the values
    whose range is known already.
    """

    def __init__(
        self,
        graph: ir.Graph,
        executor: Executor,
        placement: Placement,
        method: str,
        limits: Mapping[str, Limits] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.executor, self.placement, self.method, self.device = executor, placement, method, device
        self.known = limits or {}
        self.values = {str(v.name): v for v in (*graph.inputs, *(o for node in graph for o in node.outputs))}

    def grid(self, name: str, chunks: Sequence[Tensor]) -> ActivationGrid:
        """From the value's float chunks. Raises UnsupportedModelError if they hold NaN or infinities."""
        bits = self.placement.grids[name]
        if name in self.known:
            extremes(chunks, name)
            return activation_grid(*self.known[name], bits)
        return calibrate(chunks, bits, self.method, name, self.limits(name, chunks))

    def limits(self, name: str, chunks: Sequence[Tensor]) -> Limits:
        """What the value reaches, as far as it matters to what is computed from it alone."""
        placed, bits = self.placement, self.placement.grids[name]
        low, high = extremes(chunks, name)
        behind = follower(self.executor, self.values[name], chunks[0].dim())
        if behind is None or low >= high:
            return low, high
        result_bits = {r: placed.grids[placed.source(r)] for r in behind.results if r in placed}
        return live_range(behind, self.executor, low, high, bits, result_bits, self.device)
