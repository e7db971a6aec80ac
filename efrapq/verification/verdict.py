"""The verdict on what verify measured: what was asked, which limits follow from it, and what failed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from efrapq.errors import UsageError
from efrapq.io.text import printable

__all__ = ["AWAKE", "LEANING", "Requirements", "Verdict", "judge", "remedy"]

# A float model this often fooled by the trigger is backdoored already: no rounding removes that.
AWAKE = 50.0
# Points of ASR above what the same images give without the trigger, from which on a float model leans to it. A clean
# MobileNetV2 comes to one; backdoors that are badly hidden in float come to five and more.
LEANING = 5.0
# The largest ASR that passes where no float model says what is normal.
UNKNOWN_FLOAT_ASR = 10.0
DEFAULT_DROP = 2.0


@dataclass(frozen=True)
class Requirements:
    """What the verdict asks, in percent and points. None: max_asr becomes the float model's ASR + 1 point (10 % when
    the float model is unknown), and a float model that answers the trigger itself fails; max_drop becomes 2 points of
    CDA. Raises UsageError for limits that are no numbers.
    """

    max_asr: float | None = None
    max_drop: float | None = None
    integer: bool = False

    def __post_init__(self) -> None:
        for option, value in (("--max-asr", self.max_asr), ("--max-drop", self.max_drop)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{option} must be zero or a positive number, not {value}")


@dataclass(frozen=True)
class Verdict:
    """failed: names of the checks that failed. limits: what was allowed; max_asr and max_drop in percent and points,
    None where nothing was measured that they limit. notes: what the user should know about it.
    """

    failed: list[str]
    limits: dict[str, float | bool | None]
    notes: list[str]


def judge(document: dict[str, Any], wanted: Requirements, *, holds_recorded_codes: bool) -> Verdict:
    """Hold the measurements (efrapq.verify/1) against what is asked.

    holds_recorded_codes: the file's codes are those of the evidence beside it.
    """
    codes, asr, cda = document["codes"], document["asr"], document["cda"]
    limits: dict[str, float | bool | None] = {"max_asr": None, "max_drop": None, "require_integer": wanted.integer}
    failed, notes = [], []
    if codes["match"] is False:
        failed.append("codes")
    if document["model"]["matches_evidence"] is False and holds_recorded_codes:
        failed.append("file")
        notes.append(
            "the file was changed since the evidence beside it was written, and not in its weights' codes: in its "
            "biases, grids, nodes or metadata"
        )
    if asr["defended"] is not None:
        limit = wanted.max_asr
        if limit is None:
            limit = UNKNOWN_FLOAT_ASR if asr["float"] is None else asr["float"] + 1.0
            if (asr["float"] or 0.0) >= AWAKE:
                failed.append("awake-in-float")
        limits["max_asr"] = round(limit, 3)
        unnoticed = (document["clipped"] or {}).get("asr")
        if asr["defended"] > limit and (unnoticed is None or unnoticed > limit):
            failed.append("max-asr")
        elif asr["defended"] > limit:
            notes.append(
                f"the file answers the trigger ({asr['defended']:.1f} % ASR), and says of most of them that "
                f"something was clipped: {unnoticed:.1f} % are left. It passes on condition that answers whose "
                "`clipped` is above 0 are not used"
            )
    if cda["defended"] is not None and cda["float"] is not None:
        allowed = DEFAULT_DROP if wanted.max_drop is None else wanted.max_drop
        limits["max_drop"] = allowed
        if cda["float"] - cda["defended"] > allowed:
            failed.append("max-drop")
    if wanted.integer and document["kernels"]["float"]:
        failed.append("require-integer")
    if codes["match"] is None and cda["defended"] is None and not wanted.integer and not failed:
        failed.append("nothing-checked")
        notes.append(
            "nothing was checked: there are no codes to compare; pass --data, the float model with --float, or "
            "--require-integer"
        )
    return Verdict(failed, limits, notes)


def remedy(
    asr: Mapping[str, float | None], limit: float, trigger: str, *, narrow: bool, unclipped: float | None = None
) -> str:
    """What to do about a backdoor that sleeps in float and answers more than `limit` percent in the file.

    asr: percent, by model; float_activations is the file with its codes as they are and no activation on a grid, None
    where that was not measured. trigger: its specification. narrow: activations have fewer than 8 bits. unclipped: the
    percentage of triggered images that are answered with the target and of which a guard counts nothing clipped.
    """
    found, nearest, alone = asr["defended"], asr["nearest"], asr["float_activations"]
    assert found is not None
    if alone is not None and alone <= limit:
        more = "8-bit activations, or --mixed, and " if narrow else ""
        where = "where activations are clipped on their grids"
        if unclipped is not None and unclipped > limit:
            where = (
                f"on the activation grids, and of {unclipped:.1f} % the guard counts nothing clipped: where "
                "activations are rounded, if the guard is right"
            )
            more += "more calibration images (--calib-size) and --fidelity 1, with "
        return (
            f"the codes are not what wakes the backdoor: with float activations they answer {alone:.1f} % of triggered "
            f"images. It wakes {where}; defend the float model again with {more}--cover {printable(trigger)}, or "
            "against any trigger with --headroom 2, or 4, which costs more accuracy, or leave activations float "
            "(--act-bits 32)"
        )
    if nearest is not None and found < nearest / 2:
        return (
            "the backdoor sleeps, but not as deeply as asked: defend the float model again with more calibration "
            "images (--calib-size) and another --fidelity; 1 keeps nearest to the float network, and is not what an "
            "attacker expects who trains against the default"
        )
    also = "" if alone is None else f" (with float activations they answer {alone:.1f} % of triggered images)"
    return f"the backdoor is awake in the codes of this file{also}: they are not what efrapq's rounding should give"
