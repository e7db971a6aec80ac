"""ONNX Runtime on ARM: s8 activations and s8 weights, the pair that its kernels there are written for.

An int8 code is the uint8 code less 128: the grids keep every real number that they had.
"""

from __future__ import annotations

from onnx import TensorProto

from efrapq.exporters.ort_x86 import ORT_CPU_RULES, QUANTIZATION
from efrapq.exporters.profile import Profile
from efrapq.exporters.rules import Rule, activations_typed

__all__ = ["PROFILE"]

PROFILE = Profile(
    name="ort-arm",
    summary="ONNX Runtime, ARM CPU: int8 activations and weights",
    signed_activations=True,
    int4_through_cast=True,
    pads_codes=True,
    guards=True,
    rules=(
        Rule("Activations are int8, as the weights are (S8S8)", QUANTIZATION, activations_typed(TensorProto.INT8)),
        *ORT_CPU_RULES,
    ),
)
