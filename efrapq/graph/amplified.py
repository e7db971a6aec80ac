"""Channels whose rounding a quantized file amplifies, from its codes and grids alone.

A layer answers one step of its input's channel c with up to Σ |code| s_w range_x / range_y steps of its output, were
both grids of as many bits. In ordinary files that is a few; where it is a hundred, what the channel says below half a
step, which is lost, was worth fifty steps to the float network. A backdoor can hide in it
(`efrapq/calibration/lift.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from efrapq.graph.layers import Layer
from efrapq.graph.placement import activation_after
from efrapq.graph.quantized import QuantizedModel, QuantizedWeight
from efrapq.grid import ActivationGrid
from efrapq.io.text import printable

__all__ = ["NOTABLE", "Amplified", "amplified_words", "amplifying_layers"]

# From so many steps on a channel is worth telling. A well-made ImageNet MobileNetV2 has one of 92 before it is lifted.
NOTABLE = 100.0


@dataclass(frozen=True)
class Amplified:
    """A layer that amplifies channels of its input: how many, which of them most, and how many steps of the output one
    step of that is worth at most.
    """

    layer: str
    channels: int
    channel: int
    steps: float


def amplifying_layers(quantized: QuantizedModel, least: float = NOTABLE) -> list[Amplified]:
    """The layers that answer one step of a channel with at least so many, the most first. Layers whose input or output
    is on no grid are none of them.
    """
    found = []
    for layer in quantized.layers:
        grid = quantized.activations.get(layer.input)
        after = activation_after(layer.node.outputs[0]) or layer.node
        behind = quantized.activations.get(str(after.outputs[0].name))
        weight = quantized.weights[layer.name]
        matrix = layer.op_type in ("Gemm", "MatMul") and len(weight.shape) == 2
        if grid is None or behind is None or not (matrix or layer.op_type == "Conv"):
            continue
        steps = _heard(layer, weight) * (_range(grid) / _range(behind))
        if (count := int((steps >= least).sum())) > 0:
            found.append(Amplified(layer.name, count, int(steps.argmax()), round(float(steps.max()), 1)))
    return sorted(found, key=lambda layer: (-layer.steps, layer.layer))


def _range(grid: ActivationGrid) -> float:
    return float(grid.scale) * (grid.qmax - grid.qmin)


def _heard(layer: Layer, weight: QuantizedWeight) -> NDArray[np.float64]:
    """(C,): the largest sum of magnitudes with which any output channel reads each input channel."""
    rows = np.moveaxis(weight.codes, layer.channel_axis, 0)
    sums = np.abs(rows.astype(np.int16)).reshape(*rows.shape[:2], -1).sum(2, dtype=np.int64) * weight.scale[:, None]
    heard: NDArray[np.float64] = sums.reshape(layer.groups, -1, sums.shape[1]).max(1).reshape(-1).astype(np.float64)
    return heard


def amplified_words(found: Sequence[Amplified]) -> str:
    """What to tell about them."""
    worst, count = found[0], sum(layer.channels for layer in found)
    return (
        f"{count} channels are amplified: {printable(worst.layer)} answers one step of channel {worst.channel} with "
        f"{worst.steps:,.0f} steps. What such a channel says below half a step is lost in this file, and a backdoor "
        "can hide there. `defend` lifts such channels where they have room; with --act-bits 32 nothing is lost"
    )
