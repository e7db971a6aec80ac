"""The numba kernels: imported only where they are to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["chain_kernel", "sweep_kernel"]

# Output rows that are taken together: their part of a block stays in a core's nearest cache.
TILE = 64
# Output rows that share a line of a core's cache where a tensor is (G, D, O).
LINE = 16

_Columns = NDArray[np.float32]


def _compiled(function: Callable[..., object]) -> Any:
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
                column = begin + j
                for o in range(count):
                    v = value[j, o]
                    up = a[group, column, start + o] + b[group, column, start + o] * v < 0
                    choice = high[group, column, start + o] if up else low[group, column, start + o]
                    chosen[o] = choice
                    out[group, column, start + o] = choice
                    if keep:
                        values[group, column, start + o] = v
                for i in range(j + 1, size):
                    weight = rows[group, column, begin + i]
                    for o in range(count):
                        value[i, o] += weight * chosen[o]


@_compiled
def sweep_kernel(
    R: _Columns,
    H: _Columns,
    scale: _Columns,
    up: NDArray[np.bool_],
    pull: _Columns,
    curvature: _Columns,
) -> int:
    """One sweep, as `sweep_on_cpu` takes it.

    A sweep flips a few weights of a hundred. A flip brings its own output row up to date, which is less work than a
    product over all rows, and what does not flip costs a look.
    """
    groups, size, outputs = R.shape
    rows = np.empty((LINE, size), np.float32)
    flips = 0
    for group in range(groups):
        for start in range(0, outputs, LINE):
            count = min(LINE, outputs - start)
            for j in range(size):
                for o in range(count):
                    rows[o, j] = R[group, j, start + o]
            for j in range(size):
                own = j if scale.shape[1] > 1 else 0
                for o in range(count):
                    at = start + o
                    high = up[group, j, at]
                    sign = np.float32(-1.0) if high else np.float32(1.0)
                    step = sign * scale[group, own, at]
                    cost = curvature[group, j, at] + sign * pull[group, j, at]
                    if cost + 2 * step * rows[o, j] < 0:
                        up[group, j, at] = not high
                        flips += 1
                        for i in range(size):
                            rows[o, i] += H[group, j, i] * step
            for j in range(size):
                for o in range(count):
                    R[group, j, start + o] = rows[o, j]
    return flips
