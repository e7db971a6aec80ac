"""How far a tensor that comes in pieces is from its reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Agreement", "Distance", "Spread"]


class Distance:
    """Cosine and relative error ‖found − expected‖ / ‖expected‖ over all pieces, in float64."""

    def __init__(self) -> None:
        self._product = self._expected = self._found = self._error = 0.0
        self._sizes_differ = False

    def add(self, expected: NDArray[Any], found: NDArray[Any]) -> None:
        """One piece of both, of the same shape; other shapes make the distance unknown."""
        if expected.shape != found.shape:
            self._sizes_differ = True
            return
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is a result: see `reason`
            a, b = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
            error = b - a
            self._product += float(a @ b)
            self._expected += float(a @ a)
            self._found += float(b @ b)
            self._error += float(error @ error)

    @property
    def reason(self) -> str | None:
        """Why there are no figures although there were pieces; None if there are."""
        if self._sizes_differ:
            return "its size is not the float model's"
        if not all(map(math.isfinite, (self._product, self._expected, self._found, self._error))):
            return "it holds NaN or infinity"
        return None

    def figures(self) -> dict[str, float | None]:
        """cosine and relative_error; None where they are not defined: nothing was added, or there are only zeros."""
        known = self.reason is None
        cosine = error = None
        if known and self._expected > 0:
            error = round(math.sqrt(self._error / self._expected), 6)
            if self._found > 0:
                cosine = round(self._product / (math.sqrt(self._expected) * math.sqrt(self._found)), 6)
        return {"cosine": cosine, "relative_error": error}

    def error_of(self, scale: float | None) -> float | None:
        """‖found − expected‖ / scale; None where either is not known."""
        if scale is None or self.reason is not None:
            return None
        return round(math.sqrt(self._error) / scale, 6)


class Spread:
    """How much the reference differs between samples: ‖a − mean of a over the samples‖ over all pieces, in float64.

    It is what an error has to be small beside: a constant part of the output, however large, says nothing of a sample.
    """

    def __init__(self) -> None:
        self._first: NDArray[np.float64] | None = None
        self._sum: NDArray[np.float64] | None = None
        self._squares = 0.0
        self._count = 0
        self._known = True

    def add(self, piece: NDArray[Any] | None) -> None:
        """(n, …), first axis the samples, all of one shape; None or another shape makes the spread unknown."""
        if not self._known:
            return
        if piece is None or (self._first is not None and piece.shape[1:] != self._first.shape):
            self._known, self._first, self._sum = False, None, None
            return
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite has no spread
            moved = piece.astype(np.float64)
            if self._first is None or self._sum is None:
                self._first, self._sum = moved[0].copy(), np.zeros(moved.shape[1:])
            moved -= self._first  # the spread is small beside the values: sums of their squares would lose it
            self._sum += moved.sum(0)
            self._squares += float((moved * moved).sum())
        self._count += len(piece)

    @property
    def value(self) -> float | None:
        """None where it is not known or there is none: samples are alike, or there is one only."""
        if self._sum is None or self._count < 2 or not math.isfinite(self._squares):
            return None
        squared = self._squares - float((self._sum * self._sum).sum()) / self._count
        return math.sqrt(squared) if squared > 1e-12 * self._squares else None


class Agreement:
    """How many positions hold the same answer in both, over all pieces."""

    def __init__(self) -> None:
        self._same = 0
        self.positions = 0
        self._known = True

    def add(self, expected: NDArray[Any], found: NDArray[Any]) -> None:
        """One piece of both, of the same shape; other shapes make the agreement unknown."""
        if expected.shape != found.shape:
            self._known = False
            return
        self._same += int((expected == found).sum())
        self.positions += expected.size

    @property
    def percent(self) -> float | None:
        """None if it is not known or nothing was added."""
        return round(100 * self._same / self.positions, 3) if self._known and self.positions else None
