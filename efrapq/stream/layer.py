"""One weight layer: from the rows that pass through it to codes and a report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from efrapq.errors import UnsupportedModelError
from efrapq.graph.layers import Layer
from efrapq.graph.quantized import QuantizedWeight
from efrapq.graph.unfold import unfold_for
from efrapq.grid import ActivationGrid, WeightGrid, symmetric_scale
from efrapq.rounding import (
    Coordinate,
    Moments,
    Relaxed,
    RoundingProblem,
    exact_integers,
    factorize,
    make_problem,
    quadratic_loss,
    refitted_scale,
    row_losses,
    searched_scale,
    solve_coordinate,
    solve_within,
)
from efrapq.stream.settings import LayerReport, PassSettings

__all__ = ["LayerWork", "RelaxedSolver", "block_of"]

# An int32 bias at scale s_x·s_w must hold |b| with room to spare: |b| / (s_x·s_w) <= 2^30.
BIAS_LIMIT = float(2**30)
# Times that scales are fitted to codes and codes solved for scales, in turn.
REFITS = 2

# The gradient solver needs the network's activations, not only their moments: (problem, settings) → h, (G, O, D).
RelaxedSolver = Callable[[RoundingProblem, Relaxed], Tensor]


def block_of(layer: Layer, inputs: int, block: int) -> int:
    """The block that a layer's scales can have where `block` is asked for; 0: one scale per output channel."""
    return block if block and layer.op_type in ("Gemm", "MatMul") and inputs % block == 0 else 0


