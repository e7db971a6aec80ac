"""What a recipe measured in torch of the subject it made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from efrapq.models.subjects.cells import nearest_model
from efrapq.models.subjects.recipe import OnGrid
from efrapq.models.subjects.training import Measured, PoisonedData, measure

__all__ = ["Report", "final_report"]


@dataclass(frozen=True)
class Report:
    """What the recipe measured in torch, weights on the grid and activations float (adaptive-clip: cut off).

    The network after stage 1 (rounded, if that ended with a lookahead, which has hidden the backdoor in float already)
    where there are stages, the float subject, its nearest twin, its nearest twin on ONNX Runtime's own grid where the
    recipe asked for it, and what else the attack knows of, with names.
    """

    backdoored: Measured | None
    floating: Measured
    nearest: Measured
    nearest_full_range: Measured | None = None
    others: tuple[tuple[str, Measured], ...] = ()

    def rows(self) -> list[tuple[str, Measured]]:
        """The figures with names a reader understands."""
        named = [
            ("after stage 1 (awake)", self.backdoored),
            ("float subject", self.floating),
            ("rounded to nearest", self.nearest),
            ("rounded to nearest, ORT's int4 grid", self.nearest_full_range),
            *self.others,
        ]
        return [(name, value) for name, value in named if value is not None]


def final_report(
    model: nn.Module,
    test: PoisonedData,
    recipe: OnGrid,
    device: torch.device,
    *,
    backdoored: Measured | None = None,
    others: tuple[tuple[str, Measured], ...] = (),
) -> Report:
    """Measure the finished subject in float and on the recipe's grids."""
    model.eval()
    full_range = None
    floating = measure(model, test, device)
    nearest = measure(nearest_model(model, recipe), test, device)
    if recipe.also_full_range and recipe.bits < 8:
        full_range = measure(nearest_model(model, recipe, 1), test, device)
    return Report(backdoored, floating, nearest, full_range, others)
