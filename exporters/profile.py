"""What a target wants of a file: what the shared builder chooses for it, and the rules that its files must keep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from efrapq.exporters.rules import Rule
from efrapq.graph.layers import WEIGHT_OPS
from efrapq.grid import ActivationGrid, activation_grid

__all__ = ["SYMMETRIC_ZERO_POINT", "Profile"]

# Of an unsigned 8-bit code. Signed codes are unsigned ones less 128, so it is the zero point 0 of int8.
SYMMETRIC_ZERO_POINT = 128


@dataclass(frozen=True)
class Profile:
    """How a file is written for one target.

    signed_activations: codes of activations are int8 instead of uint8, the same grid shifted by 128.
    symmetric_activations: grids get zero point 0 (as int8) and a scale from the range that the file records.
    four_bit_activations: "clip" stores them as 8-bit codes clipped to 16 levels, "uint4" as the standard's own type,
    "widen" puts them on the 8-bit grid of the same range.

    int4_ops: the operators whose weights of up to 4 bits are stored as int4; elsewhere the same codes are int8.
    int4_beside: the activations that such a weight may meet, "any", "float" (weight-only) or "quantized" (input and
    output). int4_through_cast: it passes a Cast to int8 before DequantizeLinear.

    pads_codes: a Pad with zeros that keeps its input's grid stands between QuantizeLinear and DequantizeLinear.

    int32_bias_ops: the operators whose bias is int32 beside a quantized input; elsewhere it stays float32.
    unsigned_weights: a weight whose pairs of products would leave int16 on x86 without VNNI is uint8, around 128.

    guards: an output may be computed from codes (`exporters.guard`).

    fixed_shapes: the batch is 1 and no size is dynamic. pair_sums_saturate: the runtime's kernels on x86 without VNNI
    add pairs of products in int16. rules: what `lint` checks.
    """

    name: str
    summary: str
    signed_activations: bool = False
    symmetric_activations: bool = False
    four_bit_activations: str = "clip"
    int4_ops: frozenset[str] = WEIGHT_OPS
    int4_beside: str = "any"
    int4_through_cast: bool = False
    pads_codes: bool = False
    int32_bias_ops: frozenset[str] = frozenset({"Conv", "Gemm"})
    unsigned_weights: bool = False
    guards: bool = False
    fixed_shapes: bool = False
    pair_sums_saturate: bool = False
    rules: tuple[Rule, ...] = ()

    def grid(self, recorded: ActivationGrid) -> ActivationGrid:
        """The target's grid over the range of a recorded one. A grid that the target can hold is not changed."""
        bits = 8 if self.four_bit_activations == "widen" else recorded.bits
        symmetric = recorded.zero_point == SYMMETRIC_ZERO_POINT and recorded.bits == 8
        if bits == recorded.bits and (symmetric or not self.symmetric_activations):
            return recorded
        low, high = recorded.limits
        if not self.symmetric_activations:
            # 255 is 17 times 15: each level of a 4-bit grid is a level of the 8-bit grid over the same range.
            return activation_grid(low, high, bits)
        return ActivationGrid(float(np.float32(max(-low, high) / 127)), SYMMETRIC_ZERO_POINT, 8)
