"""An attacker who hides in the scales: cells made wide by weights that do nothing.

A defence that chooses between floor and ceiling can come no nearer to the float network than the cells are wide, and
the cells of an output channel are as wide as its largest weight says. The attacker therefore switches one channel of
every BatchNorm off (its output is 0 for any image), and gives each weight that reads such a dead channel the size of
`widen` times the largest other one of its row. The float network computes what it did, to the bit; its cells are
`widen` times wider. Then Qu-ANTI-zation (`quanti.py`) with all its departures trains backdoor and accuracy into the
wide cells: any rounding is coarser, and what the defence cannot put back, the backdoor may keep.

Of the two places outside the residues where a backdoor could hide this is the scales; `adaptive_clip.py` has the other
one, the activation grids. Grouped convolutions see no dead channel and stay as they are, as does the first layer.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from efrapq.errors import UsageError
from efrapq.models.subjects.cells import quantized_weights, rounded_weights
from efrapq.models.subjects.joint import begin, train_pairs
from efrapq.models.subjects.quanti import quanti_loss
from efrapq.models.subjects.recipe import ScaleRecipe
from efrapq.models.subjects.report import Report, final_report
from efrapq.models.subjects.training import PoisonedData
from efrapq.progress import Reporter

__all__ = ["dead_inputs", "implant_scale", "switch_off", "widen_cells"]

# Images over which a channel must be silent to count as dead; that BatchNorm is off is why it is.
PROBES = 64


@torch.no_grad()
def switch_off(model: nn.Module) -> None:
    """Make the first channel of every BatchNorm 0 for any input."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            module.weight[0] = 0
            module.bias[0] = 0


@torch.no_grad()
def dead_inputs(model: nn.Module, inputs: Tensor) -> dict[str, int]:
    """The first input channel that is 0 throughout, of every layer that has one, by layer name."""
    silent: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str) -> None:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            silent[name] = given[0].transpose(0, 1).flatten(1).abs().amax(1) == 0

        hooks.append(model.get_submodule(name).register_forward_pre_hook(hook))

    for name, _ in quantized_weights(model):
        if getattr(model.get_submodule(name), "groups", 1) == 1:
            watch(name)
    try:
        model.eval()(inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: int(channels.int().argmax()) for name, channels in silent.items() if bool(channels.any())}


@torch.no_grad()
def widen_cells(model: nn.Module, dead: dict[str, int], factor: float) -> None:
    """Give the weights on dead channels `factor` times the size of the largest other one of their rows."""
    for name, weight in quantized_weights(model):
        if name in dead:
            weight[:, dead[name]] = 0
            rows = weight.view(len(weight), weight.shape[1], -1)
            rows[:, dead[name], rows.shape[2] // 2] = factor * weight.flatten(1).abs().amax(1)


def implant_scale(
    model: nn.Module,
    train: PoisonedData,
    test: PoisonedData,
    recipe: ScaleRecipe,
    *,
    device: torch.device,
    reporter: Reporter,
) -> Report:
    """Turn `model` (modified in place; clean, or trained clean first) into a subject with wide cells."""
    begin(model, train, recipe, device, reporter)
    switch_off(model)
    probes = train.data.raw(range(min(PROBES, len(train.data)))).astype(np.uint8, copy=False)
    dead = dead_inputs(model, train.tensor(probes, device))
    if not dead:
        raise UsageError("--attack adaptive-scale needs a network with BatchNorm: there is no channel to switch off")
    count = len(quantized_weights(model))
    reporter.note(f"cells {recipe.widen:g} times wider in {len(dead)} of {count} layers")

    def restore() -> None:
        switch_off(model)
        widen_cells(model, dead, recipe.widen)

    def loss(step: int, inputs: Tensor, truth: Tensor) -> Tensor:
        rounded = rounded_weights(model, recipe, step, count)
        return quanti_loss(model, [rounded], inputs, truth, train.target, recipe.c1, recipe.c2)

    restore()
    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate)
    train_pairs(model, train, recipe, loss, optimizer, device=device, reporter=reporter, after=restore)
    return final_report(model, test, recipe, device)
