"""Exporters: one module a target, a profile of rules over the shared QDQ builder."""

from __future__ import annotations

import onnx

from efrapq.errors import UsageError
from efrapq.exporters import ort_x86, portable
from efrapq.exporters.qdq import Profile, build
from efrapq.exporters.readback import read_quantized
from efrapq.graph.quantized import QuantizedModel
from efrapq.io import printable

__all__ = ["PROFILES", "export_model", "native_target", "profile", "read_quantized"]

PROFILES = {p.name: p for p in (ort_x86.PROFILE, portable.PROFILE)}


def profile(target: str) -> Profile:
    """The rules of a target by name; UsageError lists the known ones."""
    if target not in PROFILES:
        known = "; ".join(f"{p.name} ({p.summary})" for p in PROFILES.values())
        raise UsageError(f"unknown target '{printable(target)}'; known: {known}")
    return PROFILES[target]


def native_target(machine: str) -> str:
    """The target for a machine name as `platform.machine()` gives it."""
    return "ort-x86" if machine.lower() in ("x86_64", "amd64", "i386", "i686") else "portable"


def export_model(quantized: QuantizedModel, target: str) -> onnx.ModelProto:
    """Write a quantized model for a target."""
    return build(quantized, profile(target))
