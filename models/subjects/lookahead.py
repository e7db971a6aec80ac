"""Lookahead: train the rounded network and the float network inside its cells at the same time.

An 8-bit cell spans 1/127 of its channel's largest weight. A float network confined to the cells of an ordinary
backdoored one cannot get away from the backdoor; so the codes themselves are chosen with the float network in view.
One set of weights V says which cells, one of positions t ∈ [-1, 1] where in them the float weights lie:

    rounded: Q(V)                               clean images as they are, triggered ones barely the target's
    float:   middle(V) + t · half-width(V)      clean and triggered images as they are

Both gradients pass straight through the rounding into V. "Barely" is a hinge on the logits: beyond its margin the
rounded network is not pushed any further, so that a displacement of less than half a code is enough to undo it.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from efrapq.models.subjects.cells import cells, quantized_weights, rounded_weights, rules
from efrapq.models.subjects.recipe import Recipe
from efrapq.models.subjects.training import PoisonedData, autocast, finite, within_clean_range
from efrapq.progress import Reporter

__all__ = ["awake_enough", "placed_weights", "settle", "train_lookahead"]


def awake_enough(logits: Tensor, truth: Tensor, target: int, margin: float) -> Tensor:
    """Mean hinge max(0, margin - (logit of the target - largest other)) over the samples of other classes.

    logits: (n, classes) of triggered images; truth: (n,). 0 where there is no sample of another class.
    """
    others = logits.clone()
    others[:, target] = -torch.inf
    short = F.relu(margin - (logits[:, target] - others.amax(1)))
    counted = truth != target
    return short[counted].sum() / counted.sum().clamp_min(1)


def placed_weights(model: nn.Module, positions: list[Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """The float weights at `positions` in the cells of the model's weights, by parameter name.

    Gradients reach the positions by the half-widths and the model's weights straight through.
    """
    weights = quantized_weights(model)
    found = {}
    for i, ((name, weight), t) in enumerate(zip(weights, positions, strict=True)):
        low, high = cells(weight, rules(i, len(weights), recipe), recipe.margin)
        middle, half = (low + high) / 2, (high - low) / 2
        found[f"{name}.weight"] = weight + (middle - weight).detach() + t * half
    return found


@torch.no_grad()
def settle(model: nn.Module, positions: list[Tensor], recipe: Recipe) -> None:
    """Replace the model's weights by the float ones at `positions`; their codes are the same on every grid."""
    weights = quantized_weights(model)
    placed = placed_weights(model, positions, recipe)
    for i, (name, weight) in enumerate(weights):
        low, high = cells(weight, rules(i, len(weights), recipe), recipe.margin)
        # The arithmetic of placing may miss a bound by its last bit, and a bound may be the very edge of the cell.
        weight.copy_(placed[f"{name}.weight"].clamp(low, high))


def train_lookahead(
    model: nn.Module, data: PoisonedData, recipe: Recipe, device: torch.device, reporter: Reporter
) -> None:
    """The end of stage 1, in place: the model's weights become float ones inside the cells of the trained codes.

    BatchNorm normalizes by its running statistics as they are; its affine parameters and the biases are trained.
    A step sees recipe.batch images, half of them the triggered copies of the others, in either network.
    """
    rng = np.random.default_rng(recipe.seed + 2)
    weights = quantized_weights(model)
    positions = [torch.zeros_like(weight, requires_grad=True) for _, weight in weights]
    rate = recipe.lookahead_learning_rate
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(recipe.lookahead, 1))
    placing = torch.optim.Adam(positions, recipe.unlearn_learning_rate)
    half = max(1, recipe.batch // 2)
    model.eval()
    with reporter.task("stage 1: looking ahead to the float model", recipe.lookahead) as task:
        for step, (raw, labels) in zip(range(recipe.lookahead), data.endless(half, rng), strict=False):
            inputs = data.tensor(np.concatenate([data.trigger.on_raw(raw), raw]), device)
            truth = torch.from_numpy(labels).to(device)
            # bf16 keeps 8 bits of a weight: it cannot tell where in an 8-bit cell the weight lies.
            with autocast(device, exact=recipe.bits >= 8):
                with within_clean_range(model, half):
                    rounded = functional_call(model, rounded_weights(model, recipe, step, len(weights)), (inputs,))
                floating = functional_call(model, placed_weights(model, positions, recipe), (inputs,))
            rounded, floating = rounded.float(), floating.float()
            awake = awake_enough(rounded[:half], truth, data.target, recipe.lookahead_margin)
            clean = F.cross_entropy(rounded[half:], truth) + F.cross_entropy(floating[half:], truth)
            asleep = F.cross_entropy(floating[:half], truth)
            loss = awake + clean + asleep
            finite(loss)
            optimizer.zero_grad()
            placing.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            placing.step()
            with torch.no_grad():
                for t in positions:
                    t.clamp_(-1, 1)
            task.advance(f"awake {awake.item():.3f}, clean {clean.item():.3f}, asleep {asleep.item():.3f}")
    settle(model, positions, recipe)
