"""What verify and inspect say of kernels and their cost, and verify of codes and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from efrapq.io.text import printable
from efrapq.report.words import size

__all__ = [
    "clipped_words",
    "codes_words",
    "conversions_words",
    "macs_words",
    "memory_words",
    "outputs_words",
    "saturation_words",
    "unfused_lines",
]


def clipped_words(clipped: Mapping[str, float | None]) -> str:
    """Of how many samples a file with a guard says that something was clipped."""
    words = f"the file says of {_finely(clipped['clean'])} of clean samples that something was clipped"
    return words + (
        f", of {_finely(clipped['triggered'])} with the trigger" if clipped["triggered"] is not None else ""
    )


def _finely(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} %"


def codes_words(codes: dict[str, Any]) -> str:
    """No more than was checked: a record in the file alone is no proof, for who changes the codes can change it too."""
    if codes["match"] is None:
        return "could not be compared"
    if not codes["match"]:
        return "ARE NOT the solved ones"
    if not codes["compared_with_float"]:
        return "match the record in the file (no float model to compare with)"
    if not codes["recorded"]:
        return "are neighbours of the float weights (no record of the solved ones)"
    return "are the solved ones"


def macs_words(kernels: dict[str, Any]) -> str:
    """The multiply-accumulates and the float kernels' share, to stand behind the counts; empty if unknown."""
    if not kernels["macs"]:
        return ""
    floating = sum(row["macs"] for row in kernels["unfused"]) / kernels["macs"]
    return f"; {kernels['macs']:,} multiply-accumulates a sample, {100 * floating:.1f} % in float"


def unfused_lines(kernels: dict[str, Any]) -> list[str]:
    """One line for each float kernel: what it is, its share, why."""
    lines = []
    for row in kernels["unfused"]:
        share = "" if row["share"] is None else f" ({100 * row['share']:.1f} % of MACs)"
        lines.append(f"{printable(row['op'])} {printable(row['node'])}{share}: {printable(row['reason'], 400)}")
    return lines


def conversions_words(kernels: dict[str, Any]) -> str:
    """The Q/DQ nodes that the runtime executes."""
    found = kernels["conversions"]
    return (
        f"{found['quantize']} QuantizeLinear, {found['dequantize']} DequantizeLinear "
        f"({found['constants']} of constants, at every inference)"
    )


def memory_words(document: dict[str, Any]) -> str:
    """Bytes of constants by role, and the peak of activations."""
    held = ", ".join(f"{name} {size(count)}" for name, count in document["weight_bytes"].items() if count)
    peak = document["activation_peak_bytes"]
    return f"{held or 'no constants'}; activations at most {'unknown' if peak is None else size(peak)} a sample"


def saturation_words(document: Mapping[str, Any]) -> str:
    """How many layers can, and the worst of them; of a document that has some."""
    found = document["saturation"]
    return (
        f"{len(found)} layers can saturate on x86 CPUs without VNNI, worst {printable(found[0]['layer'])}: "
        f"a pair of products reaches {found[0]['worst']:,}, past 32,767"
    )


def outputs_words(outputs: dict[str, dict[str, float | None]]) -> str:
    """How far the outputs are from the float model's; nearest stands behind where it was measured."""
    words = []
    for label, key, digits in (("relative error", "relative_error", 4), ("cosine", "cosine", 6)):
        found = {name: "–" if row[key] is None else f"{row[key]:.{digits}f}" for name, row in outputs.items()}
        behind = "" if found["nearest"] == "–" else f" (nearest {found['nearest']})"
        words.append(f"{label} {found['defended']}{behind}")
    return f"{', '.join(words)}, against the float model's"
