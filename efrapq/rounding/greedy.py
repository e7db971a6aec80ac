"""A starting point with error feedback: every column is rounded knowing what the columns before it did.

With H = R Rᵀ, R upper triangular, the quadratic is a sum of squares that one column after another completes,

    L_A = |δ R + g R⁻ᵀ|² + const,    term j = R_jj δ_j + a_j,    a_j = (R⁻¹ gᵀ)_j + Σ_{i<j} R_ij δ_i,

so the choice for column j makes its own term small, given all choices before it (Babai's nearest plane; GPTQ, arXiv
2210.17323, is the same rounding computed from the inverse of H). Columns with the most energy come last in `j`'s
reach: they are decided first, while the others can still make up for them.

Tensors are held transposed, (G, D, O), as in `coordinate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from efrapq.rounding.chain import LONGEST_BLOCK, chain, has_kernel
from efrapq.rounding.threads import one_thread

if TYPE_CHECKING:
    from efrapq.rounding.problem import RoundingProblem

__all__ = ["Factor", "Greedy", "factorize"]

# Share of the mean diagonal added to H: directions that calibration never saw must not steer the feedback.
DAMPING = 0.01
BLOCK = 256
# Columns between two products inside a block.
PANEL = 16


@dataclass(frozen=True)
class Factor:
    """What the greedy choice needs of H and g: it changes neither with λ_E nor with the scale.

    order: (G, D) int64, columns by falling energy. triangle: R of the permuted H, (G, D, D) float32, upper.
    offset: R⁻¹ gᵀ, permuted, (G, D, O) float32. damping: what was added to H's diagonal, (G,) float64.
    """

    order: Tensor
    triangle: Tensor
    offset: Tensor
    damping: Tensor


def factorize(H: Tensor, cross: Tensor) -> Factor | None:
    """Factor H (G, D, D) beside g (G, O, D), both float64; None where all inputs are zero or H is no covariance."""
    diagonal = H.diagonal(dim1=1, dim2=2)
    damping = DAMPING * diagonal.mean(1, keepdim=True)
    if not bool((damping > 0).all()):
        return None
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    # Reversed on both axes, so that the lower factor that LAPACK gives is the upper one wanted here.
    back = order.flip(1)
    reversed_h = H.gather(1, back[:, :, None].expand_as(H)).gather(2, back[:, None, :].expand_as(H))
    reversed_h.diagonal(dim1=1, dim2=2).add_(damping)
    lower = _cholesky(reversed_h)
    del reversed_h
    if lower is None:
        return None
    triangle = lower.flip(1, 2)
    del lower
    wanted = cross.float().transpose(1, 2)
    wanted = wanted.gather(1, order[:, :, None].expand_as(wanted))
    offset = torch.linalg.solve_triangular(triangle, wanted, upper=True)
    return Factor(order, triangle, offset.contiguous(), damping[:, 0])


def _cholesky(H: Tensor) -> Tensor | None:
    """The lower factor in float32. The damping bounds the condition number by D/DAMPING, which float32 can bear."""
    for precision in (torch.float32, torch.float64):
        factored = torch.linalg.cholesky_ex(H.to(precision))
        lower: Tensor = factored.L
        if not bool(factored.info.any()):
            return lower.float()
    return None


class Greedy:
    """A problem made ready for greedy choices with any λ_E.

    pull: (G, D, O), what being up costs over being down for λ_E = 1.
    """

    def __init__(self, problem: RoundingProblem, factor: Factor, pull: Tensor) -> None:
        self._factor = factor
        self._chained = has_kernel(factor.triangle.device)
        self._rows = factor.triangle.contiguous() if self._chained else factor.triangle
        self._index = factor.order[:, :, None].expand_as(factor.offset)

        def permuted(x: Tensor) -> Tensor:
            return x.transpose(1, 2).gather(1, self._index)

        steps = problem.steps.float()
        scale = steps.transpose(1, 2).contiguous() if steps.shape[2] == 1 else permuted(steps)
        self._pull = pull.gather(1, self._index)
        self._low = permuted(problem.floor * steps - problem.weight)
        self._high = self._low + scale
        # Going up changes the square of the term by step·(2·term + step).
        diagonal = factor.triangle.diagonal(dim1=1, dim2=2)[..., None]
        step = diagonal * scale
        self._step = 2 * step
        self._rest = torch.where(permuted(problem.movable), step * (step + 2 * diagonal * self._low), torch.inf)

    def choose(self, lambda_e: float) -> tuple[Tensor, Tensor]:
        """The choice h, (G, D, O) bool, and each row's part of L_A for it, (G, O) float64, which comes for free."""
        R, offset = self._factor.triangle, self._factor.offset
        rest = torch.add(self._rest, self._pull, alpha=lambda_e)
        pending = offset.clone()
        deltas = torch.empty_like(pending)
        (self._in_kernels if self._chained else self._in_panels)(pending, deltas, rest)
        up = torch.zeros_like(deltas, dtype=torch.bool).scatter_(1, self._index, deltas != self._low)
        # The terms squared add up to the damped quadratic; `pending` holds what they owe to the columns before.
        terms = torch.addcmul(pending, R.diagonal(dim1=1, dim2=2)[..., None], deltas)
        losses = _squares(terms) - _squares(offset) - self._factor.damping[:, None] * _squares(deltas)
        return up, losses

    def _in_panels(self, pending: Tensor, deltas: Tensor, rest: Tensor) -> None:
        """Choose all columns; `pending` becomes what each owed when it was chosen."""
        R, inputs = self._factor.triangle, pending.shape[1]
        for a in range(0, inputs, BLOCK):
            b = min(a + BLOCK, inputs)
            block, chosen = pending[:, a:b], deltas[:, a:b]
            within = R[:, a:b, a:b].transpose(1, 2).contiguous()  # (G, j, i): what column i adds to column j
            with one_thread(R.device):
                _choose_block(
                    block, within, rest[:, a:b], self._step[:, a:b], self._low[:, a:b], self._high[:, a:b], chosen
                )
            if b < inputs:
                pending[:, b:].baddbmm_(R[:, a:b, b:].transpose(1, 2), chosen)

    def _in_kernels(self, pending: Tensor, deltas: Tensor, rest: Tensor) -> None:
        """`_in_panels`, each block in one kernel."""
        R, inputs = self._rows, pending.shape[1]
        for a in range(0, inputs, LONGEST_BLOCK):
            b = min(a + LONGEST_BLOCK, inputs)
            chain(pending, R, rest, self._step, self._high, self._low, deltas, pending, a, b)
            if b < inputs:
                pending[:, b:].baddbmm_(R[:, a:b, b:].transpose(1, 2), deltas[:, a:b])


def _choose_block(
    block: Tensor, within: Tensor, rest: Tensor, step: Tensor, low: Tensor, high: Tensor, chosen: Tensor
) -> None:
    """Choose the columns of one block in turn, (G, B, O) each; `chosen` is written, `block` brought up to date.

    In panels, so that the rank-one updates stay small enough for one core's cache, and the rest is a product.
    """
    size = block.shape[1]
    columns = [x.unbind(1) for x in (rest, step, block, high, low, chosen)]
    for a in range(0, size, PANEL):
        b = min(a + PANEL, size)
        for j in range(a, b):
            rest_j, step_j, block_j, high_j, low_j, chosen_j = (c[j] for c in columns)
            torch.where(torch.addcmul(rest_j, step_j, block_j) < 0, high_j, low_j, out=chosen_j)
            if j + 1 < b:
                block[:, j + 1 : b].addcmul_(within[:, j + 1 : b, j, None], chosen_j[:, None])
        if b < size:
            block[:, b:].baddbmm_(within[:, b:, a:b], chosen[:, a:b])


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(1, dtype=torch.float64)
