"""Exporters: one module a target, a profile of rules over the shared QDQ builder."""

from __future__ import annotations

import onnx

from efrapq.exporters.lint import Violation, lint
from efrapq.exporters.qdq import build
from efrapq.exporters.readback import read_quantized
from efrapq.exporters.remarks import remarks
from efrapq.exporters.targets import PROFILES, native_target, profile
from efrapq.graph.quantized import QuantizedModel

__all__ = ["PROFILES", "Violation", "export_model", "lint", "native_target", "profile", "read_quantized", "remarks"]


def export_model(quantized: QuantizedModel, target: str) -> onnx.ModelProto:
    """Write a quantized model for a target. Its rules are checked by `lint`, not here."""
    return build(quantized, profile(target))
