"""A block of columns chosen in turn, as one compiled kernel in place of thousands of small operations.

Both sweeps of this package are chains. Column j of a block adds up what the columns before it did, and chooses:

    v_j = base_j + Σ_{i<j} rows_ij · out_i,        out_j = high_j  where a_j + b_j · v_j < 0,  low_j  elsewhere

Without a kernel they run in panels of plain tensor operations (`coordinate`, `greedy`), which are the reference: each
column costs a core some calls, and a GPU some launches, that take longer than the work. The kernels, numba's on a CPU
and Triton's on a GPU, walk a whole block with a few output rows at a time. They add up in another order than the
panels do, always the same one.

The descent has a kernel of its own on a CPU: few of its columns flip, and a core does the work for these alone.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["LONGEST_BLOCK", "chain", "has_kernel", "kernel_package", "sweep_on_cpu"]

# Columns of a block at most: on a GPU their choices stay in one warp's registers.
LONGEST_BLOCK = 256
# Output rows a program of the GPU's kernel.
ROWS = 8


@functools.cache
def kernel_package(kind: str) -> str | None:
    """What compiles the kernel for this kind of device ("cpu", "cuda"): a package that is installed, or None.

    triton comes with torch where that is built for CUDA on Linux, numba with `efrapq[fast]`.
    """
    package = {"cpu": "numba", "cuda": "triton"}.get(kind)
    return package if package is not None and find_spec(package) is not None else None


def has_kernel(device: torch.device) -> bool:
    """Whether `chain` runs there."""
    return kernel_package(device.type) is not None


def chain(
    base: Tensor,
    rows: Tensor,
    a: Tensor,
    b: Tensor,
    high: Tensor,
    low: Tensor,
    out: Tensor,
    values: Tensor | None,
    begin: int,
    end: int,
    *,
    symmetric: bool = False,
) -> None:
    """Choose the columns `begin` to `end` in turn: writes these columns of `out`, and v into those of `values`.

    base, a, b, high, low, out, values: (G, D, O) float32, contiguous; `values` may be `base`. rows: (G, D, D) float32,
    contiguous, entry (i, j) what a unit of column i adds to column j > i. symmetric: whether `rows` is.
    """
    columns = [base, a, b, high, low, out, base if values is None else values]
    if any(x.shape != base.shape or not x.is_contiguous() for x in columns) or not rows.is_contiguous():
        raise ValueError("a chain takes contiguous tensors of one shape")
    if end - begin > LONGEST_BLOCK:
        raise ValueError(f"{end - begin} columns in a block: at most {LONGEST_BLOCK}")
    if base.device.type == "cpu":
        _on_cpu(columns, rows, values is not None, begin, end)
    else:
        _on_gpu(columns, rows, values is not None, begin, end, symmetric=symmetric)


def sweep_on_cpu(R: Tensor, H: Tensor, scale: Tensor, up: Tensor, pull: Tensor, curvature: Tensor) -> int:
    """One sweep of `coordinate` over all columns, in one kernel: flips `up`, updates R, returns the number of flips.

    R, pull, curvature: (G, D, O) float32; up: the same, bool; H: (G, D, D) float32, symmetric; scale: (G, D, O) or
    (G, 1, O) float32. All contiguous.
    """
    from efrapq.rounding.chain_cpu import sweep_kernel

    return int(sweep_kernel(*(x.numpy() for x in (R, H, scale, up, pull, curvature))))


def _on_cpu(columns: list[Tensor], rows: Tensor, keep: bool, begin: int, end: int) -> None:
    # On one core: a block takes a fraction of a millisecond, and waking a thread as long.
    from efrapq.rounding.chain_cpu import chain_kernel

    chain_kernel(*(x.numpy() for x in columns), rows.numpy(), keep, begin, end)


def _on_gpu(columns: list[Tensor], rows: Tensor, keep: bool, begin: int, end: int, *, symmetric: bool) -> None:
    from efrapq.rounding.chain_gpu import chain_kernel

    groups, inputs, outputs = columns[0].shape
    # What comes into a column, side by side.
    block = rows[:, begin:end, begin:end]
    if not symmetric:
        block = block.transpose(1, 2).contiguous()
    grid = (-(-outputs // ROWS), groups)
    sizes = (begin, end - begin, inputs, outputs)
    # Triton launches on the current device.
    with torch.cuda.device_of(block):  # type: ignore[no-untyped-call]
        chain_kernel[grid](*columns, block, *block.stride()[:2], *sizes, keep, LONGEST_BLOCK, ROWS, num_warps=1)
