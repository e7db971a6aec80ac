"""Channels that a grid rounds away although a layer behind amplifies them, and how far to lift them above its step.

What is below half a step of an activation grid is zero in the file. A step is set by the widest channel of a tensor,
so a channel can stay below it on purpose, and a layer behind can have weights large enough to hear it in float: what it
says there is missing in the file, and no weight need be rounded for that. How many steps of its output's grid a reader
r answers to one step of channel c, with as many bits on both sides,

    gain_c = max_{r,o} ‖W_r[o, c]‖₁ range_v f_o / (range_y f_c),

is a few in ordinary networks (docs/THREAT-MODEL.md has figures), and less still for channels at rest. Channels above
that are scaled up by f, 2^(k/8), as cross-layer equalization would (`graph/spans.py`): the float network stays the
same, to within float rounding, and what they say is on the grid. f_o is the factor of the channel that the reader
writes. Where all channels of a chain are at rest, their gains count together; they are lifted until they are not
amplified at all, or until half a step fills the grid. Others are lifted until GAIN, or until they fill the grid that
the tensor has anyhow. No tensor becomes wider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from efrapq.calibration.channels import DEEPEST, Floats, Seen, inputs_of, magnitudes, watch
from efrapq.graph.equalize import STEPS, Exponents
from efrapq.graph.layers import Layer
from efrapq.graph.placement import Placement, activation_after
from efrapq.graph.spans import Span, find_spans

__all__ = ["GAIN", "Lifted", "choose_lift"]

# The largest gain that channels which say anything are left with, and up to which those at rest are left alone. CIFAR
# networks stay below, and dead channels of other people's come to three.
GAIN, SILENT_GAIN = 8.0, 4.0
# A channel whose largest value is below so many steps is at rest.
AT_REST = 1.0
# A channel at rest that is amplified so many times hides something, as far as anybody can tell.
HIDING = 32.0
# Samples for a first look: most networks have nothing to lift, and are not run over all of their calibration for it.
FIRST = 64
# Spans are gone through from the last to the first; residual streams are read by what writes them, so more than once.
ROUNDS = 4
MOST = 127
# Of two ranges, and of gains together: a float32 holds their products with weights.
MOST_RATIO = 1e15


@dataclass(frozen=True)
class Lifted:
    """exponents: k of each channel, for factors 2^(k/8), of every span with anything to lift. channels: how many are
    lifted; hidden: how many of them are at rest, and amplified as no dead channel is. gain: the largest that any of
    them had; value: the activation that it is in. left: the largest gain that is left, with its activation.
    """

    exponents: Exponents
    channels: int = 0
    hidden: int = 0
    gain: float = 0.0
    value: str = ""
    left: tuple[float, str] = (0.0, "")


def choose_lift(
    model: ir.Model, layers: Sequence[Layer], placement: Placement, chunks: Sequence[Tensor], device: torch.device
) -> Lifted:
    """What to lift in a prepared float model. chunks: the model's one input, (n, …) float32, which it is run over if
    the first of them show anything to lift.
    """
    first: list[Tensor] = []
    while (missing := FIRST - sum(map(len, first))) > 0 and len(first) < len(chunks):
        first.append(chunks[len(first)][:missing])
    found = _Gains(model, layers, placement, first, device).lift()
    return _Gains(model, layers, placement, chunks, device).lift() if found.channels else found


@dataclass(frozen=True)
class _Ear:
    """How one reader hears a span. heard: (O, C) gains. span: the span that it writes, with its channels as it counts
    them; None where those cannot be scaled.
    """

    heard: NDArray[np.float32]
    span: str | None


class _Gains:
    """The gains of all spans of a model, with steps and reaches as the data shows them."""

    def __init__(
        self,
        model: ir.Model,
        layers: Sequence[Layer],
        placement: Placement,
        chunks: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self.model, self.placement = model, placement
        self.layers = {layer.name: layer for layer in layers}
        self.spans = [s for s in find_spans(model.graph, layers) if any(v in placement.grids for v in s.values)]
        self.of_value = {value: span.name for span in self.spans for value in span.values}
        behind = {name: self._behind(self.layers[name]) for span in self.spans for name in span.readers}
        wanted = dict.fromkeys([*(v for s in self.spans for v in s.values if v in placement.grids), *behind.values()])
        self.seen = watch(model, list(wanted), chunks, device)
        if not all(np.isfinite(s.high).all() and np.isfinite(s.low).all() for s in self.seen.values()):
            self.spans = []  # what is wrong with these activations is for the calibration of their ranges to say
        self.ears = {s.name: [self._ear(s, self.layers[r], behind[r]) for r in s.readers] for s in self.spans}
        self.room = {s.name: self._room(s) for s in self.spans}

    def lift(self) -> Lifted:
        """Factors for all spans, the last first."""
        exponents = {span.name: np.zeros(span.channels, np.int8) for span in self.spans}
        rest = {span.name: self._at_rest(span) for span in self.spans}
        chained = {span.name: np.ones(span.channels) for span in self.spans}
        for _ in range(ROUNDS):
            before = {name: k.copy() for name, k in exponents.items()}
            for span in reversed(self.spans):
                lifted = {name: 2.0 ** (k / STEPS) for name, k in exponents.items()}
                loud = self._gain(span, lifted) / GAIN
                total = np.minimum(self._gain(span, chained), MOST_RATIO)
                chained[span.name] = np.where(rest[span.name], total, 1.0)
                needed = np.where(rest[span.name], np.where(total > SILENT_GAIN, total, 1.0), loud)
                k = np.ceil(STEPS * np.log2(np.maximum(needed, 1.0)))
                exponents[span.name] = np.clip(np.minimum(k, self.room[span.name]), 0, MOST).astype(np.int8)
            if all((before[name] == k).all() for name, k in exponents.items()):
                break
        channels, hidden, worst, left = 0, 0, (0.0, ""), (0.0, "")
        factors = {name: 2.0 ** (k / STEPS) for name, k in exponents.items()}
        for span in self.spans:
            above = exponents[span.name] > 0
            gain = self._gain(span, {})
            channels += int(above.sum())
            hidden += int((above & rest[span.name] & (gain >= HIDING)).sum())
            worst = max(worst, (float(gain[above].max(initial=0)), span.name))
            after = self._gain(span, factors) / factors[span.name]
            left = max(left, (float(after.max(initial=0)), span.name))
        kept = {name: k for name, k in exponents.items() if k.any()}
        return Lifted(kept, channels, hidden, *worst, left)

    def _gain(self, span: Span, behind: Mapping[str, Floats]) -> Floats:
        """(C,): the largest gain of each channel, were it not lifted, with these factors of the channels behind it."""
        found = np.zeros(span.channels)
        for ear in self.ears[span.name]:
            factors = behind.get(ear.span) if ear.span is not None else None
            raised = ear.heard if factors is None else ear.heard * factors[:, None]
            found = np.maximum(found, raised.max(0))
        return found

    def _at_rest(self, span: Span) -> NDArray[np.bool_]:
        """(C,): whether nothing is on the grid of any value of the span."""
        quiet = [np.maximum(self.seen[v].high, self.seen[v].low) < AT_REST * self._step(v) for v in self._grids(span)]
        found: NDArray[np.bool_] = np.logical_and.reduce(quiet)
        return found

    def _room(self, span: Span) -> Floats:
        """(C,): the largest k with which no channel passes what the widest one reaches, at either end of any value."""
        room: Floats = np.full(span.channels, float(MOST))
        for value in self._grids(span):
            seen = self.seen[value]
            for reach in (seen.high, seen.low):
                top = min(float(reach.max()), span.limit)
                # What is below half a step is lost, whatever it is: lifted, all of it is to be on the grid.
                held = np.maximum(reach, self._step(value) / 2)
                if np.isfinite(span.limit):
                    # On other data a channel may reach further, and behind a Clip it would be cut off there.
                    held = np.maximum(held, top * DEEPEST)
                with np.errstate(divide="ignore", invalid="ignore"):
                    k = np.floor(STEPS * np.log2(top / held) + 1e-9)
                room = np.where((held > 0) & (top > 0), np.minimum(room, k), room)
        return np.clip(room, 0.0, None)

    def _grids(self, span: Span) -> list[str]:
        return [value for value in span.values if value in self.placement.grids]

    def _range(self, value: str) -> float:
        seen: Seen = self.seen[value]
        return float(seen.high.max() + seen.low.max())

    def _step(self, value: str) -> float:
        """Of a value's grid."""
        return self._range(value) / (2.0 ** self.placement.grids[value] - 1)

    def _behind(self, layer: Layer) -> str:
        """The value behind a layer that has a grid, or the layer's output where none has."""
        after = activation_after(layer.node.outputs[0])
        value = layer.output if after is None else str(after.outputs[0].name)
        return self.placement.source(value) if value in self.placement else layer.output

    def _ear(self, span: Span, layer: Layer, output: str) -> _Ear:
        heard = magnitudes(self.model.graph, layer).sum(2)
        if layer.groups == 1:
            # Behind a Flatten a channel is a run of inputs.
            channels = heard.reshape(len(heard), span.channels, -1).sum(2)
        else:
            channels = np.zeros((len(heard), span.channels), np.float32)
            np.add.at(channels, (np.arange(len(heard))[:, None], inputs_of(layer, span.channels)), heard)
        widest = max((self._range(v) for v in self._grids(span) if layer.name in span.after[v]), default=0.0)
        behind = self._range(output)
        # What is nothing on all calibration images has no grid to speak of: whatever comes there is clipped.
        ratio = min(widest / behind, MOST_RATIO) if behind > 0 else 0.0
        return _Ear(channels * np.float32(ratio), self.of_value.get(layer.output))
