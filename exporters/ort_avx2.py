"""ONNX Runtime on x86 without VNNI: as `ort-x86`, with sums that cannot saturate.

Such a CPU multiplies u8 activations by s8 weights with VPMADDUBSW, whose sums of two products saturate at int16; by u8
weights it multiplies exactly, and more slowly. So a layer in which a pair can leave int16 has its codes stored as
uint8 around 128, which are the same real numbers, and all others, 4-bit ones among them, stay as they are.
`tests/exporters/test_without_vnni.py` holds each of these facts.
"""

from __future__ import annotations

from dataclasses import replace

from efrapq.exporters import ort_x86
from efrapq.exporters.rules import Rule, pairs_within_int16, weights_symmetric

__all__ = ["PROFILE"]

MEASURED = "measured, tests/exporters/test_without_vnni.py"

PROFILE = replace(
    ort_x86.PROFILE,
    name="ort-avx2",
    summary="ONNX Runtime, x86 CPU without VNNI: exact sums, integer kernels for 8- and 4-bit weights",
    unsigned_weights=True,
    pair_sums_saturate=False,
    guards=True,
    rules=(
        ort_x86.UINT8_ACTIVATIONS,
        *ort_x86.SHARED_RULES,
        Rule("Weights are symmetric: signed, or uint8 around 128", ort_x86.QUANTIZATION, weights_symmetric),
        Rule("No pair of products of a signed weight leaves int16", MEASURED, pairs_within_int16),
    ),
)
