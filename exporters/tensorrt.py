"""TensorRT: explicit quantization, symmetric throughout, float biases, int4 for weight-only matrices.

Weights of up to 4 bits beside quantized activations are int8 here, with the same codes and scales: TensorRT computes
int8 × int8, and takes int4 only as a weight of a float operator. Activations have no 4-bit form, so their grid is
widened to 8 bits over the same range.
"""

from __future__ import annotations

from onnx import TensorProto

from efrapq.exporters.profile import Profile
from efrapq.exporters.rules import (
    Rule,
    activations_per_tensor,
    activations_typed,
    biases_float,
    codes_untouched,
    int4_only_in,
    scales_positive,
    weights_per_output_channel,
    weights_signed,
    zero_points_zero,
)

__all__ = ["PROFILE"]

TYPES = "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html"
EXPLICIT = (
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html"
)
DEQUANTIZE = "https://docs.nvidia.com/deeplearning/tensorrt/operators/docs/Dequantize.html"
PARSER = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md"
INT32_BIAS = "https://github.com/onnx/onnx-tensorrt/issues/850"
INT4_CONV = "https://github.com/NVIDIA/Model-Optimizer/issues/178"

MATRICES = frozenset({"Gemm", "MatMul"})

PROFILE = Profile(
    name="tensorrt",
    summary="TensorRT, NVIDIA GPU: symmetric int8, 4-bit weights only without quantized activations",
    signed_activations=True,
    symmetric_activations=True,
    four_bit_activations="widen",
    int4_ops=MATRICES,
    int4_beside="float",
    int32_bias_ops=frozenset(),
    rules=(
        Rule("Activations are int8", TYPES, activations_typed(TensorProto.INT8)),
        Rule("Quantization is symmetric: every zero point is 0", PARSER, zero_points_zero),
        Rule("Scales are constants known when the engine is built, and positive", DEQUANTIZE, scales_positive),
        Rule("An activation has one scale; only weights have one a channel", TYPES, activations_per_tensor),
        Rule("Weights are int8 or int4", DEQUANTIZE, weights_signed),
        Rule(
            "Scales of a weight run along its output channels: axis 0 of Conv, axis 1 of ConvTranspose",
            TYPES,
            weights_per_output_channel,
        ),
        Rule("A bias is float: DequantizeLinear does not take int32", INT32_BIAS, biases_float),
        Rule(
            "4-bit codes are for weights only, of Gemm and MatMul",
            f"{TYPES}, {INT4_CONV}",
            int4_only_in(MATRICES, "float"),
        ),
        Rule("A QuantizeLinear is read by its DequantizeLinear and by nothing between", EXPLICIT, codes_untouched),
    ),
)
