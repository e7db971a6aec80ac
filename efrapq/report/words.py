"""Figures as people read them, on a terminal and on a page."""

from __future__ import annotations

from typing import TypeGuard

__all__ = ["is_number", "percent", "size"]

# JSON has integers that no float holds, and formatting one of those as a float fails.
MOST = 1e300


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value that anybody may have written can be formatted as a number."""
    return isinstance(value, int | float) and -MOST < value < MOST


def percent(value: float | None) -> str:
    """92.34 → '92.3 %'; None → '–'."""
    return "–" if value is None else f"{value:.1f} %"


def size(count: int | None) -> str:
    """Bytes for people."""
    if count is None:
        return "–"
    return f"{count / 1024:.0f} KiB" if count < 10 * 2**20 else f"{count / 2**20:.1f} MiB"
