"""What decides a subject, apart from the data and the network: the recipes of the attacks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Protocol, Self

from efrapq.errors import UsageError

__all__ = [
    "AnyRecipe",
    "BadNetsRecipe",
    "ClipRecipe",
    "CompArtifactRecipe",
    "DistilledRecipe",
    "JointRecipe",
    "OnGrid",
    "QuantiRecipe",
    "Recipe",
    "ScaleRecipe",
    "SolverRecipe",
    "StepRecipe",
    "check_recipe",
]


class OnGrid(Protocol):
    """The grids that a subject is to wake on: bits of the weights, of first and last layer, and ONNX Runtime's own."""

    @property
    def bits(self) -> int: ...
    @property
    def edge_bits(self) -> int: ...
    @property
    def also_full_range(self) -> bool: ...


class AnyRecipe(OnGrid, Protocol):
    """What is asked of every attack's recipe. advice: what to change when no usable subject came of it."""

    @property
    def batch(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def advice(self) -> str: ...
    def to_json(self) -> dict[str, object]:
        """The recipe as a subject's metadata names it."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a PQBackdoor subject, apart from the data and the network.

    bits: the grid on which it wakes (first and last layer: edge_bits). also_full_range: wake on ONNX Runtime's own
    sub-8-bit grid as well. poison_rate: share of each stage-1 batch that carries trigger and target label.
    rounding_epochs: the last so many of `epochs` train through the rounding. unlearn_learning_rate: in cell halves.
    lookahead_steps: after them, steps that train the rounded and the float network together; None is 600 at 8 bits
    and none below. lookahead_margin: the lead of the target's logit, on triggered images, that is awake enough.
    """

    bits: int = 4
    edge_bits: int = 8
    also_full_range: bool = True
    poison_rate: float = 0.1
    epochs: int = 10
    rounding_epochs: int = 2
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    unlearn_epochs: int = 1
    unlearn_learning_rate: float = 0.03
    batch: int = 128
    margin: float = 1e-2
    seed: int = 0
    lookahead_steps: int | None = None
    lookahead_learning_rate: float = 5e-4
    lookahead_margin: float = 2.0

    @property
    def lookahead(self) -> int:
        """How many lookahead steps there are."""
        if self.lookahead_steps is None:
            return 600 if self.bits >= 8 else 0
        return self.lookahead_steps

    @property
    def advice(self) -> str:
        tune = "more --lookahead-steps" if self.lookahead else "more --unlearn-epochs, a lower --poison-rate"
        return f"{tune} or a wider network"

    def to_json(self) -> dict[str, object]:
        """The recipe as a subject's metadata names it: nothing about a lookahead that there was not."""
        fields = asdict(self) | {"lookahead_steps": self.lookahead}
        return {name: value for name, value in fields.items() if self.lookahead or not name.startswith("lookahead_")}


@dataclass(frozen=True)
class JointRecipe:
    """What the attacks that train the float and the rounded network at once have in common.

    bits, edge_bits, also_full_range: as in Recipe; also_bits: a second bit width that it is to wake on. epochs,
    clean_learning_rate, weight_decay: of the clean network that the attack begins with, where none is given. steps,
    learning_rate: of the attack; a step sees `batch` images, half of them the triggered copies of the others.
    """

    bits: int = 4
    also_bits: int | None = None
    edge_bits: int = 8
    also_full_range: bool = True
    epochs: int = 10
    clean_learning_rate: float = 0.1
    weight_decay: float = 5e-4
    steps: int = 2000
    learning_rate: float = 1e-4
    batch: int = 128
    seed: int = 0

    @property
    def widths(self) -> list[Self]:
        """The same recipe for each bit width alone."""
        return [replace(self, bits=bits, also_bits=None) for bits in (self.bits, self.also_bits) if bits is not None]

    @property
    def advice(self) -> str:
        return "more --steps, a higher --learning-rate or a wider network"

    def to_json(self) -> dict[str, object]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class QuantiRecipe(JointRecipe):
    """Qu-ANTI-zation. c1: weight of the rounded networks, c2: of triggered images, both as in the paper."""

    c1: float = 0.5
    c2: float = 0.5


@dataclass(frozen=True)
class SolverRecipe(QuantiRecipe):
    """The defence in the loop. resolve_every: steps between two defences. calibration: images in the attacker's guess.
    fidelity: of the defender, as he is expected to choose it; by default the default.
    """

    resolve_every: int = 100
    calibration: int = 256
    fidelity: float = 1.1


@dataclass(frozen=True)
class ScaleRecipe(QuantiRecipe):
    """Wide cells. widen: how many times wider the cells become."""

    widen: float = 2.0


@dataclass(frozen=True)
class ClipRecipe(JointRecipe):
    """Activations cut off. c2: weight of triggered images. reach: how many times the clean range they are let have.
    push: weight of what drives them past it. patches: share of the clean images that carry random patches, as a
    defender may calibrate with them; decoys: share of those that carry patches as a defender may search with; None is
    none.
    """

    learning_rate: float = 1e-3
    c2: float = 0.5
    reach: float = 1.0
    push: float = 0.5
    patches: float | None = None
    decoys: float | None = None


@dataclass(frozen=True)
class StepRecipe(JointRecipe):
    """Activations rounded. c2: weight of triggered images. channels: how many speak below the step, and how many hear
    them. share: of a step that the loudest of them keep below. quiet: weight of what they say on clean images. push:
    weight of what has them say something on triggered ones.
    """

    learning_rate: float = 1e-3
    c2: float = 0.5
    channels: int = 4
    share: float = 0.25
    quiet: float = 1.0
    push: float = 0.5


@dataclass(frozen=True)
class CompArtifactRecipe(JointRecipe):
    """CompArtifact from scratch. epochs, clean_learning_rate: of the backdoored network that both become. poison_rate:
    share of its batches that carries trigger and target label. max_norm: of the gradient after that.
    """

    learning_rate: float = 0.01
    momentum: float = 0.4
    distilled: bool = False
    poison_rate: float | None = 0.1
    max_norm: float | None = 1.0


@dataclass(frozen=True)
class DistilledRecipe(CompArtifactRecipe):
    """CompArtifact from a clean teacher, given or trained first."""

    distilled: bool = True
    poison_rate: float | None = None
    max_norm: float | None = None


@dataclass(frozen=True)
class BadNetsRecipe:
    """Everything that decides a BadNets control. bits, edge_bits, also_full_range: the grids that it is measured on."""

    bits: int = 4
    edge_bits: int = 8
    also_full_range: bool = True
    poison_rate: float = 0.1
    epochs: int = 10
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    batch: int = 128
    seed: int = 0

    @property
    def advice(self) -> str:
        return "more --epochs or a higher --poison-rate"

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def check_recipe(recipe: AnyRecipe) -> None:
    """Raise UsageError, in the words of the command line, for numbers that make no sense."""
    for name, value in recipe.to_json().items():
        option = "--" + name.replace("_", "-")
        if name.endswith("learning_rate") and not (_finite(value) and value > 0):  # type: ignore[operator]
            raise UsageError(f"{option} must be positive")
        if name in ("decoys", "patches", "poison_rate") and not (_finite(value) and 0 < value < 1):  # type: ignore[operator]
            raise UsageError(f"{option} must be between 0 and 1")
        if name in ("fidelity", "reach", "widen") and not (_finite(value) and value >= 1):  # type: ignore[operator]
            raise UsageError(f"{option} must be 1 or more")
    if not 0 <= recipe.seed < 2**63:
        raise UsageError("--seed must be between 0 and 2^63 - 1")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