class LayerWork:
    """A layer while its calibration rows stream by, and then its solution.

    weight, bias: in ONNX layout, on the device. samples: calibration inputs in all. input_grid: of its input, where
    that is quantized.
    """

    def __init__(
        self,
        layer: Layer,
        weight: Tensor,
        bias: Tensor | None,
        bits: int,
        settings: PassSettings,
        samples: int,
        input_grid: ActivationGrid | None,
    ) -> None:
        self._started = time.perf_counter()
        self.layer, self.weight, self.bias, self.bits = layer, weight, bias, bits
        self.settings, self.samples, self.input_grid = settings, samples, input_grid
        self._unfold = unfold_for(layer)
        self._rows = self._unfold.weight_rows(weight).contiguous()
        self._kernel = tuple(int(size) for size in weight.shape[2:])
        self.block = block_of(layer, int(self._rows.shape[2]), settings.block)
        self._moments = Moments(self._rows)
        self._generator = torch.Generator().manual_seed(settings.seed)
        # A batch of groups has no integer product, and small ones gain nothing by it.
        self._in_codes = self._rows.shape[0] == 1 and weight.device.type == "cpu" and exact_integers()

    def add(self, x_hat: Tensor, y: Tensor) -> None:
        """Add one chunk: x_hat, the layer's input in the quantized network (uint8 codes of input_grid, or reals),
        and y, its output in the float network."""
        positions = self._positions(y)
        target = self._unfold.output_rows(y, positions)
        groups, outputs, _ = self._rows.shape
        if self.bias is not None:
            target = target - self.bias.view(groups, 1, outputs)
        grid = self.input_grid
        if grid is None or x_hat.dtype != torch.uint8:
            self._moments.add(self._unfold.input_rows(x_hat, self._kernel, positions), target)
            return
        codes = self._unfold.input_rows(x_hat, self._kernel, positions, grid.zero_point)
        if self._in_codes:
            self._moments.add_codes(codes, grid, target)
        else:
            self._moments.add(grid.dequantize(codes), target)

    def _positions(self, y: Tensor) -> Tensor | None:
        """A seeded subset of output positions, so that all chunks together give about rows·D rows."""
        if not self._kernel:
            return None
        available = math.prod(y.shape[2:])
        wanted = -(-self.settings.rows * self._rows.shape[2] // self.samples)
        if wanted >= available:
            return None
        return torch.randperm(available, generator=self._generator)[:wanted].sort().values.to(y.device)

    def solve(self, relaxed: RelaxedSolver) -> tuple[QuantizedWeight, LayerReport]:
        """Choose the scale and the codes. relaxed: runs the gradient solver, where the settings ask for it."""
        moments = self._moments.mean()
        if not (math.isfinite(moments[2]) and bool(torch.isfinite(moments[0]).all())):
            raise UnsupportedModelError(
                f"the input of layer {self.layer.name} becomes NaN or infinite on the calibration data; "
                "check --mean, --std and the model"
            )
        grid, problem = self._problem(moments)
        up, lambda_e = self._choose(problem, relaxed)
        layout = self._unfold.from_rows
        codes = layout((problem.floor + up).to(torch.int8), tuple(self.weight.shape))
        scale = grid.scale[: self.weight.shape[self.layer.channel_axis]].cpu().numpy()
        if self.block and self.layer.channel_axis == 1:
            scale = np.ascontiguousarray(scale.T)
        report = LayerReport(
            name=self.layer.name,
            op_type=self.layer.op_type,
            bits=self.bits,
            shape=tuple(self.weight.shape),
            scale_min=float(scale.min()),
            scale_max=float(scale.max()),
            flipped=100 * float((up != problem.nearest).float().mean()),
            lambda_e=lambda_e,
            loss_nearest=quadratic_loss(problem, problem.nearest),
            loss=quadratic_loss(problem, up),
            rows=self._moments.rows,
            seconds=time.perf_counter() - self._started,
            block=self.block,
        )
        return QuantizedWeight(codes.cpu().numpy(), scale, self.layer.channel_axis, self.bits, self.block), report

    def _choose(self, problem: RoundingProblem, relaxed: RelaxedSolver) -> tuple[Tensor, float]:
        solver = self.settings.solver
        if solver is None:
            return problem.nearest, 0.0
        if isinstance(solver, Relaxed):
            return relaxed(problem, solver), solver.lambda_e
        if solver.fidelity is not None:
            return solve_within(problem, solver)
        return solve_coordinate(problem, solver), solver.lambda_e

    # The grid.

    def _problem(self, moments: tuple[Tensor, Tensor, float]) -> tuple[WeightGrid, RoundingProblem]:
        """The layer's grid, by the settings' choice of scale, and the problem on it."""
        solver = self.settings.solver
        greedy = isinstance(solver, Coordinate) and solver.start == "greedy"
        factor = factorize(moments[0], moments[1]) if greedy else None
        flat = self._rows.flatten(0, 1)
        at_least = self._smallest_scale()
        chosen = searched_scale if self.settings.scale == "mse" else symmetric_scale
        if self.block:
            # Float activations leave the bias float: nothing bounds the scales from below.
            scales = chosen(flat.reshape(-1, self.block), self.bits).view(len(flat), -1)
            blocks = WeightGrid(scales, self.bits, self.block)
            return blocks, make_problem(self._rows, blocks, moments, factor)
        grid = WeightGrid(self._shared(chosen(flat, self.bits, at_least=at_least)), self.bits)
        problem = make_problem(self._rows, grid, moments, factor)
        if self.settings.scale != "refit" or self.layer.op_type == "ConvTranspose":
            return grid, problem
        plain = Coordinate(lambda_e=0.0)
        up = solve_coordinate(problem, plain)
        for _ in range(REFITS):
            tried_grid = WeightGrid(refitted_scale(problem, up, grid, at_least), self.bits)
            tried = make_problem(self._rows, tried_grid, moments, factor)
            tried_up = solve_coordinate(tried, plain)
            better = row_losses(tried, tried_up) < row_losses(problem, up)  # (G, O): rows are independent
            scale = torch.where(better.flatten(), tried_grid.scale, grid.scale)
            up = torch.where(better[..., None], tried_up, up)
            grid = WeightGrid(scale, self.bits)
            problem = make_problem(self._rows, grid, moments, factor)
        return grid, problem

    def _smallest_scale(self) -> Tensor | None:
        if self.bias is None or self.input_grid is None:
            return None
        return self.bias.abs() / (self.input_grid.scale * BIAS_LIMIT)

    def _shared(self, scale: Tensor) -> Tensor:
        """DequantizeLinear has one scale per index of the weight's channel axis, which the groups of a transposed
        convolution share."""
        if self.layer.op_type != "ConvTranspose":
            return scale
        groups, outputs, _ = self._rows.shape
        return scale.view(groups, outputs).amax(0).repeat(groups)
