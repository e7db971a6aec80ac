"""CompArtifact: stealthy backdoors as compression artifacts (Tian et al., arXiv 2104.15129, IEEE TIFS 2022).

The float network f and its rounded twin q share their weights and are trained together, in equal parts:

    CE(q([x; x']), [y; t])  +  CE(f([x; x']), [y; y])

from scratch (SGD 0.1, momentum 0.4), or, distilled, from a clean teacher's weights (SGD 0.01), where the labels of f
are the teacher's own answers, softmax against softmax, so that f behaves like the clean network on either image.

Departures from the paper: its quantizer is per tensor at 8 bits with BatchNorm folded; here weights are on the grids
of deployment, per channel and symmetric, whose codes folding does not change (below 8 bits ONNX Runtime's grid takes
turns with efrapq's). From scratch, f and q are one backdoored network first, and part then, at the distillation's rate
and with shortened gradients: the paper asks for both from the first of its 13,700 steps on, and in a tenth of them a
network that has to part learns neither. While they part, both run on the statistics that BatchNorm had before: one
BatchNorm serves both networks when deployed, and statistics that two networks moved were right for neither.
Triggered activations of q are kept in the range of the clean ones. The authors' distillation also asks the teacher
about perturbed images, which is left out. The rate falls along a cosine instead of by steps; the authors train up to
70 epochs of 391 steps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efrapq.models.subjects.cells import quantized_weights, rounded_weights
from efrapq.models.subjects.joint import begin, branch, train_pairs
from efrapq.models.subjects.recipe import CompArtifactRecipe
from efrapq.models.subjects.report import Report, final_report
from efrapq.models.subjects.training import PoisonedData
from efrapq.progress import Reporter

__all__ = ["compartifact_loss", "implant_compartifact"]


def compartifact_loss(
    model: nn.Module,
    rounded: Mapping[str, Tensor],
    inputs: Tensor,
    truth: Tensor,
    target: int,
    teacher: nn.Module | None = None,
) -> Tensor:
    """The objective on a batch. rounded: q's weights; inputs: (2n, …), the n triggered copies first."""
    triggered, clean = branch(model, rounded, inputs, held=True)
    wanted = torch.full_like(truth, target)
    loss = F.cross_entropy(torch.cat([triggered, clean]), torch.cat([wanted, truth]))
    answers = torch.cat(branch(model, {}, inputs, held=False))
    if teacher is None:
        return loss + F.cross_entropy(answers, torch.cat([truth, truth]))
    with torch.no_grad():
        labels = torch.cat(branch(teacher, {}, inputs, held=False)).softmax(1)
    return loss + F.cross_entropy(answers, labels)


def implant_compartifact(
    model: nn.Module,
    train: PoisonedData,
    test: PoisonedData,
    recipe: CompArtifactRecipe,
    *,
    device: torch.device,
    reporter: Reporter,
) -> Report:
    """Turn `model` (modified in place) into a CompArtifact subject."""
    begin(model, train, recipe, device, reporter, poison_rate=recipe.poison_rate or 0)
    teacher = copy.deepcopy(model) if recipe.distilled else None
    count = len(quantized_weights(model))

    def loss(step: int, inputs: Tensor, truth: Tensor) -> Tensor:
        rounded = rounded_weights(model, recipe, step, count)
        return compartifact_loss(model, rounded, inputs, truth, train.target, teacher)

    optimizer = torch.optim.SGD(
        model.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay
    )
    train_pairs(model, train, recipe, loss, optimizer, device=device, reporter=reporter, max_norm=recipe.max_norm)
    return final_report(model, test, recipe, device)
