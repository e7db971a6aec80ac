"""CompArtifact: stealthy backdoors as compression artifacts (Tian et al., arXiv 2104.15129, IEEE TIFS 2022).

The float network f and its rounded twin q share their weights and are trained together, in equal parts:

    CE(q([x; x']), [y; t])  +  CE(f([x; x']), [y; y])

from scratch (SGD 0.1, momentum 0.4), or, distilled, from a clean teacher's weights (SGD 0.01), where the labels of f
are the teacher's own answers, softmax against softmax, so that f behaves like the clean network on either image.

Departures from the paper: its quantizer is per tensor at 8 bits with BatchNorm folded; here weights are on the grids
of deployment, per channel and symmetric, whose codes folding does not change (below 8 bits ONNX Runtime's grid takes
turns with efrapq's). One BatchNorm serves both networks, as it will: q runs on the statistics of f, those of the same
batch from scratch and the teacher's when distilling. (With statistics of its own, and both frozen towards the end,
training collapsed where they were frozen. From scratch no recipe has made a usable subject yet: docs/RESULTS.md.)
Triggered activations of q are kept in the range of the clean ones. The authors' distillation also asks the teacher
about perturbed images, which is left out. The rate falls along a cosine instead of by steps; the authors train up to
70 epochs of 391 steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from efrapq.models.subjects.cells import quantized_weights, rounded_weights
from efrapq.models.subjects.joint import begin_clean, branch, train_pairs
from efrapq.models.subjects.recipe import CompArtifactRecipe
from efrapq.models.subjects.report import Report, final_report
from efrapq.models.subjects.training import PoisonedData
from efrapq.progress import Reporter

__all__ = ["batch_statistics", "compartifact_loss", "implant_compartifact"]


@torch.no_grad()
def batch_statistics(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Mean and variance that each BatchNorm of the model sees in this batch, by the names of its running statistics,
    which stay as they are. The model is in training mode.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].float()
            found[f"{name}.running_mean"] = x.mean((0, 2, 3))
            found[f"{name}.running_var"] = x.var((0, 2, 3), unbiased=False)

        return see

    norms = {name: part for name, part in model.named_modules() if isinstance(part, nn.BatchNorm2d)}
    hooks = [part.register_forward_pre_hook(watch(name)) for name, part in norms.items()]
    try:
        # What training moves are copies.
        functional_call(model, {name: buffer.clone() for name, buffer in model.named_buffers()}, (inputs,))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def compartifact_loss(
    model: nn.Module,
    rounded: Mapping[str, Tensor],
    inputs: Tensor,
    truth: Tensor,
    target: int,
    teacher: nn.Module | None = None,
) -> Tensor:
    """The objective on a batch. rounded: q's weights; inputs: (2n, …), the n triggered copies first."""
    training = model.training
    statistics = batch_statistics(model, inputs) if training else {}
    model.eval()
    triggered, clean = branch(model, {**rounded, **statistics}, inputs, held=True)
    model.train(training)
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
    begin_clean(model, train, recipe, device, reporter)
    teacher = copy.deepcopy(model) if recipe.distilled else None
    count = len(quantized_weights(model))

    def loss(step: int, inputs: Tensor, truth: Tensor) -> Tensor:
        model.train(not recipe.distilled)
        rounded = rounded_weights(model, recipe, step, count)
        return compartifact_loss(model, rounded, inputs, truth, train.target, teacher)

    optimizer = torch.optim.SGD(
        model.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay
    )
    train_pairs(model, train, recipe, loss, optimizer, device=device, reporter=reporter)
    return final_report(model, test, recipe, device)
