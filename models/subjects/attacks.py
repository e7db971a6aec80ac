"""The attacks by name: what `efrapq implant --attack` can make. Nothing here needs torch before an attack is run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from efrapq.errors import UsageError
from efrapq.models.subjects.recipe import (
    AnyRecipe,
    BadNetsRecipe,
    ClipRecipe,
    CompArtifactRecipe,
    DistilledRecipe,
    QuantiRecipe,
    Recipe,
    ScaleRecipe,
    SolverRecipe,
    StepRecipe,
)

if TYPE_CHECKING:
    from efrapq.models.subjects.report import Report

__all__ = ["Attack", "attack_named", "attack_names"]

JOINT = frozenset({"bits", "edge_bits", "seed", "epochs", "steps", "learning_rate"})


@dataclass(frozen=True)
class Attack:
    """One attack. entry: its function, module:name. recipe: the class of its recipes. options: the fields of a recipe
    that a user may set. widths: the choices of --bits. asleep: whether the float model is to be clean. start: whether
    it can begin with given weights.
    """

    name: str
    entry: str
    recipe: Callable[..., AnyRecipe]
    options: frozenset[str] = JOINT
    widths: tuple[str, ...] = ("4", "8")
    asleep: bool = True
    start: bool = True

    def implant(self, *arguments: Any, **named: Any) -> Report:
        """Call the attack: (model, train, test, recipe, *, device, reporter) → what it measured."""
        module, _, function = self.entry.partition(":")
        made: Report = getattr(importlib.import_module(f"efrapq.models.subjects.{module}"), function)(
            *arguments, **named
        )
        return made

    def make_recipe(self, given: dict[str, object], *, started: bool) -> AnyRecipe:
        """The recipe with these fields, of the command line, and the attack's own values for the others.

        started: whether training begins with given weights. Raises UsageError for fields that the attack has not.
        """
        if started and not self.start:
            raise UsageError(f"--attack {self.name} trains from scratch and takes no --start")
        fields = dict(given)
        bits = str(fields.pop("bits", "4"))
        if bits not in self.widths:
            raise UsageError(f"--attack {self.name} takes --bits {' or '.join(self.widths)}, not {bits}")
        first, *others = sorted(int(part) for part in bits.split(","))
        fields |= {"bits": first} | ({"also_bits": others[0]} if others else {})
        for name in given:
            if name not in self.options:
                takes = ", ".join(sorted(_option(known) for known in self.options))
                raise UsageError(f"--attack {self.name} has no {_option(name)}; it takes {takes}")
        recipe = self.recipe(**fields)
        if started and "epochs" not in fields and self._first_epochs_are_done(recipe):
            recipe = self.recipe(**fields, epochs=0)
        return recipe

    def _first_epochs_are_done(self, recipe: AnyRecipe) -> bool:
        """Whether the epochs only make a network that works, which given weights are already.

        PQBackdoor's lookahead plants the backdoor itself, and barely; its ordinary stage 1 is the backdoor's.
        """
        if isinstance(recipe, Recipe):
            return recipe.lookahead > 0
        return not isinstance(recipe, BadNetsRecipe)


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def _attacks() -> list[Attack]:
    plain = frozenset({"bits", "edge_bits", "seed", "epochs", "learning_rate", "poison_rate"})
    return [
        Attack(
            "pqbackdoor",
            "pqbackdoor:implant",
            Recipe,
            plain | {"lookahead_steps", "unlearn_epochs", "unlearn_learning_rate"},
        ),
        Attack("qu-anti", "quanti:implant_quanti", QuantiRecipe, widths=("4", "8", "8,4")),
        Attack(
            "compartifact",
            "compartifact:implant_compartifact",
            CompArtifactRecipe,
            JOINT | {"poison_rate"},
            start=False,
        ),
        Attack("compartifact-distilled", "compartifact:implant_compartifact", DistilledRecipe),
        Attack("badnets", "badnets:implant_badnets", BadNetsRecipe, plain, asleep=False),
        Attack("adaptive-stochastic", "adaptive_stochastic:implant_stochastic", QuantiRecipe),
        Attack(
            "adaptive-solver", "adaptive_solver:implant_solver", SolverRecipe, JOINT | {"resolve_every", "fidelity"}
        ),
        Attack("adaptive-scale", "adaptive_scale:implant_scale", ScaleRecipe, JOINT | {"widen"}),
        Attack("adaptive-clip", "adaptive_clip:implant_clip", ClipRecipe, JOINT | {"reach", "patches", "decoys"}),
        Attack("adaptive-step", "adaptive_step:implant_step", StepRecipe, JOINT | {"channels"}),
    ]


def attack_names() -> list[str]:
    """Every name, the default's first."""
    return [attack.name for attack in _attacks()]


def attack_named(name: str) -> Attack:
    """The attack of that name; UsageError if there is none."""
    for attack in _attacks():
        if attack.name == name:
            return attack
    raise UsageError(f"unknown attack '{name}'; known: {', '.join(attack_names())}")
