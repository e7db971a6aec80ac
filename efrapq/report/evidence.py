"""The evidence that goes beside a defended file: what went in, what was decided, what came out."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Any

__all__ = ["EVIDENCE_SCHEMA", "dumps", "versions"]

EVIDENCE_SCHEMA = "efrapq.evidence/1"
PACKAGES = ("efrapq", "torch", "onnx", "onnx-ir", "onnxsim", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of what the result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def dumps(document: dict[str, Any]) -> str:
    """JSON as efrapq writes it: indented, ASCII only, so that no name can smuggle control characters; no NaN."""
    return json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False) + "\n"
