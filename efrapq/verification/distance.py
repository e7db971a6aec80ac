"""How far a tensor that comes in pieces is from its reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Distance"]


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
