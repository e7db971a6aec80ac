"""Where torch computes, and how exactly."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from efrapq.errors import UsageError
from efrapq.io.text import printable

__all__ = ["exact_convolutions", "repeatable_training", "resolve_device"]


def resolve_device(device: str) -> str:
    """`auto` is CUDA where torch sees it. Raises UsageError for a name torch does not know or a device it lacks."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as exc:
        raise UsageError(f"--device {printable(device)}: use auto, cpu, cuda or cuda:N") from exc
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {printable(device)}: use auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {printable(device)}: torch sees {torch.cuda.device_count()} CUDA devices; run 'efrapq doctor'"
        )
    return device


def exact_convolutions() -> AbstractContextManager[None]:
    """Deterministic float32 convolutions on CUDA: TF32 would be 1e-3 away from what ONNX Runtime computes."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def repeatable_training() -> AbstractContextManager[None]:
    """Convolutions that give the same weights every time on CUDA. TF32 keeps 11 bits of a weight, enough for training
    to tell where in an 8-bit cell it lies.
    """
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True)
