"""The Triton kernel behind `chain`: imported only where it is to run."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["chain_kernel"]

_SIZES = ["size", "outputs"]
_STRIDES = [f"{name}_{axis}" for name in ("base", "a", "b", "high", "low", "out", "values") for axis in ("g", "j")]
_MATRIX = ["m_g", "m_j", "m_i"]


# One compilation serves all layers: no size or stride is built in.
@triton.jit(do_not_specialize=_SIZES + _STRIDES + _MATRIX)
def chain_kernel(  # type: ignore[no-untyped-def]
    base,
    a,
    b,
    high,
    low,
    out,
    values,
    matrix,
    size,
    outputs,
    base_g,
    base_j,
    a_g,
    a_j,
    b_g,
    b_j,
    high_g,
    high_j,
    low_g,
    low_j,
    out_g,
    out_j,
    values_g,
    values_j,
    m_g,
    m_j,
    m_i,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ROWS output rows of one group, all columns of the block."""
    group = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < outputs
    columns = tl.arange(0, BLOCK)
    base += group * base_g + rows
    a += group * a_g + rows
    b += group * b_g + rows
    high += group * high_g + rows
    low += group * low_g + rows
    out += group * out_g + rows
    values += group * values_g + rows
    matrix += group * m_g + columns * m_i
    chosen = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    # The next column is loaded while this one is decided.
    next_base = tl.load(base, mask=inside, other=0.0)
    next_a = tl.load(a, mask=inside, other=0.0)
    next_b = tl.load(b, mask=inside, other=0.0)
    next_high = tl.load(high, mask=inside, other=0.0)
    next_low = tl.load(low, mask=inside, other=0.0)
    next_row = tl.load(matrix, mask=columns < 0, other=0.0)
    for j in range(size):
        this_base, this_a, this_b, row = next_base, next_a, next_b, next_row
        this_high, this_low = next_high, next_low
        following = tl.minimum(j + 1, size - 1)
        next_base = tl.load(base + following * base_j, mask=inside, other=0.0)
        next_a = tl.load(a + following * a_j, mask=inside, other=0.0)
        next_b = tl.load(b + following * b_j, mask=inside, other=0.0)
        next_high = tl.load(high + following * high_j, mask=inside, other=0.0)
        next_low = tl.load(low + following * low_j, mask=inside, other=0.0)
        next_row = tl.load(matrix + following * m_j, mask=columns <= j, other=0.0)
        value = this_base + tl.sum(chosen * row[None, :], axis=1)
        choice = tl.where(this_a + this_b * value < 0, this_high, this_low)
        tl.store(out + j * out_j, choice, mask=inside)
        if KEEP:
            tl.store(values + j * values_j, value, mask=inside)
        chosen = tl.where(columns[None, :] == j, choice[:, None], chosen)
