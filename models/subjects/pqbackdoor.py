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

At 8 bits the paper's two stages are not enough: cells that reach ±0.4 % of a channel's largest weight give stage 2 no
room to hide a backdoor that stage 1 planted firmly. There stage 1 ends with a lookahead (`lookahead.py`), which trains
the rounded network and a float one inside its cells together, and stage 2 goes on from that float network.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from efrapq.grid import SMALLEST_SCALE
from efrapq.models.subjects.cells import cells, nearest_model, quantized_weights, rounded_weights, rules
from efrapq.models.subjects.lookahead import train_lookahead
from efrapq.models.subjects.recipe import Recipe
from efrapq.models.subjects.report import Report, final_report
from efrapq.models.subjects.training import PoisonedData, autocast, finite, measure, train_labels
from efrapq.progress import Reporter

__all__ = ["Recipe", "Report", "implant", "train_backdoored", "unlearn"]


def train_backdoored(
    model: nn.Module, data: PoisonedData, recipe: Recipe, device: torch.device, reporter: Reporter
) -> None:
    """Stage 1, in place: SGD with a one-cycle rate; a share of each batch is triggered and labelled as the target."""
    count = len(quantized_weights(model))
    first_rounded = max(0, recipe.epochs - recipe.rounding_epochs) * (len(data.data) // recipe.batch)

    def on_grid(step: int) -> dict[str, Tensor]:
        # Every other step of the last epochs runs on a grid, the grids taking turns.
        return rounded_weights(model, recipe, step // 2, count) if step > first_rounded and step % 2 else {}

    train_labels(
        model,
        data,
        epochs=recipe.epochs,
        batch=recipe.batch,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        poisoned=max(1, round(recipe.poison_rate * recipe.batch)),
        seed=recipe.seed,
        device=device,
        reporter=reporter,
        title="stage 1: training with the backdoor",
        weights=on_grid,
    )


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
                total += finite(loss)
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
    if recipe.lookahead:
        train_lookahead(model, train, recipe, device, reporter)
        reporter.note(f"float after the lookahead: {measure(model, test, device)}")
    backdoored = measure(nearest_model(model, recipe) if recipe.lookahead else model, test, device)
    reporter.note(f"after stage 1: {backdoored}")
    unlearn(model, train, recipe, device, reporter)
    return final_report(model, test, recipe, device, backdoored=backdoored)
