"""What the streaming pass is told, and what it says about each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from efrapq.rounding import Coordinate, Relaxed

if TYPE_CHECKING:
    from efrapq.graph.layers import Layer

__all__ = ["LayerReport", "PassSettings"]


@dataclass(frozen=True)
class PassSettings:
    """bits: weight bits, 2 to 8; edge_bits: of the first and the last layer. act_range: how activation ranges are
    chosen; scale: how weight scales are: minmax, mse or refit. rows: H is accumulated over at most rows·D rows.
    solver: settings of one, or None for rounding to nearest. memory: bytes of activations kept in memory, the rest
    goes to temporary files; None keeps all. block: inputs that share a scale, in matrices with a multiple of so many;
    0 for one scale per output channel. headroom: the factor by which minmax ranges are widened. stress: whether ranges
    of a network of images, but for output, are chosen for the calibration images with patches on them, too. mixed: 8
    bits for the activations that patches or triggers drive far, where others have fewer.
    """

    bits: int
    edge_bits: int = 8
    act_range: str = "minmax"
    scale: str = "minmax"
    rows: int = 32
    solver: Coordinate | Relaxed | None = field(default_factory=Coordinate)
    seed: int = 0
    device: str = "cpu"
    memory: int | None = None
    block: int = 0
    headroom: float = 1.0
    stress: bool = False
    mixed: bool = False

    def weight_bits(self, layers: Sequence[Layer]) -> dict[str, int]:
        """Of each layer, by its name; layers: all of a graph, in topological order."""
        edges = (layers[0].name, layers[-1].name)
        return {layer.name: self.edge_bits if layer.name in edges else self.bits for layer in layers}


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer. L_A before: of rounding to nearest on the same grid; after: of the solution.
    lambda_e: the error term's weight, given or found. block: inputs that share a scale, 0 for all of a channel.
    """

    name: str
    op_type: str
    bits: int
    shape: tuple[int, ...]
    scale_min: float
    scale_max: float
    flipped: float
    lambda_e: float
    loss_nearest: float
    loss: float
    rows: int
    seconds: float
    block: int = 0
