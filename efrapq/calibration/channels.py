"""What the channels of a float model's activations reach, and what its layers make of them: the measure of everything
that scales channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from efrapq.graph.executor import Executor
from efrapq.graph.layers import Layer, weight_array
from efrapq.graph.spans import over_inputs

__all__ = ["DEEPEST", "Floats", "Seen", "inputs_of", "magnitudes", "watch"]

Floats = NDArray[np.float64]

# What is asked for of all layers is held at once: at most so many samples, and so many numbers of the input.
PIECE, NUMBERS = 64, 8 * 3 * 224 * 224
# No channel is raised to more than its span's widest by this: it may reach further on other data.
DEEPEST = 2.0**-5


@dataclass(frozen=True)
class Seen:
    """One activation over the calibration data. high, low: per channel the largest value, and the largest of its
    negative, (channels,) each. square: the mean of squares per channel. spread: the variance of all together.
    """

    high: Floats
    low: Floats
    square: Floats
    spread: float


def watch(model: ir.Model, values: list[str], chunks: Sequence[Tensor], device: torch.device) -> dict[str, Seen]:
    """Statistics of the values, channels on axis 1, over all chunks."""
    executor = Executor(model, device=device)
    name = str(model.graph.inputs[0].name)
    extremes: dict[str, tuple[Tensor, Tensor]] = {}
    sums: dict[str, Tensor] = {}
    with torch.no_grad():
        for chunk in chunks:
            for piece in torch.split(chunk, max(1, min(PIECE, NUMBERS // max(chunk[0].numel(), 1)))):
                for value, x in executor.run({name: piece.to(device)}, values).items():
                    # One image's channel is one run of memory: reduced there first, and exactly from there on.
                    rows = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
                    least, most = rows.aminmax(dim=2)
                    high, low = most.amax(0).clamp_min(0), (-least).amax(0).clamp_min(0)
                    before = extremes.get(value, (high, low))
                    extremes[value] = torch.maximum(before[0], high), torch.maximum(before[1], low)
                    total = rows.sum(2).double().sum(0)
                    square = torch.linalg.vector_norm(rows, dim=2).double().square().sum(0)
                    moments = torch.stack([torch.full_like(total, len(x) * rows.shape[2]), total, square])
                    sums[value] = sums[value] + moments if value in sums else moments
    found = {}
    for value, (high, low) in extremes.items():
        count, total, square = sums[value].cpu().numpy()
        mean = total.sum() / count.sum()
        spread = float(square.sum() / count.sum() - mean**2)
        found[value] = Seen(high.double().cpu().numpy(), low.double().cpu().numpy(), square / count, spread)
    return found


def magnitudes(graph: ir.Graph, layer: Layer) -> NDArray[np.float32]:
    """(O, J, K): of a reader's weights, by output channel, input of it, and place in the kernel."""
    weight = np.abs(weight_array(graph, layer))
    weight = weight if layer.channel_axis == 0 else weight.T
    return weight.reshape(*weight.shape[:2], -1)


def inputs_of(layer: Layer, channels: int) -> NDArray[np.int64]:
    """(O or 1, J): the span's channel that each of a reader's inputs has."""
    channel = over_inputs(layer, np.arange(channels, dtype=np.int64))
    return channel.reshape(1, -1) if layer.op_type == "Gemm" else channel.reshape(channel.shape[0], -1)
