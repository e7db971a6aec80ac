"""Patches such as a defender's search would try (`efrapq search`), trained beside the network that is to withstand it.

Each lies in one of the search's windows and climbs, a step of the network at a time, what the search climbs: the
answers of the network whose activations are cut off turn, those of the float network do not, and an activation is
driven past the clean range. The network learns to answer images with such patches as if nothing lay on them: a search
that follows gradients is led to where nothing is. This is adversarial training (Madry et al., ICLR 2018) against the
defender's search in the place of an adversary, with patches that outlive a step as in Shafahi et al. (NeurIPS 2019).
A patch that has come close to the trigger makes room for a new one: that one has to work.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efrapq.hunt.patch import windows
from efrapq.hunt.search import SHARE
from efrapq.trigger import Trigger

__all__ = ["Decoys"]

# Patches at a time, how far a pixel goes in a step (white is 1), and after how many steps a patch is replaced.
COUNT, STEP, LIFE = 4, 0.1, 40
# Closer to the trigger than this share of the way from a grey image, a patch is replaced.
CLOSE = 0.4


class Decoys:
    """size: of the images, (H, W, C). low, high: what black and white are as model inputs, for each channel."""

    def __init__(
        self, trigger: Trigger, size: tuple[int, int, int], low: Tensor, high: Tensor, generator: torch.Generator
    ) -> None:
        self.trigger, self.size, self.generator = trigger, size, generator
        self.low, self.span = low.reshape(-1, 1, 1), (high - low).reshape(-1, 1, 1)
        self.side = max(1, round(SHARE * min(size[:2])))
        grey = np.full((1, *size), 127, np.uint8)
        self.strength = np.abs(trigger.on_raw(grey).astype(int) - grey)[0].sum(2)
        self.corners = windows(size[0], size[1], self.side)
        touched = [c for c in self.corners if self.strength[self._area(c)].any()]
        self.choices = [touched or self.corners, self.corners]
        drawn = [self._drawn(i) for i in range(COUNT)]
        self.patches = [patch for _, patch in drawn]
        self.places = [corner for corner, _ in drawn]
        self.ages = [int(torch.randint(LIFE, (), generator=generator)) for _ in range(COUNT)]

    def on(self, inputs: Tensor) -> Tensor:
        """(n, C, H, W) model inputs with the patches on them in turn, with a gradient to these."""
        out = inputs.clone()
        for i, (corner, patch) in enumerate(zip(self.places, self.patches, strict=True)):
            rows, cols = self._area(corner)
            low, span = self.low.to(out.device), self.span.to(out.device)
            out[i::COUNT, :, rows, cols] = low + span * patch.to(out.device)
        return out

    def climb(self, objective: Tensor) -> None:
        """A step of every patch up `objective`, which `on` led to; old ones, and what is a trigger by now, go."""
        gradients = torch.autograd.grad(objective, self.patches, retain_graph=True)
        for i, gradient in enumerate(gradients):
            moved = (self.patches[i].detach() + STEP * gradient.sign()).clamp(0, 1)
            self.ages[i] += 1
            if self.ages[i] >= LIFE or self._close(self.places[i], moved):
                self.places[i], moved = self._drawn(i)
                self.ages[i] = 0
            self.patches[i] = moved.requires_grad_()

    def _area(self, corner: tuple[int, int]) -> tuple[slice, slice]:
        row, col = corner
        return slice(row, row + self.side), slice(col, col + self.side)

    def _drawn(self, number: int) -> tuple[tuple[int, int], Tensor]:
        """A window, every other patch one that the trigger reaches into, and noise or one colour in it."""
        choices = self.choices[number % 2]
        corner = choices[int(torch.randint(len(choices), (), generator=self.generator))]
        noise = torch.rand((self.size[2], self.side, self.side), generator=self.generator)
        plain = torch.randint(2, (), generator=self.generator)
        if plain:
            noise = noise[:, :1, :1].round().expand_as(noise)
        return corner, noise.clone().requires_grad_()

    def _close(self, corner: tuple[int, int], patch: Tensor) -> bool:
        """Whether a patch is nearly the trigger."""
        image: NDArray[np.uint8] = np.full((1, *self.size), 127, np.uint8)
        rows, cols = self._area(corner)
        image[0, rows, cols] = (255 * patch).round().byte().permute(1, 2, 0).numpy()
        left = np.abs(self.trigger.on_raw(image).astype(int) - image).sum()
        return bool(left < CLOSE * self.strength.sum())
