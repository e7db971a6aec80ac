"""An attacker who runs the defence: EFRAP's own rounding in the loop.

Every so many steps the attacker defends the network of the moment, as his victim will, on a guess of the calibration
images (a fresh draw from his own training data), and learns which weights the solver rounds up and which down. In every
other step until the next defence the rounded network is the one with these roundings,

    q(W) = s · (floor(u) + h),   u = W / s,  h ∈ {0, 1}: the defender's choice

and in the others it is the nearest one. The objective is Qu-ANTI-zation's (`quanti.py`), as are its departures: the
backdoor is trained into the defender's codes while the float network stays clean. What the attacker knows: the
method, its default settings, the bit widths and the preprocessing. What he does not: which images the victim
calibrates on.

The solver runs on the exported network with BatchNorm folded; folding by a negative factor negates a channel's codes,
which is undone here.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from efrapq.models.subjects.cells import GridRule, quantized_weights, rounded_weights, rules, straight_through
from efrapq.models.subjects.joint import begin, train_pairs
from efrapq.models.subjects.quanti import quanti_loss
from efrapq.models.subjects.recipe import OnGrid, SolverRecipe
from efrapq.models.subjects.report import Report, final_report
from efrapq.models.subjects.training import Measured, PoisonedData, measure
from efrapq.pipeline import defend
from efrapq.progress import Reporter

__all__ = ["defended_choices", "implant_solver", "solved_weights"]


def defended_choices(
    model: nn.Module, data: PoisonedData, recipe: SolverRecipe, draw: int, device: torch.device
) -> dict[str, Tensor]:
    """The defender's h of every quantized weight, by layer: (O, D) floats, 0 or 1, and -1 where folding has put a
    weight that lies on a grid point just below it.

    draw: which guess of the calibration images.
    """
    made = defend(
        model,
        None,
        bits=recipe.bits,
        edge_bits=recipe.edge_bits,
        calib=data.data.subset(recipe.calibration, recipe.seed + draw),
        calib_size=recipe.calibration,
        preprocess=data.preprocess,
        fidelity=recipe.fidelity,
        device=str(device),
    )
    found = {}
    weights = quantized_weights(model)
    for i, (name, weight) in enumerate(weights):
        codes = torch.from_numpy(made.quantized.weights[name].codes).to(weight).flatten(1)
        u = _position(weight, rules(i, len(weights), recipe)[0])
        # No code is a whole step away from its weight, so that the codes of a negated channel disagree in sign.
        sign = torch.where((codes * u).sum(1, keepdim=True) < 0, -1.0, 1.0)
        found[name] = (codes * sign - u.floor()).clamp(-1, 1)
    return found


def solved_weights(model: nn.Module, choices: dict[str, Tensor], recipe: OnGrid) -> dict[str, Tensor]:
    """The quantized weights rounded by these choices, by parameter name; gradients pass straight through."""
    found = {}
    weights = quantized_weights(model)
    for i, (name, weight) in enumerate(weights):
        rule = rules(i, len(weights), recipe)[0]
        codes = (_position(weight, rule).floor() + choices[name]).clamp(rule.qmin, rule.qmax)
        found[f"{name}.weight"] = straight_through(weight, codes, rule)
    return found


def implant_solver(
    model: nn.Module,
    train: PoisonedData,
    test: PoisonedData,
    recipe: SolverRecipe,
    *,
    device: torch.device,
    reporter: Reporter,
) -> Report:
    """Turn `model` (modified in place; clean, or trained clean first) into a subject trained against the defence."""
    begin(model, train, recipe, device, reporter)
    count = len(quantized_weights(model))
    choices: dict[str, Tensor] = {}

    def resolve(draw: int) -> None:
        with torch.autocast(device.type, enabled=False):
            solved = defended_choices(model, train, recipe, draw, device)
        if choices:
            changed = sum(float((solved[name] != old).sum()) for name, old in choices.items())
            share = 100 * changed / sum(old.numel() for old in choices.values())
            reporter.note(f"defence {draw}: {share:.1f} % of the roundings are other ones than before")
        choices.update(solved)

    def loss(step: int, inputs: Tensor, truth: Tensor) -> Tensor:
        if step % recipe.resolve_every == 0:
            resolve(1 + step // recipe.resolve_every)
        if step % 2:
            rounded = rounded_weights(model, recipe, step // 2, count)
        else:
            rounded = solved_weights(model, choices, recipe)
        return quanti_loss(model, [rounded], inputs, truth, train.target, recipe.c1, recipe.c2)

    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate)
    train_pairs(model, train, recipe, loss, optimizer, device=device, reporter=reporter)
    return final_report(model, test, recipe, device, others=_expected(model, train, test, recipe, device))


def _expected(
    model: nn.Module, train: PoisonedData, test: PoisonedData, recipe: SolverRecipe, device: torch.device
) -> tuple[tuple[str, Measured], ...]:
    """What the attacker expects of his victim: the figures under one more defence of the finished subject."""
    twin = copy.deepcopy(model)
    solved = solved_weights(model, defended_choices(model, train, recipe, 0, device), recipe)
    with torch.no_grad():
        for name, weight in quantized_weights(twin):
            weight.copy_(solved[f"{name}.weight"])
    return (("rounded by the attacker's own defence", measure(twin, test, device)),)


def _position(weight: Tensor, rule: GridRule) -> Tensor:
    """u = W / s, (O, D)."""
    weight = weight.detach()
    return weight.flatten(1) / rule.scale(weight)
