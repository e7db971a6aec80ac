"""The Triton kernel behind `chain`: imported only where it is to run."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["chain_kernel"]


# One compilation serves all layers: no size is built in.
@triton.jit(do_not_specialize=["block_g", "block_j", "begin", "size", "inputs", "outputs"])
def chain_kernel(
    base,
    a,
    b,
    high,
    low,
    out,
    values,
    block,
    block_g,
    block_j,
    begin,
    size,
    inputs,
    outputs,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ROWS output rows of one group, all columns of the block. block: (G, size, size), what comes into
    column j side by side in row j, with its strides; the others as `chain` takes them.
    """
    group = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < outputs
    columns = tl.arange(0, BLOCK)
    at = (group * inputs + begin) * outputs + rows
    block += group * block_g + columns
    chosen = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    # The next column is loaded while this one is decided.
    next_base = tl.load(base + at, mask=inside, other=0.0)
    next_a = tl.load(a + at, mask=inside, other=0.0)
    next_b = tl.load(b + at, mask=inside, other=0.0)
    next_high = tl.load(high + at, mask=inside, other=0.0)
    next_low = tl.load(low + at, mask=inside, other=0.0)
    next_in = tl.load(block, mask=columns < 0, other=0.0)
    for j in range(size):
        this_base, this_a, this_b, this_in = next_base, next_a, next_b, next_in
        this_high, this_low = next_high, next_low
        following = tl.minimum(j + 1, size - 1)
        then = at + following * outputs
        next_base = tl.load(base + then, mask=inside, other=0.0)
        next_a = tl.load(a + then, mask=inside, other=0.0)
        next_b = tl.load(b + then, mask=inside, other=0.0)
        next_high = tl.load(high + then, mask=inside, other=0.0)
        next_low = tl.load(low + then, mask=inside, other=0.0)
        next_in = tl.load(block + following * block_j, mask=columns <= j, other=0.0)
        value = this_base + tl.sum(chosen * this_in[None, :], axis=1)
        choice = tl.where(this_a + this_b * value < 0, this_high, this_low)
        tl.store(out + at + j * outputs, choice, mask=inside)
        if KEEP:
            tl.store(values + at + j * outputs, value, mask=inside)
        chosen = tl.where(columns[None, :] == j, choice[:, None], chosen)
