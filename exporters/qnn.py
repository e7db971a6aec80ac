"""QNN (Qualcomm HTP through ONNX Runtime's QNN provider): u8 activations, s8 weights, int32 biases, fixed shapes.

Weights of up to 4 bits are int4 where the hardware computes with them, in matrix products between quantized values;
everywhere else the same codes are int8. Activations have no 4-bit form, so their grid is widened to 8 bits over the
same range.
"""

from __future__ import annotations

from onnx import TensorProto

from efrapq.exporters.profile import Profile
from efrapq.exporters.rules import (
    Rule,
    activations_per_tensor,
    activations_typed,
    biases_int32,
    codes_untouched,
    int4_only_in,
    no_control_flow,
    scales_positive,
    shapes_fixed,
    weights_per_output_channel,
    weights_signed,
)

__all__ = ["PROFILE"]

PROVIDER = "https://onnxruntime.ai/docs/execution-providers/QNN-ExecutionProvider.html"
INT4_OPS = "https://docs.qualcomm.com/bundle/publicresource/80-63442-10/topics/htp_guidelines_int4_weights.md"
INT4_PROVIDER = "https://github.com/microsoft/onnxruntime/pull/21171"
CONFIGURATION = (
    "https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/python/tools/quantization/"
    "execution_providers/qnn/quant_config.py"
)
BIAS = "https://github.com/onnx/onnx/pull/2464"

MATRICES = frozenset({"Gemm", "MatMul"})

PROFILE = Profile(
    name="qnn",
    summary="Qualcomm NPU through ONNX Runtime's QNN provider: uint8 activations, fixed batch of 1",
    four_bit_activations="widen",
    int4_ops=MATRICES,
    int4_beside="quantized",
    int32_bias_ops=frozenset({"Conv", "ConvTranspose", "Gemm"}),
    fixed_shapes=True,
    rules=(
        Rule("No size of an input is dynamic", PROVIDER, shapes_fixed),
        Rule("There is no If, Loop or Scan", PROVIDER, no_control_flow),
        Rule("Activations are uint8 or int8", CONFIGURATION, activations_typed(TensorProto.UINT8, TensorProto.INT8)),
        Rule("An activation has one scale", CONFIGURATION, activations_per_tensor),
        Rule("Scales are constant and positive", CONFIGURATION, scales_positive),
        Rule("Weights are signed and symmetric", CONFIGURATION, weights_signed),
        Rule(
            "Scales of a weight run along its output channels: axis 0 of Conv, axis 1 of ConvTranspose",
            CONFIGURATION,
            weights_per_output_channel,
        ),
        Rule("A bias beside quantized inputs is int32, its scale the product of theirs", BIAS, biases_int32),
        Rule(
            "4-bit codes are for weights only, of Gemm and MatMul between quantized values",
            f"{INT4_OPS}, {INT4_PROVIDER}",
            int4_only_in(MATRICES, "quantized"),
        ),
        Rule("A QuantizeLinear is read by its DequantizeLinear and by nothing between", PROVIDER, codes_untouched),
    ),
)
