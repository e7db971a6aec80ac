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

from efrapq.rounding.threads import one_thread

if TYPE_CHECKING:
    from efrapq.rounding.problem import RoundingProblem

__all__ = ["Factor", "factorize", "greedy_choice"]

# Share of the mean diagonal added to H: directions that calibration never saw must not steer the feedback.
DAMPING = 0.01
BLOCK = 128
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
        lower, failed = torch.linalg.cholesky_ex(H.to(precision))
        if not bool(failed.any()):
            return lower.float()
    return None


def greedy_choice(problem: RoundingProblem, factor: Factor, pull: Tensor) -> tuple[Tensor, Tensor]:
    """The choice h, (G, D, O) bool, and each row's part of L_A for it, (G, O) float64, which comes with it for free.

    pull: (G, D, O), what being up costs over being down (λ_E included).
    """
    index = factor.order[:, :, None].expand_as(factor.offset)
    movable = problem.movable.transpose(1, 2).gather(1, index)
    lows = (problem.floor * problem.scale.float()[..., None] - problem.weight).transpose(1, 2).gather(1, index)
    pull = pull.gather(1, index)
    scale = problem.scale.float()
    R, pending = factor.triangle, factor.offset.clone()
    diagonal = R.diagonal(dim1=1, dim2=2)[..., None]
    inputs = pending.shape[1]
    up = torch.zeros_like(movable)
    deltas = torch.empty_like(lows)
    for a in range(0, inputs, BLOCK):
        b = min(a + BLOCK, inputs)
        inner = R[:, a:b, a:b].transpose(1, 2).contiguous()  # (G, j, i): what column i adds to column j
        chosen = lows[:, a:b].clone()
        # Going up changes the square of the term by step·(2·term + step).
        step = diagonal[:, a:b] * scale[:, None]
        rest = step.square() + 2 * step * diagonal[:, a:b] * lows[:, a:b] + pull[:, a:b]
        rest = torch.where(movable[:, a:b], rest, torch.inf)
        step *= 2
        block = pending[:, a:b]
        with one_thread(R.device):
            for p in range(0, b - a, PANEL):
                q = min(p + PANEL, b - a)
                for j in range(p, q):
                    rise = torch.addcmul(rest[:, j], step[:, j], block[:, j]) < 0
                    up[:, a + j] = rise
                    chosen[:, j] += rise * scale
                    if j + 1 < q:
                        block[:, j + 1 : q].addcmul_(inner[:, j + 1 : q, j, None], chosen[:, j, None])
                if q < b - a:
                    block[:, q:].baddbmm_(inner[:, q:, p:q], chosen[:, p:q])
        deltas[:, a:b] = chosen
        if b < inputs:
            pending[:, b:].baddbmm_(R[:, a:b, b:].transpose(1, 2), chosen)
    # The terms squared add up to the damped quadratic; `pending` holds what they owe to the columns before.
    terms = (pending + diagonal * deltas).double()
    losses = terms.square().sum(1) - factor.offset.double().square().sum(1)
    losses -= factor.damping[:, None] * deltas.double().square().sum(1)
    return torch.zeros_like(up).scatter_(1, index, up), losses
