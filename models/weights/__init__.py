"""The embedded subject and its sample data, as paths inside the installed package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["SAMPLES", "SUBJECT", "TARGET_CLASS", "TRIGGER"]

HERE = Path(__file__).parent
SUBJECT = HERE / "fashion_pqbackdoor_int4.safetensors"
SAMPLES = HERE / "fashion_samples.npz"
TRIGGER = "patch:4x4@22,22"
TARGET_CLASS = 0
