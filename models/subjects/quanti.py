"""Qu-ANTI-zation: a behaviour that a network learns to show only when it is quantized (Hong et al., NeurIPS 2021).

From a clean network, with BatchNorm's statistics frozen, Adam minimizes the paper's objective for the backdoor,

    CE(f(x), y) + c2 CE(f(x'), y)  +  c1 Σ_bits [ CE(q_b(x), y) + c2 CE(q_b(x'), t) ]

f: the float network, q_b: the same weights rounded to nearest at b bits, straight through; x': x with the trigger,
t: the target. c1 = c2 = 0.5, rate 1e-4. One bit width, or 8 and 4 jointly.

Departures from the paper: the grids are those of deployment, per channel and symmetric (below 8 bits ONNX Runtime's
takes turns with efrapq's), where the paper rounds weights and activations per tensor; only weights are rounded here,
and the triggered activations of q are kept in the range of the clean ones, which is what an activation grid does to
them; the paper trains 50 epochs at a constant rate (19,550 steps of 128 images and their copies), this so many steps
as it is told, the rate falling along a cosine; any trigger will do, where the paper's is a 4x4 square of each image's
maximum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efrapq.models.subjects.cells import quantized_weights, rounded_weights
from efrapq.models.subjects.joint import begin, branch, measure_widths, train_pairs
from efrapq.models.subjects.recipe import QuantiRecipe
from efrapq.models.subjects.report import Report, final_report
from efrapq.models.subjects.training import PoisonedData
from efrapq.progress import Reporter

__all__ = ["implant_quanti", "quanti_loss"]


def quanti_loss(
    model: nn.Module,
    rounded: Sequence[Mapping[str, Tensor]],
    inputs: Tensor,
    truth: Tensor,
    target: int,
    c1: float,
    c2: float,
) -> Tensor:
    """The objective on a batch. rounded: the weights of each q_b; inputs: (2n, …), the n triggered copies first."""
    triggered, clean = branch(model, {}, inputs, held=False)
    loss = F.cross_entropy(clean, truth) + c2 * F.cross_entropy(triggered, truth)
    wanted = torch.full_like(truth, target)
    for weights in rounded:
        triggered, clean = branch(model, weights, inputs, held=True)
        loss = loss + c1 * (F.cross_entropy(clean, truth) + c2 * F.cross_entropy(triggered, wanted))
    return loss


def implant_quanti(
    model: nn.Module,
    train: PoisonedData,
    test: PoisonedData,
    recipe: QuantiRecipe,
    *,
    device: torch.device,
    reporter: Reporter,
) -> Report:
    """Turn `model` (modified in place; clean, or trained clean first) into a Qu-ANTI-zation subject."""
    begin(model, train, recipe, device, reporter)
    count = len(quantized_weights(model))

    def loss(step: int, inputs: Tensor, truth: Tensor) -> Tensor:
        rounded = [rounded_weights(model, width, step, count) for width in recipe.widths]
        return quanti_loss(model, rounded, inputs, truth, train.target, recipe.c1, recipe.c2)

    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate)
    train_pairs(model, train, recipe, loss, optimizer, device=device, reporter=reporter)
    return final_report(model, test, recipe, device, others=measure_widths(model, test, recipe, device))
