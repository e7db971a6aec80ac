"""What defend() may be asked for: checked once, before any work."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from efrapq.errors import UsageError

if TYPE_CHECKING:
    from efrapq.rounding import Coordinate, Relaxed

__all__ = [
    "RANGES",
    "SCALES",
    "SOLVERS",
    "act_range_for",
    "available_memory",
    "check_covering",
    "check_options",
    "memory_limit",
    "solver_settings",
]

SOLVERS = ("coordinate", "relaxed", "nearest")
RANGES = ("auto", "minmax", "percentile", "mse", "output")
SCALES = ("minmax", "mse", "refit")
# What ONNX Runtime's MatMulNBits takes.
BLOCKS = (16, 32, 64, 128, 256)
# Past it, no more than four of eight bits would be left for what the calibration shows.
MOST_HEADROOM = 16
# The paper's weight of the error term, for its solver.
RELAXED_LAMBDA_E = 1.0
# What `coordinate` does where the user says neither --lambda-e nor --fidelity: measured, docs/SOLVER.md.
FIDELITY = 1.1


def check_options(
    *,
    bits: int,
    act_bits: int,
    edge_bits: int,
    solver: str,
    error: str,
    act_range: str,
    scale: str,
    calib_size: int,
    rows: int,
    seed: int,
    block: int = 0,
    headroom: float = 1.0,
    strange: bool = True,
    covers: bool = False,
    mixed: bool = False,
    guard: bool = False,
) -> None:
    """Raise UsageError for what makes no sense whatever the model is. strange: whether ranges are chosen for more than
    the images; covers: whether it is for triggers, too.
    """
    if not (2 <= bits <= 8 and 2 <= edge_bits <= 8):
        raise UsageError("--bits and --edge-bits must be 2 to 8")
    if act_bits not in (4, 8, 32):
        raise UsageError("--act-bits must be 8, 4, or 32 for float activations")
    if solver not in SOLVERS:
        raise UsageError(f"unknown solver '{solver}'; known: {', '.join(SOLVERS)}")
    if error not in ("absolute", "relative"):
        raise UsageError("--error must be absolute or relative")
    if act_range not in RANGES:
        raise UsageError(f"unknown activation range '{act_range}'; known: {', '.join(RANGES)}")
    if scale not in SCALES:
        raise UsageError(f"unknown scale '{scale}'; known: {', '.join(SCALES)}")
    if calib_size < 1:
        raise UsageError("--calib-size must be at least 1")
    if rows < 1:
        raise UsageError("--rows must be at least 1")
    if not 0 <= seed < 2**63:
        raise UsageError("--seed must be between 0 and 2^63 - 1")
    if block not in (0, *BLOCKS):
        raise UsageError(f"--block must be one of {', '.join(map(str, BLOCKS))}")
    if not 1 <= headroom <= MOST_HEADROOM:
        raise UsageError(f"--headroom must be 1 to {MOST_HEADROOM}: the factor by which activation ranges are widened")
    if headroom > 1 and (act_bits == 32 or act_range_for(act_range, act_bits) != "minmax"):
        raise UsageError("--headroom widens activation ranges of --act-range minmax, which is the default at 8 bits")
    if covers:
        check_covering("--cover", act_bits, act_range)
    if mixed and (act_bits >= 8 or act_range == "output" or not strange):
        raise UsageError(
            "--mixed gives 8 bits to activations that patches or triggers drive far: it is for --act-bits 4, and does "
            "not go with --act-range output, or with --no-stress unless there is a --cover"
        )
    if guard and (act_bits != 8 or act_range_for(act_range, act_bits) != "minmax"):
        raise UsageError(
            "--guard tells answers by what was clipped, which of ordinary images is next to nothing with --act-bits 8 "
            "and --act-range minmax alone"
        )
    if block and act_bits != 32:
        raise UsageError("--block is for float activations: add --act-bits 32")
    if block and scale == "refit":
        raise UsageError("--scale refit has one scale per output channel: leave out --block, or use --scale mse")


def check_covering(option: str, act_bits: int, act_range: str) -> None:
    """Raise UsageError where ranges cannot cover a trigger, which the option asks for."""
    if act_bits == 32 or act_range == "output":
        raise UsageError(f"{option} widens activation ranges: it does not go with --act-bits 32 or --act-range output")


def act_range_for(act_range: str, act_bits: int) -> str:
    """Min-max keeps every value and costs nothing at 8 bits; at 4 bits the tails are not worth their levels."""
    return ("minmax" if act_bits >= 8 else "mse") if act_range == "auto" else act_range


def solver_settings(
    solver: str, lambda_e: float | None, fidelity: float | None, error: str, steps: int
) -> Coordinate | Relaxed | None:
    """The solver that was asked for; None rounds to nearest. Raises UsageError for weights that are none."""
    from efrapq.rounding import Coordinate, Relaxed

    if lambda_e is not None and not (math.isfinite(lambda_e) and lambda_e >= 0):
        raise UsageError("--lambda-e must be zero or a positive number")
    if fidelity is not None and not (math.isfinite(fidelity) and fidelity >= 1):
        raise UsageError("--fidelity must be 1 or more: the factor by which L_A may exceed its optimum")
    if fidelity is not None and lambda_e is not None:
        raise UsageError("--fidelity chooses lambda_E itself: give one of --fidelity and --lambda-e")
    if fidelity is not None and solver != "coordinate":
        raise UsageError("--fidelity needs --solver coordinate")
    if solver == "coordinate":
        if lambda_e is not None:
            return Coordinate(lambda_e=lambda_e, error=error)
        return Coordinate(fidelity=FIDELITY if fidelity is None else fidelity, error=error)
    if solver == "relaxed":
        return Relaxed(lambda_e=RELAXED_LAMBDA_E if lambda_e is None else lambda_e, error=error, steps=steps)
    return None


def available_memory(device: str) -> int | None:
    """Bytes free on the device, None where the system does not say."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def memory_limit(memory: int | None, device: str) -> int | None:
    """Bytes for either stream of activations: half of what the user allows, or a quarter of what is free."""
    if memory is not None:
        if memory < 1:
            raise UsageError("--memory must be a positive number of bytes")
        return memory // 2
    free = available_memory(device)
    return None if free is None else free // 4
