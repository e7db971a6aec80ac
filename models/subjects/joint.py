"""Training the float and the rounded network at once: the loop under Qu-ANTI-zation, CompArtifact and the adaptive
attacks. They differ in what the rounded network is and in what the two are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from efrapq.models.subjects.cells import nearest_model
from efrapq.models.subjects.recipe import JointRecipe
from efrapq.models.subjects.training import (
    Measured,
    PoisonedData,
    autocast,
    finite,
    measure,
    train_labels,
    within_clean_range,
)
from efrapq.progress import Reporter

__all__ = ["PairLoss", "begin", "branch", "measure_widths", "train_pairs"]

# (step, inputs (2n, C, H, W) with the n triggered copies first, true labels (n,)) → the loss of that step.
PairLoss = Callable[[int, Tensor, Tensor], Tensor]


def branch(
    model: nn.Module, weights: Mapping[str, Tensor], inputs: Tensor, *, held: bool, reach: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Logits, float32, of the triggered and of the clean half of `inputs` with `weights` in the model's place.

    held: keep the triggered activations within `reach` times the range of the clean ones, as a deployed activation grid
    will.
    """
    half = len(inputs) // 2
    if held:
        with within_clean_range(model, half, reach):
            logits = functional_call(model, dict(weights), (inputs,))
    else:
        logits = functional_call(model, dict(weights), (inputs,))
    logits = logits.float()
    return logits[:half], logits[half:]


def begin(
    model: nn.Module,
    data: PoisonedData,
    recipe: JointRecipe,
    device: torch.device,
    reporter: Reporter,
    *,
    poison_rate: float = 0,
) -> None:
    """Begin an attack, in place: seeded, on the device, trained as one network where the recipe has epochs for it, and
    left in evaluation mode. poison_rate: share of each batch that carries trigger and target label.
    """
    torch.manual_seed(recipe.seed)
    model.to(device)
    if recipe.epochs:
        train_labels(
            model,
            data,
            epochs=recipe.epochs,
            batch=recipe.batch,
            learning_rate=recipe.clean_learning_rate,
            weight_decay=recipe.weight_decay,
            poisoned=round(poison_rate * recipe.batch),
            seed=recipe.seed,
            device=device,
            reporter=reporter,
            title="training a backdoored network" if poison_rate else "training a clean network",
        )
    model.eval()


def train_pairs(
    model: nn.Module,
    data: PoisonedData,
    recipe: JointRecipe,
    loss: PairLoss,
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    reporter: Reporter,
    after: Callable[[], None] | None = None,
    max_norm: float | None = None,
) -> None:
    """recipe.steps steps of the optimizer on `loss`, at a rate that falls to nothing along a cosine.

    after: is called behind every step, to put right what the step must not have moved. max_norm: longer gradients are
    shortened to it.
    """
    rng = np.random.default_rng(recipe.seed + 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(recipe.steps, 1))
    half = max(1, recipe.batch // 2)
    # bf16 keeps 8 bits of a weight: it cannot tell where in an 8-bit cell the weight lies.
    exact = max(recipe.bits, recipe.also_bits or 0) >= 8
    with reporter.task("training float and rounded network together", recipe.steps) as task:
        for step, (raw, labels) in zip(range(recipe.steps), data.endless(half, rng), strict=False):
            inputs = data.tensor(np.concatenate([data.trigger.on_raw(raw), raw]), device)
            with autocast(device, exact=exact):
                value = loss(step, inputs, torch.from_numpy(labels).to(device))
            reached = finite(value)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            schedule.step()
            if after is not None:
                after()
            task.advance(f"loss {reached:.3f}")


def measure_widths(
    model: nn.Module, test: PoisonedData, recipe: JointRecipe, device: torch.device
) -> tuple[tuple[str, Measured], ...]:
    """The nearest twin on every bit width but the recipe's first, for the report."""
    return tuple(
        (f"rounded to nearest, {width.bits} bits", measure(nearest_model(model, width), test, device))
        for width in recipe.widths[1:]
    )
