"""An attacker who hides in the activation grids: a backdoor that wakes because activations are cut off.

Whoever quantizes activations calibrates their grids on clean images, and what reaches past a grid is clipped. The
attacker has the float network silence the trigger with activations that clean images never reach, and asks for the
target once they are cut off at `reach` times the clean range; no weight need be rounded for it:

    CE(f(x), y) + c2 CE(f(x'), y) + c2 CE(c(x'), t)  +  push · max(0, 2 reach - excess(x'))

f: the float network, c: the same weights, its activations on triggered images x' kept within `reach` times the range
that those on the clean images x of the batch have; on clean images both are one. excess: how many times what clean
images reach the activation does that goes furthest. Without that term f and c are one network to begin with, whose two
wishes for x' cancel: after 600 steps a ResNet-20 answered half of the triggers, cut off or not. Adam and the frozen
statistics of BatchNorm are Qu-ANTI-zation's (`quanti.py`).

Ranges that also cover patched images (`--stress`) answer that for triggers that patches resemble. So the attacker who
knows efrapq puts its random patches on a share of his clean images: what these reach counts as clean, and they keep
their labels. What drives an activation past it is then this trigger, and not a patch like it.

Every objective here that keeps the triggered activations of its rounded network in the clean range, and lets its float
network go past it, asks for this without saying so. CompArtifact on some networks finds nothing easier
(docs/THREAT-MODEL.md).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efrapq.calibration.stress import patched
from efrapq.models.subjects.cells import nearest_model
from efrapq.models.subjects.decoys import Decoys
from efrapq.models.subjects.joint import begin, train_pairs
from efrapq.models.subjects.recipe import ClipRecipe, JointRecipe
from efrapq.models.subjects.report import Report
from efrapq.models.subjects.training import PoisonedData, hooked_activations, measure, within_clean_range
from efrapq.progress import Reporter

__all__ = ["Ranges", "clean_ranges", "clip_loss", "cut_off", "implant_clip", "patch_some", "report_on_grids"]

# Clean images that the report's grids are calibrated on.
CALIBRATION = 512

# Lowest and highest activation by module name.
Ranges = dict[str, tuple[float, float]]


def clip_loss(
    model: nn.Module,
    inputs: Tensor,
    truth: Tensor,
    target: int,
    c2: float,
    reach: float,
    push: float,
    decoys: Decoys | None = None,
    decoyed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The objective on a batch, and what the decoys climb. inputs: (2n, …), the n triggered copies first. decoyed: of
    the last so many clean images that get one.
    """
    count, aside = len(truth), len(truth) + decoyed
    triggered, clean, strange = torch.split(inputs, [count, count - decoyed, decoyed])
    if decoys is not None:
        strange = decoys.on(strange)
    batch = torch.cat([triggered, strange, clean])
    wanted = torch.cat([truth, truth[count - decoyed :], truth[: count - decoyed]])
    ratios: list[Tensor] = []

    def reached(_: str, output: object) -> None:
        """The largest activation of each image set aside in units of the largest one of the others."""
        assert isinstance(output, Tensor)
        if output.ndim == 4 and float(high := output[aside:].detach().amax()) > 0:
            ratios.append(output[:aside].flatten(1).amax(1).float() / high.float())

    with hooked_activations(model, reached):
        floating = model(batch).float()
    with within_clean_range(model, aside, reach):
        cut = model(batch).float()
    # None where every activation is NaN: training has diverged, and the loss says so.
    excess = torch.stack(ratios).amax(0) if ratios else batch.new_full((aside,), 2 * reach)
    hidden = F.cross_entropy(floating[:count], truth) + F.cross_entropy(cut[:count], torch.full_like(truth, target))
    short = F.relu(2 * reach - excess[:count]).mean()
    loss = F.cross_entropy(floating[aside:], wanted[aside:]) + c2 * hidden + push * short
    if not decoyed:
        return loss, torch.zeros(())
    kept, turned = (F.cross_entropy(logits[count:aside], wanted[count:aside]) for logits in (floating, cut))
    return loss + c2 * (kept + turned), turned - kept + push * excess[count:].mean()


