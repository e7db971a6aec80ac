"""A block of columns chosen in turn, as one compiled kernel in place of thousands of small operations.

Both sweeps of this package are chains. Column j of a block adds up what the columns before it did, and chooses:

    v_j = base_j + Σ_{i<j} rows_ij · out_i,        out_j = high_j  where a_j + b_j · v_j < 0,  low_j  elsewhere

Without a kernel they run in panels of plain tensor operations (`coordinate`, `greedy`), which are the reference: each
column costs a core some calls, and a GPU some launches, that take longer than the work. The kernels, numba's on a CPU
and Triton's on a GPU, walk a whole block with a few output rows at a time. They add up in another order than the
panels do, always the same one, whatever the number of threads.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["chain", "has_kernel", "kernel_package", "longest_block", "workers"]

# Columns of a block at most. On a GPU their choices stay in one warp's registers, on a CPU in a core's nearest cache.
LONGEST = {"cpu": 128, "cuda": 256}
# Output rows a program of the GPU's kernel.
ROWS = 8
# Multiplications for which a thread is worth waking.
WORTH_A_THREAD = 200_000


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


def longest_block(device: torch.device) -> int:
    """How many columns `chain` takes there at most."""
    return LONGEST[device.type]


@contextlib.contextmanager
def workers(device: torch.device) -> Iterator[ThreadPoolExecutor | None]:
    """The threads among which `chain` may divide output rows: as many as torch uses, none on a GPU."""
    if device.type != "cpu" or torch.get_num_threads() == 1:
        yield None
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield pool


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
    pool: ThreadPoolExecutor | None = None,
    *,
    symmetric: bool = False,
) -> None:
    """Choose the columns `begin` to `end` in turn: writes these columns of `out`, and v into those of `values`.

    base, a, b, high, low, out, values: (G, D, O) float32, contiguous; `values` may be `base`. rows: (G, D, D) float32,
    contiguous, entry (i, j) what a unit of column i adds to column j > i. pool: from `workers`. symmetric: whether
    `rows` is.
    """
    columns = [base, a, b, high, low, out, base if values is None else values]
    if any(x.shape != base.shape or not x.is_contiguous() for x in columns) or not rows.is_contiguous():
        raise ValueError("a chain takes contiguous tensors of one shape")
    if end - begin > longest_block(base.device):
        raise ValueError(f"{end - begin} columns in a block: at most {longest_block(base.device)}")
    if base.device.type == "cpu":
        _on_cpu(columns, rows, values is not None, begin, end, pool)
    else:
        _on_gpu(columns, rows, values is not None, begin, end, symmetric=symmetric)


def _on_cpu(
    columns: list[Tensor], rows: Tensor, keep: bool, begin: int, end: int, pool: ThreadPoolExecutor | None
) -> None:
    kernel = importlib.import_module("efrapq.rounding.chain_cpu").chain_kernel
    groups, _, outputs = columns[0].shape
    arguments = [x.numpy() for x in columns] + [rows.numpy(), keep, begin, end]
    # Groups and output rows are all alike to it: one of the two is divided.
    whole = groups if groups > 1 else outputs
    work = groups * outputs * (end - begin) ** 2 // 2
    parts = 1 if pool is None else max(1, min(torch.get_num_threads(), whole, work // WORTH_A_THREAD))
    bounds = [whole * part // parts for part in range(parts + 1)]
    ranges = [
        (first, last, 0, outputs) if groups > 1 else (0, 1, first, last) for first, last in itertools.pairwise(bounds)
    ]
    if pool is None or parts == 1:
        kernel(*arguments, *ranges[0])
        return
    for done in [pool.submit(kernel, *arguments, *part) for part in ranges]:
        done.result()


def _on_gpu(columns: list[Tensor], rows: Tensor, keep: bool, begin: int, end: int, *, symmetric: bool) -> None:
    kernel = importlib.import_module("efrapq.rounding.chain_gpu").chain_kernel
    groups, inputs, outputs = columns[0].shape
    # What comes into a column, side by side.
    block = rows[:, begin:end, begin:end]
    if not symmetric:
        block = block.transpose(1, 2).contiguous()
    grid = (-(-outputs // ROWS), groups)
    kernel[grid](
        *columns,
        block,
        *block.stride()[:2],
        begin,
        end - begin,
        inputs,
        outputs,
        KEEP=keep,
        BLOCK=LONGEST["cuda"],
        ROWS=ROWS,
        num_warps=1,
    )
