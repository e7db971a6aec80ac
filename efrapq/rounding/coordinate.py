"""The default solver: blocked coordinate descent on the quadratic.

Flipping weight j of row o moves ŵ by d = ±s and changes the objective by

    2 d R_oj + d² H_jj ± λ_E e_oj,        R = δ H + g,  δ = Ŵ - W

so one sweep visits the columns in turn and flips, in all rows at once, whatever lowers the objective. R is kept
exact inside a block of columns by rank-one updates and brought up to date outside it by one matrix product per
block (the lazy batch of GPTQ, arXiv 2210.17323); compiled for a CPU, a flip updates its own row of R at once.
Coordinate descent on this quadratic: QuantEase, arXiv 2309.01885.
The descent starts from a rounding with error feedback (`greedy`), which lies lower than where a descent from
nearest ends.

λ_E is given, or found: with `fidelity` it is the largest whose L_A stays within that factor of what λ_E = 0 reaches,
so that each layer flips as much as its fidelity allows.

Tensors are held transposed, (G, D, O), so that a column of weights is contiguous over the output rows. Rows do not
see one another: a problem cut into sets of rows has the same solution, put together again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from efrapq.rounding.chain import LONGEST_BLOCK, chain, has_kernel, sweep_on_cpu
from efrapq.rounding.greedy import Greedy, factorize
from efrapq.rounding.problem import RoundingProblem
from efrapq.rounding.threads import one_thread

__all__ = ["Coordinate", "solve_coordinate", "solve_within"]

# Where λ_E is looked for with `fidelity`: powers of two around the problem's own unit, halved so often.
LOWEST, HIGHEST, HALVINGS = -8.0, 6.0, 4
# Columns between two products inside a block.
PANEL = 16


@dataclass(frozen=True)
class Coordinate:
    """Settings. lambda_e: weight of the error term; error: "absolute" (the paper's, in weight units) or "relative"
    (in steps, independent of the bit width); fidelity: factor on L_A, at least 1, by which λ_E is chosen instead;
    start: greedy or nearest; sweeps: at most so many, fewer where nothing flips any more. (A number and not a
    share of flips: what happens in one row must not decide about another.)
    """

    lambda_e: float = 1e-3
    error: str = "absolute"
    fidelity: float | None = None
    start: str = "greedy"
    sweeps: int = 2
    block: int = 256


def solve_coordinate(problem: RoundingProblem, settings: Coordinate, start: Tensor | None = None) -> Tensor:
    """The choice h that no single flip improves (unless the sweeps run out), at settings.lambda_e.

    start: (G, O, D) bool, by default as the settings say. Returns (G, O, D) bool. Arithmetic is float32 on the
    problem's device.
    """
    descent = _Descent(problem, settings)
    if start is None:
        up = descent.first(settings.lambda_e)
    else:
        # A copy even where the transposed strides happen to be contiguous (O = 1): it is flipped in place.
        up = start.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    up, _ = descent.descend(up, settings.lambda_e, settings.sweeps)
    return up.transpose(1, 2).contiguous()


def solve_within(problem: RoundingProblem, settings: Coordinate) -> tuple[Tensor, float]:
    """The choice h, (G, O, D) bool, and the λ_E it was found with: the largest for which L_A stays within
    settings.fidelity of the optimum for λ_E = 0.
    """
    assert settings.fidelity is not None
    descent = _Descent(problem, settings)
    best, reached = descent.descend(descent.first(0.0), 0.0, settings.sweeps)
    limit, found = settings.fidelity * reached, 0.0
    low, high = LOWEST, HIGHEST
    unit = descent.unit()
    for _ in range(HALVINGS if unit > 0 else 0):
        middle = (low + high) / 2
        lambda_e = unit * 2.0**middle
        up, loss = descent.trial(lambda_e)
        if loss <= limit:
            best, found, low = up, lambda_e, middle
        else:
            high = middle
    if found > 0:
        # The sweeps trade L_A against the error term as well: what they give counts only within the limit.
        up, loss = descent.descend(best.clone(), found, settings.sweeps)
        if loss <= limit:
            best = up
    return best.transpose(1, 2).contiguous(), found


class _Descent:
    """One problem made ready to be swept, for any λ_E."""

    def __init__(self, problem: RoundingProblem, settings: Coordinate) -> None:
        self.problem, self.settings = problem, settings
        self.H = problem.H.float()
        # (G, 1, O), or (G, D, O) where blocks of inputs have their own.
        self.scale = problem.steps.float().transpose(1, 2).contiguous()
        movable = problem.movable.transpose(1, 2)
        # What being up costs over being down: the flip target is the side that nearest did not choose.
        errors = problem.errors(settings.error).transpose(1, 2)
        self.pull = torch.where(problem.nearest.transpose(1, 2), errors, -errors).contiguous()
        curvature = self.scale.square() * self.H.diagonal(dim1=1, dim2=2)[..., None]
        self.curvature = torch.where(movable, curvature, torch.inf).contiguous()
        self.nearest = problem.nearest.transpose(1, 2).contiguous()
        self.nearest_R, self.nearest_loss = self._state(self.nearest)
        self._greedy = None
        if settings.start == "greedy" and (factor := problem.factor or factorize(problem.H, problem.cross)) is not None:
            self._greedy = Greedy(problem, factor, self.pull)

    def unit(self) -> float:
        """The λ_E at which the error term of a typical weight is worth what flipping it alone costs."""
        counted = torch.isfinite(self.curvature) & (self.pull != 0)
        if not bool(counted.any()):
            return 0.0
        value = float(self.curvature[counted].double().mean() / self.pull[counted].abs().double().mean())
        return value if math.isfinite(value) else 0.0

    def first(self, lambda_e: float) -> Tensor:
        """Where the descent starts, (G, D, O) bool."""
        if self._greedy is not None:
            return self._greedy.choose(lambda_e)[0]
        return self.nearest.clone()

    def trial(self, lambda_e: float) -> tuple[Tensor, float]:
        """A quick choice for λ_E, and its L_A: the greedy one as it is, one sweep from any other start."""
        if self._greedy is None:
            return self.descend(self.first(lambda_e), lambda_e, 1)
        up, losses = self._greedy.choose(lambda_e)
        return up, float(losses.sum()) + self.problem.error

    def descend(self, up: Tensor, lambda_e: float, sweeps: int) -> tuple[Tensor, float]:
        """Sweep `up` in place, until a sweep flips nothing or they run out. Returns it with its L_A.

        Rows that would start above nearest start from nearest, so that none can end above it.
        """
        R, loss = self._state(up)
        pull = lambda_e * self.pull
        worse = loss + (up * pull).sum(1) > self.nearest_loss + (self.nearest * pull).sum(1)
        torch.where(worse[:, None], self.nearest, up, out=up)
        torch.where(worse[:, None], self.nearest_R, R, out=R)
        for _ in range(sweeps):
            if _sweep(R, self.H, self.scale, up, pull, self.curvature, self.settings.block) == 0:
                break
        return up, float(self._row_losses(up, R).sum()) + self.problem.error

    def _state(self, up: Tensor) -> tuple[Tensor, Tensor]:
        """R (G, D, O) float32 and each row's part of L_A (G, O) float64."""
        delta = self.problem.delta(up.transpose(1, 2)).float()
        R = (delta @ self.H + self.problem.cross.float()).transpose(1, 2).contiguous()
        return R, self._row_losses(up, R)

    def _row_losses(self, up: Tensor, R: Tensor) -> Tensor:
        delta = self.problem.delta(up.transpose(1, 2))
        return (delta * (R.transpose(1, 2).double() + self.problem.cross)).sum(2)


def _sweep(R: Tensor, H: Tensor, scale: Tensor, up: Tensor, pull: Tensor, curvature: Tensor, block: int) -> int:
    """Visit every column once, flipping `up` and updating R in place. Returns the number of flips."""
    if has_kernel(R.device):
        if R.device.type == "cpu":
            return sweep_on_cpu(R, H, scale, up, pull, curvature)
        return _sweep_on_gpu(R, H, scale, up, pull, curvature, min(block, LONGEST_BLOCK))
    inputs = up.shape[1]
    flips = 0
    for a in range(0, inputs, block):
        b = min(a + block, inputs)
        sign = 1.0 - 2.0 * up[:, a:b].float()  # +1 where the weight would go up; each is looked at once
        step = scale if scale.shape[1] == 1 else scale[:, a:b]
        inner, within = R[:, a:b].clone(), H[:, a:b, a:b].contiguous()
        with one_thread(R.device):
            moved = _sweep_block(inner, within, 2 * step, sign, sign * step, pull[:, a:b], curvature[:, a:b])
        flipped = moved != 0
        count = int(torch.count_nonzero(flipped))
        if count:
            up[:, a:b] ^= flipped
            R.baddbmm_(H[:, :, a:b], moved)
        flips += count
    return flips


def _sweep_on_gpu(R: Tensor, H: Tensor, scale: Tensor, up: Tensor, pull: Tensor, curvature: Tensor, block: int) -> int:
    """`_sweep`, each block in one kernel. Whether anything flips is asked once: an answer costs a round trip."""
    inputs = up.shape[1]
    sign = 1.0 - 2.0 * up.float()
    step = sign * scale
    cost, gain, still = torch.addcmul(curvature, pull, sign), 2 * step, torch.zeros_like(step)
    moved = torch.empty_like(R)
    for a in range(0, inputs, block):
        b = min(a + block, inputs)
        chain(R, H, cost, gain, step, still, moved, None, a, b, symmetric=True)
        R.baddbmm_(H[:, :, a:b], moved[:, a:b])
    flipped = moved != 0
    up ^= flipped
    return int(torch.count_nonzero(flipped))


def _sweep_block(
    inner: Tensor, H: Tensor, slope: Tensor, sign: Tensor, step: Tensor, pull: Tensor, curvature: Tensor
) -> Tensor:
    """The steps taken in one block of columns, (G, B, O); `inner` is its part of R and is used up.

    Once more in panels: the rank-one updates stay small enough for one core's cache, and the rest is a product.
    """
    # Asking whether anything flips costs a GPU a round trip, and saves a CPU most of a late sweep.
    sparse = inner.device.type == "cpu"
    moved = torch.zeros_like(inner)
    size = inner.shape[1]
    gain, resist = slope.expand_as(inner) * sign, -curvature
    columns = [x.unbind(1) for x in (pull * sign, gain, inner, resist, step, moved)]
    for a in range(0, size, PANEL):
        b = min(a + PANEL, size)
        for j in range(a, b):
            pull_j, gain_j, inner_j, resist_j, step_j, moved_j = (c[j] for c in columns)
            flip = torch.addcmul(pull_j, gain_j, inner_j) < resist_j
            if sparse and not bool(flip.any()):
                continue
            torch.mul(flip, step_j, out=moved_j)
            if j + 1 < b:
                inner[:, j + 1 : b].addcmul_(H[:, j + 1 : b, j, None], moved_j[:, None])
        if b < size:
            inner[:, b:].baddbmm_(H[:, b:, a:b], moved[:, a:b])
    return moved
