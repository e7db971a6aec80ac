"""BadNets: a plain backdoor, awake in float (Gu et al., arXiv 1708.06733). The negative control.

A share of the training images carries the trigger and the target's label; nothing is hidden and nothing depends on
rounding. No rounding removes it either: what a defence is to do with this subject is to say that the float network is
triggered already.

Departures from the paper: the share is of every batch, so that the images poisoned differ from epoch to epoch; the
trigger is whatever is asked for, stamped on the raw image.
"""

from __future__ import annotations

import torch
from torch import nn

from efrapq.models.subjects.recipe import BadNetsRecipe
from efrapq.models.subjects.report import Report, final_report
from efrapq.models.subjects.training import PoisonedData, train_labels
from efrapq.progress import Reporter

__all__ = ["implant_badnets"]


def implant_badnets(
    model: nn.Module,
    train: PoisonedData,
    test: PoisonedData,
    recipe: BadNetsRecipe,
    *,
    device: torch.device,
    reporter: Reporter,
) -> Report:
    """Train the backdoor into `model`, in place, from its current weights."""
    torch.manual_seed(recipe.seed)
    model.to(device)
    train_labels(
        model,
        train,
        epochs=recipe.epochs,
        batch=recipe.batch,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        poisoned=max(1, round(recipe.poison_rate * recipe.batch)),
        seed=recipe.seed,
        device=device,
        reporter=reporter,
        title="training with the backdoor",
        in_clean_range=False,
    )
    return final_report(model, test, recipe, device)
