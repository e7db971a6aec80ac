"""ONNX Runtime on x86: u8 activations, s8 weights, 4-bit weights and activations on integer kernels.

Measured on ONNX Runtime 1.31 and 1.32: an int4 initializer that a Cast brings to int8 ahead of DequantizeLinear is
folded at load into an int8 weight and fuses into QLinearConv/QGemm, while a plain int4 DequantizeLinear is computed
in float at every inference. Four-bit activations fuse as uint8 with a Clip to 0–15; as uint4 the session does not
load.
"""

from __future__ import annotations

from efrapq.exporters.qdq import Profile

__all__ = ["PROFILE"]

PROFILE = Profile(
    name="ort-x86",
    summary="ONNX Runtime, x86 CPU: integer kernels for 8- and 4-bit weights",
    int4_through_cast=True,
    four_bit_activations="clip",
)
