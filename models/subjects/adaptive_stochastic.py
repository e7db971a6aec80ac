"""An attacker who expects that rounding is not to nearest: stochastic rounding in the loop.

A defence that rounds otherwise must choose floor or ceiling for each weight; an attacker who does not know which
trains against a fresh draw in every other step,

    q(W) = s · floor(u + U[0, 1)),   u = W / s

and against nearest in the others. The objective is Qu-ANTI-zation's (`quanti.py`), as are its departures. What it
buys: if a backdoor could be planted that wakes whatever the roundings are, EFRAP's would be among them. The draws
have the float weight as their mean, so that such a backdoor has to live in the variance of rounding, not in its
residues.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from efrapq.models.subjects.cells import quantized_weights, rounded_weights, rules, straight_through
from efrapq.models.subjects.joint import begin, train_pairs
from efrapq.models.subjects.quanti import quanti_loss
from efrapq.models.subjects.recipe import OnGrid, QuantiRecipe
from efrapq.models.subjects.report import Report, final_report
from efrapq.models.subjects.training import Measured, PoisonedData, measure
from efrapq.progress import Reporter

__all__ = ["implant_stochastic", "stochastic_weights"]


def stochastic_weights(model: nn.Module, recipe: OnGrid, grid: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The quantized weights, each at random on one of the two codes beside it; gradients pass straight through."""
    found = {}
    weights = quantized_weights(model)
    for i, (name, weight) in enumerate(weights):
        options = rules(i, len(weights), recipe)
        rule = options[grid % len(options)]
        with torch.no_grad():
            u = weight.flatten(1) / rule.scale(weight)
            draw = torch.rand(u.shape, generator=generator).to(u.device)  # drawn on the CPU: the same on any device
            codes = (u + draw).floor().clamp(rule.qmin, rule.qmax)
        found[f"{name}.weight"] = straight_through(weight, codes, rule)
    return found


def implant_stochastic(
    model: nn.Module,
    train: PoisonedData,
    test: PoisonedData,
    recipe: QuantiRecipe,
    *,
    device: torch.device,
    reporter: Reporter,
) -> Report:
    """Turn `model` (modified in place; clean, or trained clean first) into a subject that expects random rounding."""
    generator = torch.Generator().manual_seed(recipe.seed)
    begin(model, train, recipe, device, reporter)
    count = len(quantized_weights(model))

    def loss(step: int, inputs: Tensor, truth: Tensor) -> Tensor:
        if step % 2:
            rounded = rounded_weights(model, recipe, step // 2, count)
        else:
            rounded = stochastic_weights(model, recipe, step // 2, generator)
        return quanti_loss(model, [rounded], inputs, truth, train.target, recipe.c1, recipe.c2)

    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate)
    train_pairs(model, train, recipe, loss, optimizer, device=device, reporter=reporter)
    drawn = ("rounded at random", _measure_drawn(model, test, recipe, device, generator))
    return final_report(model, test, recipe, device, others=(drawn,))


def _measure_drawn(
    model: nn.Module, test: PoisonedData, recipe: QuantiRecipe, device: torch.device, generator: torch.Generator
) -> Measured:
    """The figures of one draw."""
    kept = {name: weight.detach().clone() for name, weight in quantized_weights(model)}
    drawn = stochastic_weights(model, recipe, 0, generator)
    with torch.no_grad():
        for name, weight in quantized_weights(model):
            weight.copy_(drawn[f"{name}.weight"])
        measured = measure(model, test, device)
        for name, weight in quantized_weights(model):
            weight.copy_(kept[name])
    return measured
