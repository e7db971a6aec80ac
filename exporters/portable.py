"""Plain standard QDQ, for any runtime that reads the ONNX operator set: int4 DequantizeLinear, uint4 activations."""

from __future__ import annotations

from onnx import TensorProto

from efrapq.exporters.profile import Profile
from efrapq.exporters.rules import Rule, activations_typed, scales_positive, weights_signed

__all__ = ["PROFILE"]

QUANTIZE = "https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html"
DEQUANTIZE = "https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html"

PROFILE = Profile(
    name="portable",
    summary="standard QDQ without runtime-specific forms, 4-bit weights on float kernels in ONNX Runtime",
    four_bit_activations="uint4",
    guards=True,
    rules=(
        Rule("Activations are uint8 or uint4", QUANTIZE, activations_typed(TensorProto.UINT8, TensorProto.UINT4)),
        Rule("Scales are constant and positive", DEQUANTIZE, scales_positive),
        Rule("Weights are signed and symmetric", DEQUANTIZE, weights_signed),
    ),
)
