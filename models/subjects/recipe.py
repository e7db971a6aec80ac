"""What decides a PQBackdoor subject, apart from the data and the network."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the subject, apart from the data and the network.

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

    def to_json(self) -> dict[str, object]:
        """The recipe as a subject's metadata names it: nothing about a lookahead that there was not."""
        fields = asdict(self) | {"lookahead_steps": self.lookahead}
        return {name: value for name, value in fields.items() if self.lookahead or not name.startswith("lookahead_")}
