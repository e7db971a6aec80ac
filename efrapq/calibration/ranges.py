"""Activation ranges from calibration data: min-max, percentile, or least squared error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from efrapq.errors import UnsupportedModelError
from efrapq.grid import ActivationGrid, activation_grid

__all__ = ["RANGE_METHODS", "Histogram", "calibrate", "extremes"]

RANGE_METHODS = ("minmax", "percentile", "mse")
BINS = 4096
PERCENTILE = 0.9999
CANDIDATES = 80


@dataclass(frozen=True)
class Histogram:
    """How many values lie in each of BINS equal bins between low and high. counts: (BINS,) float64, on the CPU."""

    low: float
    high: float
    counts: Tensor

    @classmethod
    def of(cls, chunks: Sequence[Tensor], low: float, high: float) -> Self:
        """Of values in chunks of any shape, those outside at the ends."""
        counts = torch.zeros(BINS, dtype=torch.float64)
        for c in chunks:
            counts += torch.histc(c.float().clamp(low, high), BINS, low, high).double().cpu()
        return cls(low, high, counts)

    @property
    def width(self) -> float:
        """Of a bin."""
        return (self.high - self.low) / BINS

    @property
    def centres(self) -> Tensor:
        """(BINS,) float64: the middle of each bin."""
        return self.low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.width

    def __add__(self, other: Histogram) -> Histogram:
        """Both in the bins of this one, whatever lies outside them at their ends."""
        places = ((other.centres - self.low) / self.width).long().clamp(0, BINS - 1)
        return Histogram(self.low, self.high, self.counts.index_add(0, places, other.counts))


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
    beside: Histogram | None = None,
) -> ActivationGrid:
    """The grid of one activation from its float values, given in chunks of any shape.

    limits: of what is to be told apart, by default the `extremes`, errors included; values outside count as its ends.
    minmax: all of it. percentile: 99.99 % on either side. mse: of the ranges that this one shrinks to, the one with the
    least squared rounding error over a histogram of 4096 bins. beside: more values, which count in the latter two.
    """
    low, high = limits or extremes(chunks, name)
    low, high = min(low, 0.0), max(high, 0.0)
    if method == "minmax" or low == high:
        return activation_grid(low, high, bits)
    found = Histogram.of(chunks, low, high)
    if beside is not None:
        found = found + beside
    if method == "percentile":
        return activation_grid(*_percentile_range(found), bits)
    return _least_error(found, bits)


def _percentile_range(found: Histogram) -> tuple[float, float]:
    share = found.counts.cumsum(0) / found.counts.sum()
    first = int(torch.searchsorted(share, 1 - PERCENTILE))
    last = int(torch.searchsorted(share, PERCENTILE))
    return found.low + first * found.width, found.low + (last + 1) * found.width


def _least_error(found: Histogram, bits: int) -> ActivationGrid:
    centres = found.centres.float()
    best, best_error = activation_grid(found.low, found.high, bits), float("inf")
    for i in range(CANDIDATES):
        shrink = 1 - 0.01 * i
        grid = activation_grid(found.low * shrink, found.high * shrink, bits)
        error = float((found.counts * (grid.fake_quantize(centres) - centres).double().square()).sum())
        if error < best_error:
            best, best_error = grid, error
    return best
