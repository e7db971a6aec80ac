"""The CPU's name, and whether it adds products of bytes in 32 bits."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["CPUINFO", "X86", "describe_cpu"]

CPUINFO = Path("/proc/cpuinfo")
# As `platform.machine()` names it, in small letters.
X86 = frozenset({"x86_64", "amd64", "i386", "i686"})


def describe_cpu(cpuinfo: Path = CPUINFO) -> tuple[str | None, bool | None]:
    """The CPU's name, and whether it has VNNI (None off x86 and off Linux)."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or None, None
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or None
    flags = fields.get("flags", "").split()
    if platform.machine().lower() not in X86 or not flags:
        return name, None
    return name, "avx512_vnni" in flags or "avx_vnni" in flags
