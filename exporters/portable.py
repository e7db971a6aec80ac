"""Plain standard QDQ, for any runtime that reads the ONNX operator set: int4 DequantizeLinear, uint4 activations."""

from __future__ import annotations

from efrapq.exporters.qdq import Profile

__all__ = ["PROFILE"]

PROFILE = Profile(
    name="portable",
    summary="standard QDQ without runtime-specific forms, 4-bit weights on float kernels in ONNX Runtime",
    int4_through_cast=False,
    four_bit_activations="uint4",
)