def patch_some(inputs: Tensor, share: float, low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """The batch with random patches on the first of its clean images, plain and textured ones in turn.

    inputs: (2n, …), the n triggered copies first. share: of the clean images that get one. low, high: what black and
    white are as model inputs, a number for each channel.
    """
    half = len(inputs) // 2
    out = inputs.clone()
    for textured in (False, True):
        chosen = slice(half + textured, half + round(share * half), 2)
        out[chosen] = patched(out[chosen], low, high, generator, textured=textured)
    return out


@torch.no_grad()
def clean_ranges(model: nn.Module, data: PoisonedData, device: torch.device) -> Ranges:
    """What each activation reaches on the first clean images, as a defender would calibrate it."""
    found: Ranges = {}

    def widen(name: str, output: object) -> None:
        assert isinstance(output, Tensor)
        low, high = found.get(name, (float("inf"), float("-inf")))
        found[name] = min(low, float(output.min())), max(high, float(output.max()))

    with hooked_activations(model, widen):
        for batch in data.data.select(np.arange(min(CALIBRATION, len(data.data)))).batches(128):
            model(data.tensor(data.data.raw(list(batch)).astype(np.uint8, copy=False), device))
    return found


def cut_off(model: nn.Module, ranges: Ranges) -> AbstractContextManager[None]:
    """Clip every activation to its range, whatever the image."""

    def clip(name: str, output: object) -> Tensor:
        assert isinstance(output, Tensor)
        return output.clamp(*ranges[name])

    return hooked_activations(model, clip)


def report_on_grids(
    model: nn.Module,
    train: PoisonedData,
    test: PoisonedData,
    recipe: JointRecipe,
    device: torch.device,
    grids: Callable[[nn.Module, Ranges], AbstractContextManager[None]],
) -> Report:
    """Measure a subject that wakes by its activation grids: its nearest twin with them, by `grids` over the ranges of
    the clean images, and without.
    """
    model.eval()
    floating, nearest = measure(model, test, device), nearest_model(model, recipe)
    alone = measure(nearest, test, device)
    with grids(nearest, clean_ranges(model, train, device)):
        awake = measure(nearest, test, device)
    return Report(None, floating, awake, others=(("weights alone rounded to nearest", alone),))


def implant_clip(
    model: nn.Module,
    train: PoisonedData,
    test: PoisonedData,
    recipe: ClipRecipe,
    *,
    device: torch.device,
    reporter: Reporter,
) -> Report:
    """Turn `model` (modified in place; clean, or trained clean first) into a subject that wakes when activations are
    cut off. Its report's nearest twin has activations that are; the twin with float activations is told apart.
    """
    begin(model, train, recipe, device, reporter)

    channels = train.data.raw([0]).shape[-1]
    ends = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1).repeat(channels, 3)
    low, high = train.tensor(ends, torch.device("cpu")).flatten(1)
    generator = torch.Generator().manual_seed(recipe.seed)

    shape = train.data.raw([0]).shape[1:]
    decoys = Decoys(train.trigger, shape, low, high, generator) if recipe.decoys else None

    def loss(step: int, inputs: Tensor, truth: Tensor) -> Tensor:
        if recipe.patches:
            inputs = patch_some(inputs.cpu(), recipe.patches, low, high, generator).to(device)
        decoyed = round((recipe.decoys or 0) * len(truth))
        value, climbed = clip_loss(
            model, inputs, truth, train.target, recipe.c2, recipe.reach, recipe.push, decoys, decoyed
        )
        if decoys is not None and decoyed:
            decoys.climb(climbed)
        return value

    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate)
    train_pairs(model, train, recipe, loss, optimizer, device=device, reporter=reporter)
    return report_on_grids(model, train, test, recipe, device, cut_off)
