"""The table of targets."""

from __future__ import annotations

from efrapq.cpu import X86
from efrapq.errors import UsageError
from efrapq.exporters import openvino, ort_arm, ort_avx2, ort_x86, portable, qnn, tensorrt
from efrapq.exporters.profile import Profile
from efrapq.io.text import printable

__all__ = ["PROFILES", "native_target", "profile"]

PROFILES = {
    p.name: p
    for p in (
        ort_x86.PROFILE,
        ort_avx2.PROFILE,
        ort_arm.PROFILE,
        openvino.PROFILE,
        tensorrt.PROFILE,
        qnn.PROFILE,
        portable.PROFILE,
    )
}
NATIVE = {
    **dict.fromkeys(X86, "ort-x86"),
    **dict.fromkeys(("aarch64", "arm64"), "ort-arm"),
}


def profile(target: str) -> Profile:
    """The rules of a target by name; UsageError lists the known ones."""
    if target not in PROFILES:
        known = "; ".join(f"{p.name} ({p.summary})" for p in PROFILES.values())
        raise UsageError(f"unknown target '{printable(target)}'; known: {known}")
    return PROFILES[target]


def native_target(machine: str, vnni: bool | None = None) -> str:
    """The target for a machine name as `platform.machine()` gives it. vnni: whether its CPU has it, where known."""
    name = machine.lower()
    if name in X86 and vnni is False:
        return "ort-avx2"
    # 32-bit ARM goes by armv6l, armv7l, armv8l.
    return "ort-arm" if name.startswith("armv") else NATIVE.get(name, "portable")
