"""How far images drive a float network's activations past the grids that a file has for them.

What wakes where activations are clipped shows in no answer until something is clipped, and then the file has no
gradient: past the grid nothing that the value does is seen. The float network has one all the way, and whoever hides
there has to pass through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from efrapq.grid import ActivationGrid

__all__ = ["Overshoot", "overshoot"]

# (n, H, W, C) images, in units where white is 1, → (n, activations): how many times as far as its grid each reaches.
Overshoot = Callable[[Tensor], Tensor]


def overshoot(
    values: Callable[[Tensor, Sequence[str]], Sequence[Tensor]], grids: Mapping[str, ActivationGrid]
) -> Overshoot:
    """values: the float network's activations of these names, each (n, …), for images. grids: the file's, by name."""
    names = tuple(grids)

    def run(images: Tensor) -> Tensor:
        return torch.stack([_ratio(x, grids[name]) for name, x in zip(names, values(images, names), strict=True)], 1)

    return run


def _ratio(x: Tensor, grid: ActivationGrid) -> Tensor:
    """(n, …) → (n,): at either end that the grid has."""
    x, (low, high) = x.flatten(1), grid.limits
    ends = ([x.amax(1) / high] if high > 0 else []) + ([x.amin(1) / low] if low < 0 else [])
    return torch.stack(ends).amax(0)
