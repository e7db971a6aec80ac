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

if TYPE_CHECKING:
    from efrapq.rounding.problem import RoundingProblem

__all__ = ["Factor", "factorize", "greedy_choice"]

# Share of the mean diagonal added to H: directions that calibration never saw must not steer the feedback.
DAMPING = 0.01
BLOCK = 128


@dataclass(frozen=True)
class Factor:
    """What the greedy choice needs of H and g: it changes neither with λ_E nor with the scale.

    order: (G, D) int64, columns by falling energy. triangle: R of the permuted H, (G, D, D) float32, upper.
    offset: R⁻¹ gᵀ, permuted, (G, D, O) float32.
    """

    order: Tensor
    triangle: Tensor
    offset: Tensor


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
    lower, failed = torch.linalg.cholesky_ex(reversed_h)
    del reversed_h
    if bool(failed.any()):
        return None
    triangle = lower.flip(1, 2).float().contiguous()
    del lower
    wanted = cross.float().transpose(1, 2)
    wanted = wanted.gather(1, order[:, :, None].expand_as(wanted))
    offset = torch.linalg.solve_triangular(triangle, wanted, upper=True)
    return Factor(order, triangle, offset.contiguous())


def greedy_choice(problem: RoundingProblem, factor: Factor, pull: Tensor) -> Tensor:
    """The choice h, (G, D, O) bool. pull: (G, D, O), what being up costs over being down (λ_E included)."""
    index = factor.order[:, :, None].expand_as(factor.offset)
    movable = problem.movable.transpose(1, 2).gather(1, index)
    lows = (problem.floor * problem.scale.float()[..., None] - problem.weight).transpose(1, 2).gather(1, index)
    pull = pull.gather(1, index)
    scale = problem.scale.float()
    R, pending = factor.triangle, factor.offset.clone()
    diagonal = R.diagonal(dim1=1, dim2=2)[..., None]
    inputs = pending.shape[1]
    up = torch.zeros_like(movable)
    for a in range(0, inputs, BLOCK):
        b = min(a + BLOCK, inputs)
        chosen = torch.empty_like(pending[:, a:b])
        inner = R[:, a:b, a:b].contiguous()
        for j in range(b - a):
            low = lows[:, a + j]
            step = diagonal[:, a + j] * scale
            term = diagonal[:, a + j] * low + pending[:, a + j]
            rise = (step * (2 * term + step) + pull[:, a + j] < 0) & movable[:, a + j]
            up[:, a + j] = rise
            chosen[:, j] = torch.where(rise, low + scale, low)
            if j + 1 < b - a:
                pending[:, a + j + 1 : b] += inner[:, j, j + 1 :, None] * chosen[:, j, None]
        if b < inputs:
            pending[:, b:] += R[:, a:b, b:].transpose(1, 2) @ chosen
    return torch.zeros_like(up).scatter_(1, index, up)
