"""OpenVINO: u8 activations on the grids that were calibrated, s8 weights, integer kernels throughout.

Measured on OpenVINO 2026.4 (CPU): an int4 initializer behind a Cast to int8 becomes an int8 constant and runs on
integer kernels, as it does in ONNX Runtime; a plain int4 DequantizeLinear runs in float. With a Clip of codes between
QuantizeLinear and DequantizeLinear the embedded subject's residual blocks come out otherwise than in ONNX Runtime, so
4-bit activations are widened to 8 bits over the same range, where each of their levels remains a level.
"""

from __future__ import annotations

from onnx import TensorProto

from efrapq.exporters.profile import Profile
from efrapq.exporters.rules import (
    Rule,
    activations_per_tensor,
    activations_typed,
    codes_untouched,
    int4_through_cast,
    scales_positive,
    weights_signed,
)

__all__ = ["PROFILE"]

LOW_PRECISION = "https://docs.openvino.ai/latest/openvino_docs_OV_UG_lpt.html"
MEASURED = "measured, tests/exporters/test_openvino.py"

PROFILE = Profile(
    name="openvino",
    summary="OpenVINO, Intel CPU and GPU: uint8 activations, int8 and 4-bit weights on integer kernels",
    int4_through_cast=True,
    four_bit_activations="widen",
    pair_sums_saturate=True,
    rules=(
        Rule(
            "Activations are uint8 or int8",
            LOW_PRECISION,
            activations_typed(TensorProto.UINT8, TensorProto.INT8),
        ),
        Rule("An activation has one scale", LOW_PRECISION, activations_per_tensor),
        Rule("Scales are constant and positive", LOW_PRECISION, scales_positive),
        Rule("Weights are signed and symmetric", LOW_PRECISION, weights_signed),
        Rule(
            "A 4-bit weight beside a quantized input passes a Cast to int8, or it is computed in float",
            MEASURED,
            int4_through_cast,
        ),
        Rule("A QuantizeLinear is read by its DequantizeLinear and by nothing between", MEASURED, codes_untouched),
    ),
)
