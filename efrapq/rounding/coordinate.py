"""The default solver: blocked coordinate descent on the quadratic.

Flipping weight j of row o moves ŵ by d = ±s and changes the objective by

    2 d R_oj + d² H_jj ± λ_E e_oj,        R = δ H + g,  δ = Ŵ - W

so one sweep visits the columns in turn and flips, in all rows at once, whatever lowers the objective. R is kept
exact inside a block of columns by rank-one updates and brought up to date outside it by one matrix product per
block (the lazy batch of GPTQ, arXiv 2210.17323). Coordinate descent on this quadratic: QuantEase, arXiv 2309.01885.

Tensors are held transposed, (G, D, O), so that a column of weights is contiguous over the output rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efrapq.rounding.problem import RoundingProblem

__all__ = ["Coordinate", "solve_coordinate"]


@dataclass(frozen=True)
class Coordinate:
    """Settings. lambda_e: weight of the error term; error: "absolute" (the paper's, in weight units) or "relative"
    (in steps, independent of the bit width); sweeps: at most so many; tolerance: stop when a sweep flips no more than
    this share of the weights.
    """

    lambda_e: float = 1e-3
    error: str = "absolute"
    sweeps: int = 30
    tolerance: float = 0.0
    block: int = 128


def solve_coordinate(problem: RoundingProblem, settings: Coordinate, start: Tensor | None = None) -> Tensor:
    """The choice h that no single flip improves (unless the sweeps run out). Returns (G, O, D) bool.

    start: (G, O, D) bool, nearest by default. Arithmetic is float32 on the problem's device.
    """
    H = problem.H.float()
    scale = problem.scale.float()[:, None, :]  # (G, 1, O)
    # (G, D, O). A copy even where the transposed strides happen to be contiguous (O = 1): it is flipped in place.
    up = (problem.nearest if start is None else start).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    movable = problem.movable.transpose(1, 2)
    # What being up costs over being down: the flip target is the side that nearest did not choose.
    pull = settings.lambda_e * problem.errors(settings.error).transpose(1, 2)
    pull = torch.where(problem.nearest.transpose(1, 2), pull, -pull)
    curvature = scale.square() * H.diagonal(dim1=1, dim2=2)[..., None]
    curvature = torch.where(movable, curvature, torch.inf)
    budget = settings.tolerance * up.numel()
    R = _residual(problem, up)
    for _ in range(settings.sweeps):
        if _sweep(R, H, scale, up, pull, curvature, settings.block) <= budget:
            break
    return up.transpose(1, 2).contiguous()


def _residual(problem: RoundingProblem, up: Tensor) -> Tensor:
    """R = δ H + g in float64 for up (G, D, O), as (G, D, O) float32."""
    delta = problem.delta(up.transpose(1, 2))
    return (delta @ problem.H + problem.cross).float().transpose(1, 2).contiguous()


def _sweep(R: Tensor, H: Tensor, scale: Tensor, up: Tensor, pull: Tensor, curvature: Tensor, block: int) -> int:
    """Visit every column once, flipping `up` and updating R in place. Returns the number of flips."""
    inputs = up.shape[1]
    step_up = scale[:, 0]
    flips = 0
    for a in range(0, inputs, block):
        b = min(a + block, inputs)
        inner = R[:, a:b].clone()
        h_block = H[:, a:b, a:b].contiguous()
        moved = torch.zeros_like(inner)
        for j in range(b - a):
            sign = 1.0 - 2.0 * up[:, a + j].float()  # +1 where the weight would go up
            slope = sign * (2.0 * step_up * inner[:, j] + pull[:, a + j])
            flip = slope < -curvature[:, a + j]
            step = torch.where(flip, sign * step_up, 0.0)
            moved[:, j] = step
            up[:, a + j] ^= flip
            if j + 1 < b - a:
                inner[:, j + 1 :] += h_block[:, j + 1 :, j, None] * step[:, None, :]
        count = int(torch.count_nonzero(moved))
        if count:
            R += H[:, :, a:b] @ moved
        flips += count
    return flips
