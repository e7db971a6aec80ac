"""Activation ranges from calibration data: min-max, percentile, or least squared error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from efrapq.errors import UnsupportedModelError
from efrapq.grid import ActivationGrid, activation_grid

__all__ = ["RANGE_METHODS", "calibrate", "extremes"]

RANGE_METHODS = ("minmax", "percentile", "mse")
BINS = 4096
PERCENTILE = 0.9999
CANDIDATES = 80


def extremes(chunks: Sequence[Tensor], name: str = "activation") -> tuple[float, float]:
    """Lowest and highest of an activation's float values, given in chunks of any shape.

    Raises UnsupportedModelError if a value is NaN or infinite.
    """
    found = torch.stack([torch.stack(c.aminmax()) for c in chunks]).double()  # NaN comes through both
    if not bool(torch.isfinite(found).all()):
        raise UnsupportedModelError(
            f"activation {name} becomes NaN or infinite on the calibration data; check --mean, --std and the model"
        )
    return float(found[:, 0].min()), float(found[:, 1].max())


def calibrate(
    chunks: Sequence[Tensor],
    bits: int,
    method: str,
    name: str = "activation",
    limits: tuple[float, float] | None = None,
) -> ActivationGrid:
    """The grid of one activation from its float values, given in chunks of any shape.

    limits: of what is to be told apart, by default the `extremes`, errors included; values outside count as its ends.
    minmax: all of it. percentile: 99.99 % on either side. mse: of the ranges that this one shrinks to, the one with the
    least squared rounding error over a histogram of 4096 bins.
    """
    low, high = limits or extremes(chunks, name)
    low, high = min(low, 0.0), max(high, 0.0)
    if method == "minmax" or low == high:
        return activation_grid(low, high, bits)
    counts = torch.zeros(BINS, dtype=torch.float64)
    for c in chunks:
        counts += torch.histc(c.float().clamp(low, high), BINS, low, high).double().cpu()
    if method == "percentile":
        return activation_grid(*_percentile_range(counts, low, high), bits)
    return _least_error(counts, low, high, bits)


def _percentile_range(counts: Tensor, low: float, high: float) -> tuple[float, float]:
    share = counts.cumsum(0) / counts.sum()
    width = (high - low) / BINS
    first = int(torch.searchsorted(share, 1 - PERCENTILE))
    last = int(torch.searchsorted(share, PERCENTILE))
    return low + first * width, low + (last + 1) * width


def _least_error(counts: Tensor, low: float, high: float, bits: int) -> ActivationGrid:
    width = (high - low) / BINS
    centres = (low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * width).float()
    best, best_error = activation_grid(low, high, bits), float("inf")
    for i in range(CANDIDATES):
        shrink = 1 - 0.01 * i
        grid = activation_grid(low * shrink, high * shrink, bits)
        error = float((counts * (grid.fake_quantize(centres) - centres).double().square()).sum())
        if error < best_error:
            best, best_error = grid, error
    return best
