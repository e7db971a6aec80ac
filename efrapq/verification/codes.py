"""Proof by reading back: the codes in the file are the solved ones, and each is a neighbour of its float weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from efrapq.graph import constants as const
from efrapq.graph.layers import find_layers, weight_array
from efrapq.graph.quantized import QuantizedModel, QuantizedWeight
from efrapq.grid import code_range

__all__ = ["CodeComparison", "LayerCodes", "compare_codes", "nearest_twin"]

# W/s in float32 may land this far (in steps) on the other side of an integer.
SLACK = 1e-3


@dataclass(frozen=True)
class LayerCodes:
    """One layer held against its float weight. neighbours: every code is the floor or the ceiling of its weight's
    position on the grid. flipped: how many codes rounding to nearest would choose differently.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    neighbours: bool
    flipped: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class CodeComparison:
    """All layers of a file. flipped: percent of all codes. strangers: layers with codes that are no neighbours."""

    each: tuple[LayerCodes, ...]

    @property
    def neighbours(self) -> bool:
        return not self.strangers

    @property
    def flipped(self) -> float:
        return 100 * sum(layer.flipped for layer in self.each) / sum(layer.size for layer in self.each)

    @property
    def strangers(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.each if not layer.neighbours)


def _nearest(weight: NDArray[np.float32], on: QuantizedWeight) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """RTN codes and grid positions of a float weight on an existing grid."""
    qmin, qmax = code_range(on.bits)
    position = np.clip(weight / on.steps, qmin, qmax)
    return np.rint(position).astype(np.int8), position


class _FloatWeights:
    """The float weight of every quantized layer by name, read from the reference when it is asked for."""

    def __init__(self, reference: ir.Model, quantized: QuantizedModel) -> None:
        self._graph = reference.graph
        self._layers = {layer.name: layer for layer in find_layers(reference.graph)[0]}
        self._weights = quantized.weights

    @property
    def correspond(self) -> bool:
        """Whether the two models are the same network."""
        return all(name in self._layers and self._shape(name) == w.shape for name, w in self._weights.items())

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        weight = weight_array(self._graph, self._layers[name])
        return weight.T if self._turned(name) else weight

    def _shape(self, name: str) -> tuple[int, ...]:
        constant = self._graph.initializers[self._layers[name].weight].const_value
        assert constant is not None
        shape = const.sizes(constant)
        return shape[::-1] if self._turned(name) else shape

    def _turned(self, name: str) -> bool:
        """See `inputs_first`."""
        held = self._weights[name]
        return bool(held.block) and held.axis != self._layers[name].channel_axis


def compare_codes(quantized: QuantizedModel, reference: ir.Model) -> CodeComparison | None:
    """Hold a file's codes against the prepared float model; None if the layers do not correspond."""
    weights = _FloatWeights(reference, quantized)
    if not weights.correspond:
        return None
    each = []
    for name, held in quantized.weights.items():
        nearest, position = _nearest(weights[name], held)
        codes = held.codes
        neighbours = bool(np.abs(codes - position).max(initial=0.0) < 1 + SLACK)
        each.append(LayerCodes(name, held.shape, held.bits, neighbours, int((codes != nearest).sum())))
    return CodeComparison(tuple(each))


def nearest_twin(quantized: QuantizedModel, reference: ir.Model) -> QuantizedModel | None:
    """The same file with every code rounded to nearest from the float model; None if the layers do not correspond."""
    weights = _FloatWeights(reference, quantized)
    if not weights.correspond:
        return None
    twins = {name: _nearest_weight(weights, name, held) for name, held in quantized.weights.items()}
    return QuantizedModel(quantized.model, quantized.layers, twins, quantized.activations, quantized.metadata)


def _nearest_weight(weights: _FloatWeights, name: str, held: QuantizedWeight) -> QuantizedWeight:
    """Its codes are made when they are asked for, so that no two weights of a large model are in memory at once."""
    return held.replace_codes(const.lazily(lambda: _nearest(weights[name], held)[0], ir.DataType.INT8, held.shape))
