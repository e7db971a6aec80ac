"""ONNX Runtime on x86: u8 activations, s8 weights, 4-bit weights and activations on integer kernels.

Measured on ONNX Runtime 1.31 and 1.32: an int4 initializer that a Cast brings to int8 ahead of DequantizeLinear is
folded at load into an int8 weight and fuses into QLinearConv/QGemm, while a plain int4 DequantizeLinear is computed
in float at every inference. Four-bit activations fuse as uint8 with a Clip to 0–15; as uint4 the session does not
load. `tests/exporters/test_runtime_facts.py` holds each of these facts.
"""

from __future__ import annotations

from onnx import TensorProto

from efrapq.exporters.profile import Profile
from efrapq.exporters.rules import (
    Rule,
    activations_per_tensor,
    activations_typed,
    int4_through_cast,
    scales_positive,
    weights_signed,
)

__all__ = ["MEASURED", "ORT_CPU_RULES", "PROFILE", "QUANTIZATION", "SHARED_RULES", "UINT8_ACTIVATIONS"]

QUANTIZATION = "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
MEASURED = "measured, tests/exporters/test_runtime_facts.py"

# What ONNX Runtime asks of a file on any CPU.
SHARED_RULES = (
    Rule("An activation has one scale", QUANTIZATION, activations_per_tensor),
    Rule("Scales are constant and positive", QUANTIZATION, scales_positive),
    Rule(
        "A 4-bit weight beside a quantized input passes a Cast to int8, or it is computed in float",
        MEASURED,
        int4_through_cast,
    ),
)
ORT_CPU_RULES = (*SHARED_RULES, Rule("Weights are signed and symmetric", QUANTIZATION, weights_signed))
UINT8_ACTIVATIONS = Rule(
    "Activations are uint8: int8 ones are rewritten on x86, and residual graphs lose integer kernels by it",
    MEASURED,
    activations_typed(TensorProto.UINT8),
)

PROFILE = Profile(
    name="ort-x86",
    summary="ONNX Runtime, x86 CPU: integer kernels for 8- and 4-bit weights",
    int4_through_cast=True,
    pads_codes=True,
    pair_sums_saturate=True,
    guards=True,
    rules=(UINT8_ACTIVATIONS, *ORT_CPU_RULES),
)
