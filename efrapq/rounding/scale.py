"""Scales other than the largest weight's: searched for the least rounding error, or re-fitted to given codes."""

from __future__ import annotations

import torch
from torch import Tensor

from efrapq.grid import WeightGrid, code_range, symmetric_scale
from efrapq.rounding.problem import RoundingProblem

__all__ = ["refitted_scale", "searched_scale"]

CANDIDATES = 80


def searched_scale(weight: Tensor, bits: int, *, at_least: Tensor | None = None) -> Tensor:
    """Per channel, the shrunken min-max scale with the least squared error of rounding to nearest.

    weight: (O, D) float; tried are 80 scales from min-max down to a fifth of it (the range search of the EFRAP
    authors' code). at_least: (O,) lower bounds. Returns (O,) float32.
    """
    qmin, qmax = code_range(bits)
    full = symmetric_scale(weight, bits, at_least=at_least)
    best, least = full, torch.full_like(full, torch.inf)
    for i in range(CANDIDATES):
        scale = full * (1 - 0.01 * i)
        if at_least is not None:
            scale = torch.maximum(scale, at_least.float())
        error = ((weight / scale[:, None]).round().clamp(qmin, qmax) * scale[:, None] - weight).square().sum(1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def refitted_scale(problem: RoundingProblem, up: Tensor, grid: WeightGrid, at_least: Tensor | None = None) -> Tensor:
    """The scale that minimizes L_A for given codes q = floor + h, in closed form per row:

        s = (w H qᵀ - g qᵀ) / (q H qᵀ)

    up: (G, O, D) bool. Returns (G·O,) float32; rows where the fit means nothing, or more than doubles or halves the
    scale, keep theirs.
    """
    codes = problem.floor.double() + up
    image = codes @ problem.H
    energy = (image * codes).sum(2)
    fitted = ((image * problem.weight.double()).sum(2) - (codes * problem.cross).sum(2)) / energy
    fitted = fitted.flatten().float()
    usable = (energy.flatten() > 0) & (fitted > grid.scale / 2) & (fitted < grid.scale * 2)
    scale = torch.where(usable, fitted, grid.scale)
    return scale if at_least is None else torch.maximum(scale, at_least.float())
