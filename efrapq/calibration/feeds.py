"""One chunk of calibration inputs, by the names of the model's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Feeds"]


@dataclass(frozen=True)
class Feeds:
    """tensors: input name → what one run of the network takes, on the CPU. samples: how many are in it."""

    tensors: Mapping[str, Tensor]
    samples: int
