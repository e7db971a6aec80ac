"""Exporters: one module a target, a profile of rules over the shared QDQ builder."""

from __future__ import annotations

import onnx

from efrapq.exporters.lint import Violation, lint
from efrapq.exporters.qdq import build, build_parts
from efrapq.exporters.readback import read_quantized
from efrapq.exporters.remarks import remarks
from efrapq.exporters.targets import PROFILES, native_target, profile
from efrapq.graph.quantized import QuantizedModel
from efrapq.io.onnx_data import OnnxParts

__all__ = [
    "PROFILES",
    "Violation",
    "export_model",
    "export_parts",
    "lint",
    "native_target",
    "profile",
    "read_quantized",
    "remarks",
]

# Bytes of constants that go into one file: protobuf holds 2 GiB, and the graph has to fit as well.
MOST_BYTES = (2 << 30) - (64 << 20)


def export_model(quantized: QuantizedModel, target: str) -> onnx.ModelProto:
    """Write a quantized model for a target. Its rules are checked by `lint`, not here."""
    return build(quantized, profile(target))


def export_parts(quantized: QuantizedModel, target: str, most: int | None = None) -> OnnxParts:
    """The same for any size: where the constants have more bytes than `most`, by default as many as one file holds,
    the large ones are not in the graph.
    """
    return build_parts(quantized, profile(target), MOST_BYTES if most is None else most)
