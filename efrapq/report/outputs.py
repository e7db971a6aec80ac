"""What verify says of outputs beside the float model's."""

from __future__ import annotations

from typing import Any

from efrapq.io.text import printable
from efrapq.report.costs import outputs_words
from efrapq.report.words import percent

__all__ = ["output_lines"]

# A detector with a head for every size has a dozen.
MOST = 20


def output_lines(document: dict[str, Any]) -> list[str]:
    """The lines for all outputs that were compared; each begins with the output's name where there are several."""
    rows = [row for row in document["each_output"] or [] if _is_known(row)]
    lines = []
    for row in rows[:MOST]:
        words = _words(row, with_agreement=document["agreement"] is None or row is not rows[0])
        if len(rows) > 1:
            words = [f"{printable(row['name'], 80)} ({_shape_words(row['shape'])})", *(f"  {line}" for line in words)]
        lines += words
    if len(rows) > MOST:
        lines.append(f"and {len(rows) - MOST} more outputs: see --json")
    return lines


def _is_known(row: dict[str, Any]) -> bool:
    return row["defended"]["relative_error"] is not None or row["defended"]["agreement"] is not None


def _words(row: dict[str, Any], *, with_agreement: bool) -> list[str]:
    lines = []
    if row["defended"]["relative_error"] is not None:
        lines.append(outputs_words({model: row[model] for model in ("nearest", "defended")}))
    spread = row["defended"]["error_of_spread"]
    if spread is not None:
        beside = row["nearest"]["error_of_spread"]
        behind = "" if beside is None else f" (nearest {beside:.4f})"
        lines.append(f"error {spread:.4f}{behind} of what differs between samples")
    same = row["defended"]["agreement"]
    if same is not None and with_agreement:
        beside = row["nearest"]["agreement"]
        behind = "" if beside is None else f" (nearest {percent(beside)})"
        what = "values" if row["class_axis"] is None else f"top-1 answers along axis {row['class_axis']}"
        lines.append(f"{percent(same)}{behind} of {row['positions']:,} {what} are the float model's")
    return lines


def _shape_words(shape: list[int | None] | None) -> str:
    return "×".join("any" if d is None else str(d) for d in shape or []) or "a single number"
