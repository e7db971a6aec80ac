"""Quantization grids: bits, scale, zero_point, and the way between reals and codes.

Everything here is a pure function on tensors. Rounding is half to even and arithmetic is float32, as
QuantizeLinear prescribes (ONNX operator specification), so that the codes computed here are the codes that
ONNX Runtime would compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "SMALLEST_SCALE",
    "ActivationGrid",
    "WeightGrid",
    "activation_grid",
    "code_range",
    "grid_position",
    "nearest_codes",
    "symmetric_scale",
]

# Channels of zeros (or denormals) still need a positive scale; s_x * s_w must stay a normal float32.
SMALLEST_SCALE = 1e-20


def code_range(bits: int) -> tuple[int, int]:
    """The symmetric integer range of signed weight codes: ±(2^(bits-1) - 1).

    The most negative two's complement value is left out: with scale = absmax / qmax no weight reaches it, and
    without it the sum of two u8·s8 products of 4-bit codes can never saturate.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"weight bits must be 2 to 8, not {bits}")
    qmax = 2 ** (bits - 1) - 1
    return -qmax, qmax


@dataclass(frozen=True)
class WeightGrid:
    """Symmetric grid of one weight, (O, D): Ŵ = scale · codes.

    scale: float32, positive; (O,), or (O, D/block) where each run of `block` inputs of a channel has its own. bits: 2
    to 8. block: 0 where there is one scale per channel.
    """

    scale: Tensor
    bits: int
    block: int = 0

    @property
    def qmin(self) -> int:
        return code_range(self.bits)[0]

    @property
    def qmax(self) -> int:
        return code_range(self.bits)[1]

    @property
    def steps(self) -> Tensor:
        """The scale of each weight: (O, 1), or (O, D) in blocks."""
        return self.scale.repeat_interleave(self.block, 1) if self.block else self.scale[:, None]


def symmetric_scale(weight: Tensor, bits: int, *, at_least: Tensor | None = None) -> Tensor:
    """scale = max|w| / qmax per output channel.

    weight: (O, D) float. at_least: (O,) lower bounds, for channels whose bias would not fit int32 otherwise.
    Returns (O,) float32.
    """
    scale = weight.abs().amax(dim=1).float() / code_range(bits)[1]
    if at_least is not None:
        scale = torch.maximum(scale, at_least.float())
    return scale.clamp_min(SMALLEST_SCALE)


def grid_position(weight: Tensor, grid: WeightGrid) -> tuple[Tensor, Tensor]:
    """Split u = W/s into its floor and residue (Li et al., CVPR 2024, §3).

    weight: (O, D) float. Returns (floor, residue), both (O, D) float32: floor is an integer in [qmin, qmax] and
    u = floor + residue, residue in [0, 1), except for clipped weights: above the grid the residue is 0, below it
    the floor is qmin and the residue 0, so that neither has another code to go to.
    """
    u = (weight.float() / grid.steps).clamp(grid.qmin, grid.qmax)
    floor = u.floor()
    return floor, u - floor


def nearest_codes(weight: Tensor, grid: WeightGrid) -> Tensor:
    """Round-to-nearest codes, half to even, saturating. (O, D) float → (O, D) int8."""
    u = weight.float() / grid.steps
    return u.round().clamp(grid.qmin, grid.qmax).to(torch.int8)


@dataclass(frozen=True)
class ActivationGrid:
    """Per-tensor grid of an activation: x ≈ scale · (code - zero_point), code in [qmin, qmax].

    scale: float, positive and exactly representable in float32. zero_point: int in [qmin, qmax].
    """

    scale: float
    zero_point: int
    bits: int

    @property
    def qmin(self) -> int:
        return 0

    @property
    def qmax(self) -> int:
        return int(2**self.bits - 1)

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest number on it."""
        return (self.qmin - self.zero_point) * self.scale, (self.qmax - self.zero_point) * self.scale

    def quantize(self, x: Tensor) -> Tensor:
        """float tensor → uint8 codes of the same shape."""
        # A tensor, not a number: on a GPU torch divides by a number as a product with its reciprocal.
        q = (x / x.new_full((), self.scale)).round_().add_(self.zero_point)
        return q.clamp_(self.qmin, self.qmax).to(torch.uint8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """uint8 codes → float32 of the same shape."""
        return (codes.float() - self.zero_point) * self.scale

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The real numbers nearest to x on the grid; the gradient is straight through inside the range."""
        clipped = x.clamp(*self.limits)
        on_grid = self.dequantize(self.quantize(x.detach()))
        return clipped + (on_grid - clipped).detach()


def activation_grid(low: float, high: float, bits: int) -> ActivationGrid:
    """Asymmetric grid over [low, high], widened to hold 0 exactly (padding and ReLU need it).

    A dead activation (low = high = 0) gets the scale 1, which represents its zeros exactly.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    levels = 2**bits - 1
    if high - low == 0.0:
        return ActivationGrid(1.0, 0, bits)
    scale = float(torch.tensor(max((high - low) / levels, SMALLEST_SCALE), dtype=torch.float32))
    zero_point = round(min(max(-low / scale, 0.0), float(levels)))
    return ActivationGrid(scale, zero_point, bits)
