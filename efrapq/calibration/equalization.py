"""Which channels to scale by how much, so that a per-tensor activation grid serves them all.

A grid's step is set by the widest channel of its tensor, and every other channel pays for it. With factors f a value
v of a span has the step Δ_v ∝ Dhi_v + Dlo_v, where Dhi_v = max_c hi_vc f_c, and what its rounding adds to the layers
behind it, relative to what they compute, is

    Σ_v Δ_v²/12 · Σ_c w_vc / f_c²,        w_vc = Σ_r ‖W_r[:, c]‖² / (O_r var(y_r))

over the readers r that v reaches. For given D each f_c is best as large as they allow, min over v of Dhi_v / hi_vc
and Dlo_v / lo_vc, so that only the few D are searched for. But what f adds to the activations it takes from the
weights of the readers, whose own rounding then costs Σ_r Σ_o s_o²/12 · Σ_c E[x_c²] f_c² / (O_r var(y_r)) with
s_o = max_c |W_oc| / f_c over their largest code: how far to go, f^a with a from 0 to 1, is chosen for the sum of both.
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
from efrapq.graph.placement import Placement
from efrapq.graph.spans import Span, find_spans
from efrapq.grid import code_range

__all__ = ["choose_exponents"]

# Widths of the search for the D, in octaves.
SEARCH = (1.0, 0.5, 0.25, 0.125)
ROUNDS = 100
# The a that are tried.
SHARES = np.linspace(0, 1, 9)


@dataclass(frozen=True)
class _Reader:
    """One layer that reads a span. weight: (O, J, K) magnitudes, J inputs of an output channel. index: (O or 1, J),
    the span's channel of each input. square: E[x²] of each channel. unit: O var(y). qmax: its largest code.
    """

    weight: Floats
    index: NDArray[np.int64]
    square: Floats
    unit: float
    qmax: int

    def noise_taken(self, channels: int) -> Floats:
        """w_c: what the rounding noise of each channel adds to the output, (channels,)."""
        energy = np.square(self.weight).sum(2) / self.unit
        index = np.broadcast_to(self.index, energy.shape)
        return np.bincount(index.reshape(-1), energy.reshape(-1), channels).astype(np.float64)

    def own_noise(self, factors: Floats) -> float:
        """What the rounding of its weights adds to the output."""
        f = factors[self.index]
        step = (self.weight.max(2) / f).max(1) / self.qmax
        kernel = self.weight.shape[2]
        moved = kernel * np.square(f) * self.square[self.index]
        return float((np.square(step) / 12 * np.broadcast_to(moved, self.weight.shape[:2]).sum(1)).sum() / self.unit)


def choose_exponents(
    model: ir.Model,
    layers: Sequence[Layer],
    bits: Mapping[str, int],
    placement: Placement,
    chunks: Sequence[Tensor],
    device: torch.device,
) -> Exponents:
    """k of each channel, for the factors 2^(k/8), of every span of a prepared float model that gains by it.

    bits: of the weights by layer name. chunks: the model's one input, (n, …) float32. One more run of the float model
    over them.
    """
    by_name = {layer.name: layer for layer in layers}
    spans = find_spans(model.graph, layers)
    wanted: dict[str, None] = {}
    for span in spans:
        wanted.update(dict.fromkeys(name for name in span.values if name in placement.grids))
        for reader in span.readers:
            wanted.update(dict.fromkeys((by_name[reader].input, by_name[reader].output)))
    seen = watch(model, list(wanted), chunks, device)
    found: dict[str, NDArray[np.int8]] = {}
    for span in spans:
        readers = {name: _reader(model, by_name[name], span, bits[name], seen) for name in span.readers}
        steps = _exponents(span, readers, placement.grids, seen)
        if steps.any():
            found[span.name] = steps
    return found


def _reader(model: ir.Model, layer: Layer, span: Span, bits: int, seen: Mapping[str, Seen]) -> _Reader:
    weight = magnitudes(model.graph, layer).astype(np.float64)
    index = inputs_of(layer, span.channels)
    # Behind a Flatten a channel is a run of inputs.
    square = seen[layer.input].square.reshape(span.channels, -1).mean(1)
    unit = len(weight) * max(seen[layer.output].spread, np.finfo(np.float64).tiny)
    return _Reader(weight, index, square, unit, code_range(bits)[1])


def _exponents(
    span: Span, readers: Mapping[str, _Reader], grids: Mapping[str, int], seen: Mapping[str, Seen]
) -> NDArray[np.int8]:
    """k of each channel of one span."""
    gridded = [name for name in span.values if name in grids]
    if not gridded:
        return np.zeros(span.channels, np.int8)
    high = np.stack([seen[name].high for name in gridded])
    low = np.stack([seen[name].low for name in gridded])
    taken = {name: reader.noise_taken(span.channels) for name, reader in readers.items()}
    weight = np.stack([np.sum([taken[r] for r in span.after[name]], axis=0) for name in gridded])
    codes = np.array([2.0 ** grids[name] - 1 for name in gridded])
    full = _within(high, span.limit) if np.isfinite(span.limit) else _balanced(high, low, weight, codes)

    def cost(factors: Floats) -> float:
        activations = _activation_noise(high, low, weight, codes, factors)
        return activations + sum(reader.own_noise(factors) for reader in readers.values())

    share = min(SHARES, key=lambda a: cost(full**a))
    # Down, so that nothing passes a limit.
    steps: Floats = np.floor(STEPS * share * np.log2(full) + 1e-9)
    return np.clip(steps, -128, 127).astype(np.int8)


def _activation_noise(high: Floats, low: Floats, weight: Floats, codes: Floats, factors: Floats) -> float:
    """Σ_v Δ_v²/12 Σ_c w_vc / f_c²; high, low, weight: (values, channels), codes: of each value's grid."""
    step = ((high * factors).max(1) + (low * factors).max(1)) / codes
    return float((np.square(step) / 12 * (weight / np.square(factors)).sum(1)).sum())


