"""The numba kernel behind `chain`: imported only where it is to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["chain_kernel"]

# Output rows that are taken together: their part of a block stays in a core's nearest cache.
TILE = 64

_Columns = NDArray[np.float32]


def _compiled(function: Callable[..., None]) -> Any:
    options: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder where what was compiled could be kept
        return numba.njit(**options)(function)


@_compiled
def chain_kernel(
    base: _Columns,
    a: _Columns,
    b: _Columns,
    high: _Columns,
    low: _Columns,
    out: _Columns,
    values: _Columns,
    rows: _Columns,
    keep: bool,
    begin: int,
    end: int,
) -> None:
    """The columns `begin` to `end`; all else as `chain` takes it."""
    size = end - begin
    groups, _, outputs = base.shape
    for group in range(groups):
        for start in range(0, outputs, TILE):
            # Not a constant: loops of an unknown length become vector instructions, short known ones do not.
            count = min(TILE, outputs - start)
            value = np.empty((size, count), np.float32)
            chosen = np.empty(count, np.float32)
            for j in range(size):
                for o in range(count):
                    value[j, o] = base[group, begin + j, start + o]
            for j in range(size):
                moved = False
                column = begin + j
                for o in range(count):
                    v = value[j, o]
                    up = a[group, column, start + o] + b[group, column, start + o] * v < 0
                    choice = high[group, column, start + o] if up else low[group, column, start + o]
                    moved |= choice != 0
                    chosen[o] = choice
                    out[group, column, start + o] = choice
                    if keep:
                        values[group, column, start + o] = v
                if moved:
                    for i in range(j + 1, size):
                        weight = rows[group, column, begin + i]
                        for o in range(count):
                            value[i, o] += weight * chosen[o]
