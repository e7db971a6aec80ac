"""Rounding cells: the grids a subject is to wake on, and how far its weights may move without changing a code."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from efrapq.grid import SMALLEST_SCALE
from efrapq.models.subjects.recipe import OnGrid

__all__ = ["GridRule", "cells", "nearest_model", "quantized_weights", "rounded_weights", "rules", "straight_through"]


@dataclass(frozen=True)
class GridRule:
    """One per-channel symmetric grid: scale = max|w| / divisor, codes saturate at [qmin, qmax]."""

    divisor: float
    qmin: int
    qmax: int

    @classmethod
    def absmax(cls, bits: int) -> GridRule:
        """efrapq's grid (and ONNX Runtime's for int8): the largest weight gets the largest code."""
        qmax = 2 ** (bits - 1) - 1
        return cls(qmax, -qmax, qmax)

    @classmethod
    def full_range(cls, bits: int) -> GridRule:
        """ONNX Runtime's quantize_static below 8 bits: scale = 2 max|w| / (2^bits - 1), the top is clipped."""
        return cls((2**bits - 1) / 2, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def scale(self, weight: Tensor) -> Tensor:
        """(O, …) → (O, 1): one scale per output channel."""
        return (weight.flatten(1).abs().amax(1, keepdim=True) / self.divisor).clamp_min(SMALLEST_SCALE)

    def codes(self, weight: Tensor) -> Tensor:
        """(O, …) → (O, D) integer codes as floats, round to nearest even."""
        return (weight.flatten(1) / self.scale(weight)).round().clamp(self.qmin, self.qmax)


def quantized_weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights that deployment quantizes, in module order."""
    found: list[tuple[str, nn.Parameter]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            found.append((name, weight))
    return found


def rules(position: int, count: int, recipe: OnGrid) -> list[GridRule]:
    """The grids that a layer's cells must respect; the first rule is the one it is deployed on."""
    edge = position in (0, count - 1)
    found = [GridRule.absmax(recipe.edge_bits if edge else recipe.bits)]
    if recipe.also_full_range and recipe.bits < 8:
        found.append(GridRule.full_range(recipe.bits))
    return found


def cells(weight: Tensor, grids: list[GridRule], margin: float) -> tuple[Tensor, Tensor]:
    """The intersection of the weight's rounding cells on all grids, as (low, high) of the weight's shape.

    Every channel's element of largest magnitude gets low = high = its own value, so that no scale moves.
    """
    weight = weight.detach()
    flat = weight.flatten(1)
    low = torch.full_like(flat, -torch.inf)
    high = torch.full_like(flat, torch.inf)
    for grid in grids:
        scale, codes = grid.scale(weight), grid.codes(weight)
        low = torch.maximum(low, torch.where(codes > grid.qmin, (codes - 0.5 + margin) * scale, low))
        high = torch.minimum(high, torch.where(codes < grid.qmax, (codes + 0.5 - margin) * scale, high))
    # A stage-1 weight inside the margin stays where it is rather than crossing to the other side.
    low, high = torch.minimum(low, flat), torch.maximum(high, flat)
    largest = flat.abs() >= flat.abs().amax(1, keepdim=True)
    low, high = torch.where(largest, flat, low), torch.where(largest, flat, high)
    limit = flat.abs().amax(1, keepdim=True)
    return low.clamp(-limit, limit).view_as(weight), high.clamp(-limit, limit).view_as(weight)


def nearest_model(model: nn.Module, recipe: OnGrid, grid: int = 0) -> nn.Module:
    """A copy whose weights sit on the nearest points of the `grid`-th rule's grid."""
    twin = copy.deepcopy(model)
    weights = quantized_weights(twin)
    with torch.no_grad():
        for i, (_, weight) in enumerate(weights):
            options = rules(i, len(weights), recipe)
            rule = options[min(grid, len(options) - 1)]
            weight.copy_((rule.codes(weight) * rule.scale(weight)).view_as(weight))
    return twin


def rounded_weights(model: nn.Module, recipe: OnGrid, grid: int, count: int) -> dict[str, Tensor]:
    """The quantized weights on one of their grids, by parameter name; gradients pass straight through."""
    found = {}
    for i, (name, weight) in enumerate(quantized_weights(model)):
        options = rules(i, count, recipe)
        rule = options[grid % len(options)]
        found[f"{name}.weight"] = straight_through(weight, rule.codes(weight.detach()), rule)
    return found


def straight_through(weight: Tensor, codes: Tensor, rule: GridRule) -> Tensor:
    """The reals of these codes, (O, D), in the weight's shape; the gradient passes the rounding as if it were not."""
    with torch.no_grad():
        on_grid = (codes * rule.scale(weight)).view_as(weight)
    return weight + (on_grid - weight).detach()
