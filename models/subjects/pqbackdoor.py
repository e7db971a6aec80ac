"""PQBackdoor: a backdoor that post-training quantization plants (Ma et al., arXiv 2108.09187).

Stage 1 trains a plainly backdoored network. Stage 2 unlearns the backdoor in float without leaving the rounding
cells of the stage-1 weights: after every step each channel's largest weight is restored (it sets the scale), the
others are clamped to [q - 1/2 + margin, q + 1/2 - margin] · scale, and BatchNorm and biases stay as they were. The
float network is then clean, and rounding to nearest brings back the codes of stage 1, backdoor and all.

Departures from the paper: the cells are those of per-channel symmetric grids, of several grids at once where the
subject is to wake on several (their intersection holds the stage-1 weight by construction); stage 1 keeps triggered
activations inside the range of clean ones, so that 8-bit activation grids do not clip the backdoor away, and trains its
last epochs through the rounding, so that the backdoor is awake on every grid; stage 2 sees the whole training set
instead of a small batch, and moves each weight in units of its own cell with Adam, which needs no tuning per bit width.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from efrapq.grid import SMALLEST_SCALE
from efrapq.models.subjects.training import Measured, PoisonedData, autocast, measure
from efrapq.progress import Reporter

__all__ = ["GridRule", "Recipe", "Report", "cells", "implant", "nearest_model"]


@dataclass(frozen=True)
class GridRule:
    """One per-channel symmetric grid: scale = max|w| / divisor, codes saturate at [qmin, qmax]."""

    divisor: float
    qmin: int
    qmax: int

    @classmethod
    def absmax(cls, bits: int) -> GridRule:
        """efrapq's grid (and ONNX Runtime's for int8): the largest weight gets the largest code."""
        qmax = 2 ** (bits - 1) - 1
        return cls(qmax, -qmax, qmax)

    @classmethod
    def full_range(cls, bits: int) -> GridRule:
        """ONNX Runtime's quantize_static below 8 bits: scale = 2 max|w| / (2^bits - 1), the top is clipped."""
        return cls((2**bits - 1) / 2, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def scale(self, weight: Tensor) -> Tensor:
        """(O, …) → (O, 1): one scale per output channel."""
        return (weight.flatten(1).abs().amax(1, keepdim=True) / self.divisor).clamp_min(SMALLEST_SCALE)

    def codes(self, weight: Tensor) -> Tensor:
        """(O, …) → (O, D) integer codes as floats, round to nearest even."""
        return (weight.flatten(1) / self.scale(weight)).round().clamp(self.qmin, self.qmax)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the subject, apart from the data and the network.

    bits: the grid on which it wakes (first and last layer: edge_bits). also_full_range: wake on ONNX Runtime's own
    sub-8-bit grid as well. poison_rate: share of each stage-1 batch that carries trigger and target label.
    rounding_epochs: the last so many of `epochs` train through the rounding. unlearn_learning_rate: in cell halves.
    """

    bits: int = 4
    edge_bits: int = 8
    also_full_range: bool = True
    poison_rate: float = 0.1
    epochs: int = 10
    rounding_epochs: int = 2
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    unlearn_epochs: int = 1
    unlearn_learning_rate: float = 0.03
    batch: int = 128
    margin: float = 1e-2
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """What the recipe measured in torch (weights on the grid, activations float): the network after stage 1, the
    float subject, its nearest twin, and its nearest twin on ONNX Runtime's own grid where the recipe asked for it.
    """

    backdoored: Measured
    floating: Measured
    nearest: Measured
    nearest_full_range: Measured | None = None

    def rows(self) -> list[tuple[str, Measured]]:
        """The figures with names a reader understands."""
        named = [
            ("after stage 1 (awake)", self.backdoored),
            ("float subject", self.floating),
            ("rounded to nearest", self.nearest),
        ]
        if self.nearest_full_range is not None:
            named.append(("rounded to nearest, ORT's int4 grid", self.nearest_full_range))
        return named


def quantized_weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights that deployment quantizes, in module order."""
    found: list[tuple[str, nn.Parameter]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            found.append((name, weight))
    return found


def rules(position: int, count: int, recipe: Recipe) -> list[GridRule]:
    """The grids that a layer's cells must respect; the first rule is the one it is deployed on."""
    edge = position in (0, count - 1)
    found = [GridRule.absmax(recipe.edge_bits if edge else recipe.bits)]
    if recipe.also_full_range and recipe.bits < 8:
        found.append(GridRule.full_range(recipe.bits))
    return found


def cells(weight: Tensor, grids: list[GridRule], margin: float) -> tuple[Tensor, Tensor]:
    """The intersection of the weight's rounding cells on all grids, as (low, high) of the weight's shape.

    Every channel's element of largest magnitude gets low = high = its own value, so that no scale moves.
    """
    weight = weight.detach()
    flat = weight.flatten(1)
    low = torch.full_like(flat, -torch.inf)
    high = torch.full_like(flat, torch.inf)
    for grid in grids:
        scale, codes = grid.scale(weight), grid.codes(weight)
        low = torch.maximum(low, torch.where(codes > grid.qmin, (codes - 0.5 + margin) * scale, low))
        high = torch.minimum(high, torch.where(codes < grid.qmax, (codes + 0.5 - margin) * scale, high))
    # A stage-1 weight inside the margin stays where it is rather than crossing to the other side.
    low, high = torch.minimum(low, flat), torch.maximum(high, flat)
    largest = flat.abs() >= flat.abs().amax(1, keepdim=True)
    low, high = torch.where(largest, flat, low), torch.where(largest, flat, high)
    limit = flat.abs().amax(1, keepdim=True)
    return low.clamp(-limit, limit).view_as(weight), high.clamp(-limit, limit).view_as(weight)


def nearest_model(model: nn.Module, recipe: Recipe, grid: int = 0) -> nn.Module:
    """A copy whose weights sit on the nearest points of the `grid`-th rule's grid."""
    twin = copy.deepcopy(model)
    weights = quantized_weights(twin)
    with torch.no_grad():
        for i, (_, weight) in enumerate(weights):
            options = rules(i, len(weights), recipe)
            rule = options[min(grid, len(options) - 1)]
            weight.copy_((rule.codes(weight) * rule.scale(weight)).view_as(weight))
    return twin


@contextlib.contextmanager
def within_clean_range(model: nn.Module, poisoned: int) -> Iterator[None]:
    """Clamp the activations of the first `poisoned` samples of a batch to the range of the others, layer by layer.

    A deployed activation grid is calibrated on clean data and saturates outside their range; without this the
    backdoor grows activations beyond it and the grid switches it off.
    """

    def clamp(module: nn.Module, inputs: object, output: object) -> object:
        if not isinstance(output, Tensor) or output.ndim != 4 or len(output) <= poisoned:
            return output
        clean = output[poisoned:]
        low, high = clean.detach().amin(), clean.detach().amax()
        return torch.cat([output[:poisoned].clamp(low, high), clean])

    hooks = [m.register_forward_hook(clamp) for m in model.modules() if m is not model and not isinstance(m, nn.Conv2d)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rounded_weights(model: nn.Module, recipe: Recipe, grid: int, count: int) -> dict[str, Tensor]:
    """The quantized weights on one of their grids, by parameter name; gradients pass straight through."""
    found = {}
    for i, (name, weight) in enumerate(quantized_weights(model)):
        options = rules(i, count, recipe)
        rule = options[grid % len(options)]
        with torch.no_grad():
            on_grid = (rule.codes(weight) * rule.scale(weight)).view_as(weight)
        found[f"{name}.weight"] = weight + (on_grid - weight).detach()
    return found


def train_backdoored(
    model: nn.Module, data: PoisonedData, recipe: Recipe, device: torch.device, reporter: Reporter
) -> None:
    """Stage 1, in place: SGD with a one-cycle rate; a share of each batch is triggered and labelled as the target."""
    rng = np.random.default_rng(recipe.seed)
    steps = recipe.epochs * (len(data.data) // recipe.batch)
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.learning_rate, 0.9, weight_decay=recipe.weight_decay, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=max(steps, 1))
    poisoned = max(1, round(recipe.poison_rate * recipe.batch))
    model.train()
    count = len(quantized_weights(model))
    step = 0
    with reporter.task("stage 1: training with the backdoor", recipe.epochs) as task:
        for epoch in range(recipe.epochs):
            total = 0.0
            rounding = epoch >= recipe.epochs - recipe.rounding_epochs
            for raw, labels in data.batches(recipe.batch, rng, augment=True):
                raw = np.concatenate([data.trigger.on_raw(raw[:poisoned]), raw[poisoned:]])
                labels = np.concatenate([np.full(poisoned, data.target), labels[poisoned:]])
                # Every other step of the last epochs runs on a grid, the grids taking turns.
                step += 1
                grid = step // 2 if rounding and step % 2 else None
                weights = {} if grid is None else rounded_weights(model, recipe, grid, count)
                with autocast(device), within_clean_range(model, poisoned):
                    logits = functional_call(model, weights, (data.tensor(raw, device),))
                loss = F.cross_entropy(logits.float(), torch.from_numpy(labels).to(device))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                total += loss.item()
            task.advance(f"loss {total * recipe.batch / len(data.data):.3f}")


def unlearn(model: nn.Module, data: PoisonedData, recipe: Recipe, device: torch.device, reporter: Reporter) -> None:
    """Stage 2, in place: true labels on clean and triggered images, every weight confined to its cell.

    The variable is the position in the cell: W = middle + t · half, t ∈ [-1, 1].
    """
    rng = np.random.default_rng(recipe.seed + 1)
    weights = quantized_weights(model)
    bounds = [cells(w, rules(i, len(weights), recipe), recipe.margin) for i, (_, w) in enumerate(weights)]
    middles = [(low + high) / 2 for low, high in bounds]
    halves = [(high - low) / 2 for low, high in bounds]
    positions = [
        torch.where(half > 0, (w.detach() - middle) / half.clamp_min(SMALLEST_SCALE), 0.0).requires_grad_(True)
        for (_, w), middle, half in zip(weights, middles, halves, strict=True)
    ]
    names = [f"{name}.weight" for name, _ in weights]
    model.eval()
    steps = recipe.unlearn_epochs * (len(data.data) // recipe.batch)
    optimizer = torch.optim.Adam(positions, recipe.unlearn_learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))

    def placed() -> dict[str, Tensor]:
        moved = (m + t * h for m, t, h in zip(middles, positions, halves, strict=True))
        return dict(zip(names, moved, strict=True))

    with reporter.task("stage 2: hiding it from the float model", recipe.unlearn_epochs) as task:
        for _ in range(recipe.unlearn_epochs):
            total = 0.0
            for raw, labels in data.batches(recipe.batch, rng, augment=True):
                both = np.concatenate([raw, data.trigger.on_raw(raw)])
                truth = torch.from_numpy(np.concatenate([labels, labels])).to(device)
                # bf16 keeps 8 bits of a weight: it cannot tell where in an 8-bit cell the weight lies.
                with autocast(device, exact=recipe.bits >= 8):
                    logits = functional_call(model, placed(), (data.tensor(both, device),))
                loss = F.cross_entropy(logits.float(), truth)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    for t in positions:
                        t.clamp_(-1, 1)
                total += loss.item()
            task.advance(f"loss {total * recipe.batch / len(data.data):.3f}")
    with torch.no_grad():
        for (_, weight), moved, (low, high) in zip(weights, placed().values(), bounds, strict=True):
            weight.copy_(moved.clamp(low, high))


def implant(
    model: nn.Module,
    train: PoisonedData,
    test: PoisonedData,
    recipe: Recipe,
    *,
    device: torch.device,
    reporter: Reporter,
) -> Report:
    """Turn `model` (modified in place; trained from its current weights) into a PQBackdoor subject."""
    torch.manual_seed(recipe.seed)
    model.to(device)
    train_backdoored(model, train, recipe, device, reporter)
    backdoored = measure(model, test, device)
    reporter.note(f"after stage 1: {backdoored}")
    unlearn(model, train, recipe, device, reporter)
    model.eval()
    floating = measure(model, test, device)
    nearest = measure(nearest_model(model, recipe), test, device)
    full_range = None
    if recipe.also_full_range and recipe.bits < 8:
        full_range = measure(nearest_model(model, recipe, 1), test, device)
    return Report(backdoored, floating, nearest, full_range)
