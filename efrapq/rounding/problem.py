"""The rounding problem of one layer, as tensors.

A layer with G groups, O output channels per group and D inputs per output (D = Cin/groups · kh · kw for a
convolution) is a batch of G independent problems. With x the layer's input in the float network, x̂ in the quantized
one and δ = ŵ - w what rounding does to a row w,

    L_A = E |ŵ·x̂ - w·x|²  =  δ H δᵀ + 2 δ·g + c,      H = E[x̂ x̂ᵀ],  g = E[(w·x̂ - w·x) x̂],  c = E[(w·x̂ - w·x)²]

All three are sums over samples, so they are accumulated in one streaming pass (and could be added up across
machines); rows are independent of one another. Written around w instead of 0, nothing large cancels: g and c hold
only what the layers before have already changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efrapq.grid import ActivationGrid, WeightGrid, grid_position
from efrapq.rounding.gram import MOST_ROWS, gram_, gram_codes_, mirror_
from efrapq.rounding.greedy import Factor

__all__ = ["Moments", "RoundingProblem", "make_problem", "quadratic_loss", "row_losses"]


class Moments:
    """Running sums for H, g and c over rows of inputs and float outputs.

    weight: (G, O, D) float32. Products are taken in float32 (of codes: in integers) and summed in float64, so that
    the result does not drift with the number of chunks. All are plain sums over samples: `+=` adds the share of other
    samples, wherever they were summed.
    """

    def __init__(self, weight: Tensor) -> None:
        groups, outputs, inputs = weight.shape
        self._weight = weight
        self._h = torch.zeros(groups, inputs, inputs, dtype=torch.float64, device=weight.device)
        self._cross = torch.zeros(groups, outputs, inputs, dtype=torch.float64, device=weight.device)
        self._error = torch.zeros((), dtype=torch.float64, device=weight.device)
        self._code_scale: float | None = None
        self.rows = 0

    def add(self, x_hat: Tensor, y: Tensor) -> None:
        """Add rows: x_hat (G, R, D) quantized-network inputs, y (G, R, O) float-network outputs without the bias."""
        if self._code_scale is not None:
            raise ValueError("rows of codes and of reals do not go into one sum")
        gram_(self._h, x_hat)
        self._add_rest(x_hat, y)

    def add_codes(self, codes: Tensor, grid: ActivationGrid, y: Tensor) -> None:
        """Add rows given as codes (1, R, D) uint8 on the layer's input grid: H is then a sum of integers, exact."""
        if self._code_scale != grid.scale and self.rows:
            raise ValueError("rows of codes and of reals, or of two grids, do not go into one sum")
        self._code_scale = grid.scale
        for a in range(0, codes.shape[1], MOST_ROWS):
            gram_codes_(self._h[0], codes[0, a : a + MOST_ROWS], grid.zero_point)
        self._add_rest(grid.dequantize(codes), y)

    def _add_rest(self, x_hat: Tensor, y: Tensor) -> None:
        changed = x_hat @ self._weight.transpose(1, 2) - y
        self._cross += changed.transpose(1, 2) @ x_hat
        self._error += changed.double().square().sum()
        self.rows += x_hat.shape[1]

    def __iadd__(self, other: Moments) -> Moments:
        """The sums of both sets of rows, in place."""
        if self.rows and other.rows and self._code_scale != other._code_scale:
            raise ValueError("rows of codes and of reals, or of two grids, do not go into one sum")
        self._code_scale = other._code_scale if other.rows else self._code_scale
        self._h += other._h
        self._cross += other._cross
        self._error += other._error
        self.rows += other.rows
        return self

    def mean(self) -> tuple[Tensor, Tensor, float]:
        """(H (G, D, D), g (G, O, D), c): float64 means over the rows seen."""
        n = max(self.rows, 1)
        H = mirror_(self._h).clone()
        H *= (1.0 if self._code_scale is None else self._code_scale**2) / n
        return H, self._cross / n, float(self._error) / n


@dataclass(frozen=True)
class RoundingProblem:
    """What a solver needs to know about one layer.

    scale: (G, O) float32, or (G, O, D) where blocks of inputs have their own. floor, residue: (G, O, D) float32 from
    `grid_position`; the code is floor + h, h ∈ {0, 1}.
    movable: (G, O, D) bool, false where the grid allows only one code. H: (G, D, D), cross: g, (G, O, D), both
    float64. error: the constant c. factor: of H and g, where it is known already.
    """

    weight: Tensor
    scale: Tensor
    floor: Tensor
    residue: Tensor
    movable: Tensor
    nearest: Tensor
    H: Tensor
    cross: Tensor
    error: float
    factor: Factor | None = None

    @property
    def steps(self) -> Tensor:
        """The scale of each weight, (G, O, 1) or (G, O, D)."""
        return self.scale if self.scale.ndim == 3 else self.scale[..., None]

    def errors(self, kind: str) -> Tensor:
        """Truncation errors e of rounding to nearest: in weight units ("absolute", the paper's) or in steps.

        (G, O, D) float32; min(r, 1 - r) times the scale or alone.
        """
        steps = torch.minimum(self.residue, 1 - self.residue)
        return steps * self.steps if kind == "absolute" else steps

    def real(self, up: Tensor) -> Tensor:
        """Ŵ for a choice h: (G, O, D) → (G, O, D) float64."""
        return (self.floor.double() + up) * self.steps.double()

    def delta(self, up: Tensor) -> Tensor:
        """δ = Ŵ - W for a choice h: (G, O, D) → (G, O, D) float64."""
        return self.real(up) - self.weight.double()


def make_problem(
    weight: Tensor, grid: WeightGrid, moments: tuple[Tensor, Tensor, float], factor: Factor | None = None
) -> RoundingProblem:
    """Set up a layer's problem. weight: (G, O, D) float32; grid.scale: (G·O, …), groups outermost.

    factor: of the same moments, where it is known already.
    """
    groups, outputs, inputs = weight.shape
    floor, residue = grid_position(weight.reshape(groups * outputs, inputs), grid)
    floor, residue = floor.view_as(weight), residue.view_as(weight)
    # Half to even, as QuantizeLinear rounds: a residue of exactly 1/2 goes to the even neighbour.
    nearest = (residue > 0.5) | ((residue == 0.5) & (floor.remainder(2) == 1))
    H, cross, error = moments
    return RoundingProblem(
        weight=weight,
        scale=grid.steps.view(weight.shape) if grid.block else grid.scale.view(groups, outputs),
        floor=floor,
        residue=residue,
        movable=residue > 0,
        nearest=nearest,
        H=H,
        cross=cross,
        error=error,
        factor=factor,
    )


def row_losses(problem: RoundingProblem, up: Tensor) -> Tensor:
    """Each output row's own part of L_A, without the constant c: (G, O, D) → (G, O) float64.

    The product is float32, a sum of squares that does not cancel; what is added to it is float64.
    """
    d = problem.delta(up)
    return (d * ((d.float() @ problem.H.float()).double() + 2 * problem.cross)).sum(2)


def quadratic_loss(problem: RoundingProblem, up: Tensor) -> float:
    """L_A of a choice h (G, O, D), from H and g, in float64."""
    return float(row_losses(problem, up).sum()) + problem.error
