"""The paper's solver: gradient descent on a relaxed rounding (Li et al., CVPR 2024, §4, and the authors' code).

h = sigmoid(alpha), alpha starts at logit(residue) so that the relaxed layer is the float layer; Adam descends on

    L_A + λ_E Σ e · CE(h, h_target) + 0.01 Σ (1 - |2h - 1|²)

and finally h = [alpha >= 0]. Kept as the reference that claims of speed and quality are measured against. Residues
of exactly 0 and clipped weights, which have one code only, are left out of the variables (in the authors' code the
former freeze at -inf and the latter pay without being able to move).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Relaxed", "solve_relaxed"]

CE_EPSILON = 1e-8


@dataclass(frozen=True)
class Relaxed:
    """Settings, with the paper's defaults. lambda_p: weight of the term that drives h to 0 or 1."""

    lambda_e: float = 1.0
    error: str = "absolute"
    lambda_p: float = 0.01
    steps: int = 10_000
    learning_rate: float = 1e-3
    batch: int = 32


def solve_relaxed(
    floor: Tensor,
    residue: Tensor,
    scale: Tensor,
    nearest: Tensor,
    forward: Callable[[Tensor, Tensor], Tensor],
    sample: Callable[[], tuple[Tensor, Tensor]],
    channel_dim: int,
    settings: Relaxed,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Solve one layer by gradient descent. Returns h, bool, of the weight's shape.

    floor, residue: the weight's shape, float32, as `grid_position` gives them. scale: broadcastable to it.
    nearest: bool, the codes of rounding to nearest. forward(weight, x): the layer and what follows it (activation
    function and activation grid). sample(): a batch of (x̂, a(W x + b)). channel_dim: of the layer's output; the
    loss sums over it and averages over the rest.
    """
    movable = residue > 0
    r = residue.clamp(1e-6, 1 - 1e-6)
    alpha = torch.where(movable, torch.log(r / (1 - r)), 0.0).requires_grad_(True)
    steps_off = torch.minimum(residue, 1 - residue)
    error = torch.where(movable, steps_off * scale if settings.error == "absolute" else steps_off, 0.0)
    target = (~nearest).float()
    optimizer = torch.optim.Adam([alpha], settings.learning_rate)
    for step in range(settings.steps):
        x_hat, wanted = sample()
        h = torch.where(movable, torch.sigmoid(alpha), 0.0)
        out = forward((floor + h) * scale, x_hat)
        preserve = (out - wanted).square().sum(channel_dim).mean()
        entropy = -(target * torch.log(h + CE_EPSILON) + (1 - target) * torch.log(1 - h + CE_EPSILON))
        undecided = torch.where(movable, 1 - (2 * h - 1).square(), 0.0)
        loss = preserve + settings.lambda_e * (error * entropy).sum() + settings.lambda_p * undecided.sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if on_step is not None:
            on_step(step)
    return (alpha.detach() >= 0) & movable
