"""One patch, the same for all images, that turns a network's answers and leaves another network's alone.

Neural Cleanse (Wang et al., S&P 2019) asks one network for the least pattern that turns everything into one class.
Every network has such patterns, so what it finds has to be told from what it always finds. Here there are two networks
that should be the same, and the patch has to turn the one and not the other: what both answer alike counts for nothing.

A square window of one size slides over the image. First one picture is trained that is looked at through all windows
at once, each on its own images: where a trigger lies, its window does far better than the others after a few steps.
What wakes where activations are clipped has no gradient that leads to it, since past the grid there is none: so plain
squares of the corner colours are tried in all windows, too. The best windows of either kind are then trained alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Effort", "Patch", "find_patch", "windows"]

# (n, H, W, C) images, in units where white is 1, → (n, classes) logits.
Network = Callable[[Tensor], Tensor]

# Margins past which the loss rewards nothing more, in units of the clean images' median margin: by how much an answer
# is turned in the one network, and kept in the other.
TURNED, KEPT = 1.0, 0.5
# What of a window's mean loss an image leaves.
MEMORY = 0.7
# Sigmoid's argument moves so much faster than its parameter.
SLOPE = 3.0
# The parameter of a pixel that is as good as white; of a black one the same below zero.
SATURATED = 1.2


@dataclass(frozen=True)
class Effort:
    """side: of the window in pixels. steps: over all windows together; looks: images that each plain square is tried
    on; kept: windows trained alone after that, half of them from a plain square; refine: steps for each of them.
    batch: images a step.
    """

    side: int
    steps: int = 100
    looks: int = 8
    kept: int = 4
    refine: int = 40
    batch: int = 48
    learning_rate: float = 0.1

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.steps + self.kept * self.refine


@dataclass(frozen=True)
class Patch:
    """pattern: (side, side, C) uint8, where its upper left corner is, and the class that most turned images go to."""

    row: int
    col: int
    pattern: Tensor
    target: int

    def stamp(self, images: Tensor) -> Tensor:
        """(n, H, W, C) float32 → copies with the patch on them."""
        out = images.clone()
        side = len(self.pattern)
        window = out[:, self.row : self.row + side, self.col : self.col + side]
        window.copy_(self.pattern.to(out.device, out.dtype) / 255)
        return out


def windows(height: int, width: int, side: int) -> list[tuple[int, int]]:
    """Upper left corners, half a side apart, the last ones at the edges."""
    step = max(1, side // 2)
    rows, cols = ([*range(0, size - side, step), size - side] for size in (height, width))
    return [(row, col) for row in rows for col in cols]


def find_patch(
    kept: Network,
    turned: Network,
    images: Tensor,
    effort: Effort,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> Patch:
    """The patch that turns most answers of `turned` into one class, and not those of `kept`.

    images: (n, H, W, C) float32. The answers that are to be kept are those of `kept` to the clean images.
    """
    return _Search(kept, turned, images, effort, seed, on_step).run()


class _Search:
    def __init__(
        self,
        kept: Network,
        turned: Network,
        images: Tensor,
        effort: Effort,
        seed: int,
        on_step: Callable[[], None],
    ) -> None:
        self.kept, self.turned, self.images, self.effort, self.on_step = kept, turned, images, effort, on_step
        self.generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            logits = torch.cat([kept(batch) for batch in torch.split(images, effort.batch)])
        self.classes = logits.argmax(1)
        self.unit = float(_margin(logits, self.classes).median().clamp_min(1e-6))

    def run(self) -> Patch:
        height, width, channels = self.images.shape[1:]
        corners = windows(height, width, self.effort.side)
        picture = 2 * torch.rand((height, width, channels), generator=self.generator) - 1
        picture, scores = self._screen(corners, picture.to(self.images.device))
        half = self.effort.kept // 2
        best = [(corners[i], picture) for i in scores.argsort()[: self.effort.kept - half].tolist()]
        best += self._plain(corners, half)
        return max((self._refine(row, col, start) for (row, col), start in best), key=lambda found: found[0])[1]

    def _plain(self, corners: list[tuple[int, int]], count: int) -> list[tuple[tuple[int, int], Tensor]]:
        """The windows that a square of one colour does most in, one colour each, and pictures of these colours."""
        side, channels = self.effort.side, self.images.shape[3]
        colours = torch.tensor(list(itertools.product((0.0, 1.0), repeat=channels)))
        chosen = torch.randint(len(self.images), (self.effort.looks,), generator=self.generator)
        chosen = chosen.to(self.images.device)
        found = []
        with torch.no_grad():
            for row, col in corners:
                for colour in colours:
                    x = self.images[chosen].clone()
                    x[:, row : row + side, col : col + side] = colour.to(x.device)
                    found.append((float(self._loss(x, chosen).mean()), (row, col), colour))
        best: dict[tuple[int, int], tuple[tuple[int, int], Tensor]] = {}
        for _, corner, colour in sorted(found, key=lambda f: f[0]):
            best.setdefault(corner, (corner, (SATURATED * (2 * colour - 1)).expand(self.images.shape[1:])))
        return [(corner, start.to(self.images.device)) for corner, start in list(best.values())[:count]]

    def _screen(self, corners: list[tuple[int, int]], picture: Tensor) -> tuple[Tensor, Tensor]:
        """The picture after training through all windows, and each window's loss."""
        side, picture = self.effort.side, picture.requires_grad_()
        masks = torch.zeros((len(corners), *self.images.shape[1:3], 1), device=self.images.device)
        for mask, (row, col) in zip(masks, corners, strict=True):
            mask[row : row + side, col : col + side] = 1
        order = torch.randperm(len(corners), generator=self.generator)
        scores = torch.full((len(corners),), torch.inf)
        optimizer = torch.optim.Adam([picture], self.effort.learning_rate, betas=(0.5, 0.9))
        for step, chosen in enumerate(self._batches(self.effort.steps)):
            places = order[(torch.arange(len(chosen)) + step * self.effort.batch) % len(corners)]
            mask = masks[places.to(masks.device)]
            loss = self._loss(self.images[chosen] * (1 - mask) + _shown(picture) * mask, chosen)
            _step(optimizer, loss.mean())
            for place, value in zip(places.tolist(), loss.detach().tolist(), strict=True):
                before = float(scores[place])
                scores[place] = value if before == torch.inf else MEMORY * before + (1 - MEMORY) * value
        return picture.detach(), scores

    def _refine(self, row: int, col: int, picture: Tensor) -> tuple[float, Patch]:
        """The best patch of one window, and by how many images it turns more than the other network loses."""
        side = self.effort.side
        part = picture[row : row + side, col : col + side].clone().requires_grad_()
        optimizer = torch.optim.Adam([part], self.effort.learning_rate, betas=(0.5, 0.9))
        for chosen in self._batches(self.effort.refine):
            x = self.images[chosen].clone()
            x[:, row : row + side, col : col + side] = _shown(part)
            _step(optimizer, self._loss(x, chosen).mean())
        return self._rated(Patch(row, col, (255 * _shown(part.detach())).round().to(torch.uint8).cpu(), 0))

    def _rated(self, patch: Patch) -> tuple[float, Patch]:
        """The patch with its target class, and what it is worth on all images."""
        with torch.no_grad():
            both = [
                torch.cat(
                    [network(patch.stamp(batch)).argmax(1) for batch in torch.split(self.images, self.effort.batch)]
                )
                for network in (self.kept, self.turned)
            ]
        worth, target = -torch.inf, 0
        for label in torch.unique(both[1]).tolist():
            others = self.classes != label
            if others.any():
                kept, turned = ((answers[others] == label).float().mean() for answers in both)
                if float(turned - kept) > worth:
                    worth, target = float(turned - kept), int(label)
        return worth, Patch(patch.row, patch.col, patch.pattern, target)

    def _loss(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Of each image: low where one network leaves the clean answer and the other one keeps it."""
        clean = self.classes[chosen]
        turned = (_margin(self.turned(x), clean) / self.unit).clamp_min(-TURNED)
        kept = (_margin(self.kept(x), clean) / self.unit).clamp_max(KEPT)
        return turned - kept

    def _batches(self, steps: int) -> Iterator[Tensor]:
        for _ in range(steps):
            chosen = torch.randint(len(self.images), (self.effort.batch,), generator=self.generator)
            yield chosen.to(self.images.device)
            self.on_step()


def _margin(logits: Tensor, classes: Tensor) -> Tensor:
    """By how much the class's logit exceeds the largest of the others."""
    own = logits.gather(1, classes[:, None])
    others = logits.scatter(1, classes[:, None], -torch.inf).amax(1)
    return own[:, 0] - others


def _shown(parameter: Tensor) -> Tensor:
    return torch.sigmoid(SLOPE * parameter)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