def _within(high: Floats, limit: float) -> Floats:
    """Factors between a Clip and its readers: channels that reach the limit stay, the others are raised to the top."""
    peak = high.max(0)
    top = min(limit, float(peak.max()))
    return np.where((peak > 0) & (peak < limit), top / np.maximum(peak, top * DEEPEST), 1.0)


def _balanced(high: Floats, low: Floats, weight: Floats, codes: Floats) -> Floats:
    """Factors, (channels,), of a span without a limit, for the least noise of the activations."""
    reach = np.maximum(high, low).max(0)
    used = (reach > 0) & (weight.sum(0) > 0)
    result = np.ones(high.shape[1])
    if not used.any():
        return result
    raised = np.maximum(reach.max() * DEEPEST / reach[used], 1.0)
    ends = np.concatenate([high, low])[:, used] * raised
    present = np.flatnonzero(ends.max(1) > 0)
    w = weight[:, used]

    def factors(widths: Floats) -> Floats:
        with np.errstate(divide="ignore"):
            allowed: Floats = np.exp2(widths)[:, None] / ends[present]
        return np.asarray(allowed.min(0), np.float64)

    def cost(widths: Floats) -> float:
        return _activation_noise(high[:, used] * raised, low[:, used] * raised, w, codes, factors(widths))

    widths = np.log2((ends[present] / ends.max(0)).max(1))
    best = cost(widths)
    for width in SEARCH:
        for _ in range(ROUNDS):
            before = best
            for i in range(len(widths)):
                for step in (width, -width):
                    tried = widths.copy()
                    tried[i] += step
                    if (found := cost(tried)) < best:
                        best, widths = found, tried
            if best == before:
                break
    chosen = factors(widths)
    # The size of the whole span is free: the middle channel keeps its own.
    result[used] = chosen / np.exp(np.median(np.log(chosen)))
    return result
