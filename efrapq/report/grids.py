"""What a file's evidence says of its activation grids and of the searches that it went through, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from efrapq.io.text import printable
from efrapq.report.words import is_number, percent

__all__ = ["grid_lines", "search_words"]


def grid_lines(evidence: Mapping[str, Any]) -> list[str]:
    """A line for each of: what the ranges cover, channels that were lifted, the guard, and every search.

    Who wrote the evidence is not known: what is not as `defend` writes it is left out.
    """
    calibration, settings = _mapping(evidence, "calibration"), _mapping(evidence, "settings")
    lines = []
    stress, lifted, guard = (
        _mapping(calibration, "stress"),
        _mapping(calibration, "lifted"),
        _mapping(evidence, "guard"),
    )
    if _numbers(stress, "activations", "far", "factor") and isinstance(stress.get("widest"), str):
        under = ["random patches on them"] if settings.get("stress") else []
        cover = settings.get("cover")
        under += [f"the trigger {printable(str(t))} on them" for t in (cover if isinstance(cover, list) else [])]
        on = " and with ".join(under) or "something on them"
        line = (
            f"Ranges were also chosen for the calibration images with {on}, which drive "
            f"{printable(stress['widest'])} furthest, to {stress['factor']:.1f} times what the images alone reach"
        )
        line += f", and {stress['far']} of {stress['activations']} activations far past it" if stress["far"] else ""
        lines.append(f"{line}.")
    if _numbers(stress, "activations", "mixed"):
        lines.append(f"{stress['mixed']} of {stress['activations']} activations have 8 bits for it.")
    if _numbers(lifted, "channels", "hidden", "gain", "left"):
        line = (
            f"{lifted['channels']:,} channels were lifted above the step of their grid: one step of theirs was worth "
            f"up to {lifted['gain']:,.0f} steps behind them, and is now worth {lifted['left']:,.0f} at most"
        )
        line += f". {lifted['hidden']:,} of them say nothing on the calibration images" if lifted["hidden"] else ""
        lines.append(f"{line}.")
    if _numbers(guard, "watched") and isinstance(guard.get("output"), str):
        lines.append(
            f"The output {printable(guard['output'])} counts what arrives at an end of {guard['watched']} activation "
            "grids: where it is 0, nothing was clipped."
        )
    recorded = evidence.get("searches")
    searches = recorded if isinstance(recorded, list) else []
    for number, found in enumerate(searches, 1):
        if isinstance(found, Mapping) and (words := search_words(found)):
            which = "This file" if number == len(searches) else f"A file before it, number {number},"
            lines.append(f"{which} was searched for a trigger. {words[0].upper()}{words[1:]}.")
    return lines


def search_words(found: Mapping[str, Any]) -> str:
    """What one search came to, as the evidence has it; nothing where it is not a search's record."""
    turned, patch = _mapping(found, "turned"), _mapping(found, "patch")
    if not _numbers(turned, "file", "float"):
        return ""
    rates = f"turns {percent(turned['file'])} in the file, {percent(turned['float'])} in float"
    if found.get("verdict") == "pass":
        return f"nothing was found: the best patch {rates}"
    if not (_numbers(patch, "side", "row", "col") and _numbers(found, "target_class")):
        return ""
    where = f"{patch['side']}x{patch['side']} at {patch['row']},{patch['col']}, to class {found['target_class']}"
    return f"a patch {rates} ({where})"


def _mapping(held: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = held.get(key)
    return found if isinstance(found, Mapping) else {}


def _numbers(held: Mapping[str, Any], *keys: str) -> bool:
    """Whether a number is under each of the keys."""
    return all(is_number(held.get(key)) for key in keys)
