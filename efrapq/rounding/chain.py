"""A block of columns chosen in turn, as one kernel: what a GPU gets in place of thousands of small launches.

Both sweeps of this package are chains. Column j of a block adds up what the columns before it did, and chooses:

    v_j = base_j + Σ_{i<j} M_ji · out_i,        out_j = high_j  where a_j + b_j · v_j < 0,  low_j  elsewhere

On a CPU they run in panels of plain tensor operations (`coordinate`, `greedy`), which are the reference; on a GPU each
of these is a launch, and a launch takes longer than the work. The kernel walks the whole block in registers, the output
rows side by side. It adds up in another order than the panels do, always the same one.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["MAX_BLOCK", "chain", "has_kernel"]

# Columns of a block at most, and output rows a program: their choices stay in one warp's registers.
MAX_BLOCK = 256
ROWS = 8


@functools.cache
def _compiler() -> Any | None:
    """triton, which comes with torch where torch is built for CUDA on Linux; None where it is not there."""
    try:
        return importlib.import_module("triton")
    except ImportError:
        return None


def has_kernel(device: torch.device) -> bool:
    """Whether `chain` runs there."""
    return device.type == "cuda" and _compiler() is not None


def chain(
    base: Tensor, matrix: Tensor, a: Tensor, b: Tensor, high: Tensor, low: Tensor, out: Tensor, values: Tensor | None
) -> None:
    """Choose the columns of one block in turn: writes `out`, and v into `values` where it is given.

    base, a, b, high, low, out, values: (G, B, O) float32 with the rows O one after another, any other strides; B at
    most MAX_BLOCK. matrix: M, (G, B, B) float32, read below the diagonal. `values` may be `base`.
    """
    groups, size, outputs = base.shape
    if size > MAX_BLOCK:
        raise ValueError(f"{size} columns in a block: at most {MAX_BLOCK}")
    columns = [base, a, b, high, low, out, base if values is None else values]
    if any(x.shape != base.shape or (outputs > 1 and x.stride(2) != 1) for x in columns):
        raise ValueError("the columns of a block must have one shape, their rows one after another")
    strides = [stride for x in columns for stride in x.stride()[:2]]
    _kernel()[-(-outputs // ROWS), groups](
        *columns,
        matrix,
        size,
        outputs,
        *strides,
        *matrix.stride(),
        KEEP=values is not None,
        BLOCK=MAX_BLOCK,
        ROWS=ROWS,
        num_warps=1,
    )


@functools.cache
def _kernel() -> Any:
    return importlib.import_module("efrapq.rounding.chain_kernel").chain_kernel
