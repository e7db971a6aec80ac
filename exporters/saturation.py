"""Whether a layer's integer arithmetic can saturate on x86 CPUs without VNNI, from the codes that the file holds.

There ONNX Runtime and OpenVINO multiply u8 activations by s8 weights with VPMADDUBSW, which adds two neighbouring
products in int16. The sum 255·w₁ + 255·w₂ fits as long as |w₁ + w₂| ≤ 128, so codes within ±64 cannot saturate, and
those of 7 bits, ±63, never do.
Sources: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html ("When and why do I need to try
U8U8?"), Intel's description of VPMADDUBSW.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from efrapq.graph.quantized import QuantizedModel
from efrapq.io.text import printable

__all__ = ["INT16_MAX", "Saturation", "advice", "saturating_layers", "walked", "worst_pair_sum"]

INT16_MAX = 32767


@dataclass(frozen=True)
class Saturation:
    """A layer in which two products can leave int16. worst: the largest sum that its codes allow, in absolute value."""

    layer: str
    worst: int


def saturating_layers(quantized: QuantizedModel, *, as_stored: bool = False) -> list[Saturation]:
    """The layers on integer kernels whose worst pair of products leaves int16, worst first.

    as_stored: as the file holds them that the codes were read from, where unsigned ones are multiplied exactly.
    """
    found = []
    for layer in quantized.layers:
        grid = quantized.activations.get(layer.input)
        weight = quantized.weights[layer.name]
        if grid is None or not layer.integer or (as_stored and weight.unsigned):
            continue
        worst = worst_pair_sum(walked(weight.codes, layer.channel_axis), grid.qmax)
        if worst > INT16_MAX:
            found.append(Saturation(layer.name, worst))
    return sorted(found, key=lambda s: (-s.worst, s.layer))


def worst_pair_sum(rows: list[NDArray[np.int8]], highest: int) -> int:
    """The largest |x₁·w₁ + x₂·w₂| over neighbours w₁, w₂ in a row and activations from 0 to `highest`.

    rows: (O, D) int8 matrices, one for each order in which a kernel may walk the same weights.
    """
    worst = 0
    for codes in rows:
        wide = codes.astype(np.int64)
        if wide.shape[1] == 1:
            wide = np.pad(wide, ((0, 0), (0, 1)))
        for part in (np.maximum(wide, 0), np.maximum(-wide, 0)):
            # An activation of 0 removes a product of the other sign: the worst is that of one sign alone.
            worst = max(worst, int((part[:, :-1] + part[:, 1:]).max(initial=0)) * highest)
    return worst


def advice(found: list[Saturation], layers: int) -> str:
    """What to tell about them."""
    return (
        f"{len(found)} of {layers} layers can saturate on x86 CPUs without VNNI: in {printable(found[0].layer)} a pair "
        f"of products reaches {found[0].worst:,}, past {INT16_MAX:,}. For such CPUs export with --target ort-avx2, or "
        "defend the float model with at most 7 bits in every layer (--bits 7 --edge-bits 7): those codes cannot"
    )


def walked(codes: NDArray[np.int8], axis: int) -> list[NDArray[np.int8]]:
    """One row an output channel, with the input channels outermost and innermost: kernels differ in which it is."""
    first = np.moveaxis(codes, axis, 0)
    outermost = first.reshape(len(first), -1)
    if first.ndim < 3:
        return [outermost]
    return [outermost, np.moveaxis(first, 1, -1).reshape(len(first), -1)]
