"""A quantized model as the solver made it and as an exporter writes it: the float graph beside codes and grids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from efrapq.graph import constants as const
from efrapq.graph.layers import Layer
from efrapq.grid import ActivationGrid

__all__ = ["QuantizedModel", "QuantizedWeight", "codes_digest"]


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of one weight in its ONNX layout.

    stored: the codes, int8: in memory, or of a large model made each time that they are asked for. scale: (O,) float32
    along `axis`, symmetric (zero_point 0). bits: 2 to 8; stored in the next wider container, 4 or 8. block: of a matrix
    whose runs of `block` inputs have a scale each: `scale` then has two axes, as the codes have, `block` times shorter
    on that of the inputs; 0 where there is one scale per channel. unsigned: the file that they were read from holds
    them as uint8 around 128, the same real numbers.
    """

    stored: NDArray[np.int8] | ir.LazyTensor
    scale: NDArray[np.float32]
    axis: int
    bits: int
    block: int = 0
    unsigned: bool = field(default=False, compare=False)

    @property
    def codes(self) -> NDArray[np.int8]:
        """The codes as an array."""
        return self.stored if isinstance(self.stored, np.ndarray) else self.stored.numpy()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes, which need not be made for it."""
        return self.stored.shape if isinstance(self.stored, np.ndarray) else const.sizes(self.stored)

    @property
    def container_bits(self) -> int:
        return 4 if self.bits <= 4 else 8

    def dequantized(self) -> NDArray[np.float32]:
        """Ŵ = scale · codes, float32."""
        return self.codes.astype(np.float32) * self.steps

    @property
    def steps(self) -> NDArray[np.float32]:
        """The scale of each weight, in a shape that broadcasts against the codes."""
        if self.block:
            return np.repeat(self.scale, self.block, 1 - self.axis)
        shape = [1] * len(self.shape)
        shape[self.axis] = -1
        return self.scale.reshape(shape)

    def replace_codes(self, codes: NDArray[np.int8] | ir.LazyTensor) -> QuantizedWeight:
        """The same grid with other codes."""
        return replace(self, stored=codes)


@dataclass(frozen=True)
class QuantizedModel:
    """graph: the prepared float model; its weight initializers are placeholders for `weights`.

    layers: in topological order. weights: by layer name. activations: value name → grid, moving operators' outputs
    included. metadata: what goes into the file's metadata_props.
    """

    model: ir.Model
    layers: list[Layer]
    weights: dict[str, QuantizedWeight]
    activations: dict[str, ActivationGrid]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """One hash over all layers' codes and scales, in order."""
        return codes_digest(self.weights)


def codes_digest(weights: dict[str, QuantizedWeight]) -> str:
    """SHA-256 over (name, bits, axis, shape, block, scale, codes) of every weight, in order."""
    h = hashlib.sha256()
    for name, weight in weights.items():
        h.update(f"{name}|{weight.bits}|{weight.axis}|{weight.shape}|".encode())
        if weight.block:
            h.update(f"block {weight.block}|".encode())
        h.update(np.ascontiguousarray(weight.scale, dtype="<f4").tobytes())
        h.update(np.ascontiguousarray(weight.codes, dtype=np.int8).data)
    return h.hexdigest()
