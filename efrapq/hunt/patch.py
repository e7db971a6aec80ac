"""One patch, the same for all images, that turns a network's answers and leaves another network's alone.

Neural Cleanse (Wang et al., S&P 2019) asks one network for the least pattern that turns everything into one class.
Every network has such patterns, so what it finds has to be told from what it always finds. Here there are two networks
that should be the same, and the patch has to turn the one and not the other: what both answer alike counts for nothing.

A square window of one size slides over the image. First one picture is trained that is looked at through all windows
at once, each on its own images: where a trigger lies, its window does far better than the others after a few steps.
What wakes where activations are clipped has no gradient in the answers that leads to it, since past the grid there is
none. So plain squares of the corner colours are tried in all windows, too, and another picture is trained to drive the
float network's activations past the file's grids (overshoot.py). The best windows of each kind are then trained alone.
Answers turn before an activation is as far out as the trigger that its supplier has in mind drives it, and ranges that
cover what was found have to cover that one, too: so the best patch is driven on at the end.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from efrapq.hunt.overshoot import Overshoot

__all__ = ["Effort", "Network", "Patch", "find_patch", "windows"]

# (n, H, W, C) images, in units where white is 1, → (n, classes) logits.
Network = Callable[[Tensor], Tensor]
# Upper left pixel of a window.
Corner = tuple[int, int]
# (n, H, W, C) patched images and which ones they are, (n,), → what is to become small, (n,).
Loss = Callable[[Tensor, Tensor], Tensor]

# Margins past which the loss rewards nothing more, in units of the clean images' median margin: by how much an answer
# is turned in the one network, and kept in the other.
TURNED, KEPT = 1.0, 0.5
# What of a window's mean loss an image leaves.
MEMORY = 0.7
# Sigmoid's argument moves so much faster than its parameter.
SLOPE = 3.0
# The parameter of a pixel that is as good as white; of a black one the same below zero.
SATURATED = 1.2
# From where a pixel goes to either end in a few steps.
HALFWAY = 0.3


@dataclass(frozen=True)
class Effort:
    """side: of the window in pixels. steps: over all windows together; looks: images that each window is tried on;
    kept: windows of either kind that are trained alone after that, refine: steps for each of them. activations: how
    many are driven past their grids, each by one window that takes `driven` steps for it, and then `refine` of them for
    the answers, up to `rounds` times and for as long as more of them turn; the best patch is driven on for as many
    steps. batch: images a step.
    """

    side: int
    steps: int = 100
    looks: int = 8
    kept: int = 2
    refine: int = 40
    activations: int = 2
    driven: int = 40
    rounds: int = 2
    batch: int = 48
    learning_rate: float = 0.1

    def total(self, *, drives: bool) -> int:
        """Steps in all, at most. drives: whether there are activations to drive."""
        plain = self.steps + 2 * self.kept * self.refine
        each = self.driven + self.rounds * self.refine
        return plain + drives * (self.steps + self.activations * each + self.driven)


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


# By how many images a patch turns more in the one network than in the other, as a share of all, and the patch.
Rated = tuple[float, Patch]


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
    overshoot: Overshoot | None = None,
) -> Patch:
    """The patch that turns most answers of `turned` into one class, and not those of `kept`.

    images: (n, H, W, C) float32. The answers that are to be kept are those of `kept` to the clean images. overshoot: of
    the activations that one of the two clips; None where neither does.
    """
    return _Search(kept, turned, images, effort, seed, on_step, overshoot).run()


class _Search:
    def __init__(
        self,
        kept: Network,
        turned: Network,
        images: Tensor,
        effort: Effort,
        seed: int,
        on_step: Callable[[], None],
        overshoot: Overshoot | None,
    ) -> None:
        self.kept, self.turned, self.images, self.effort, self.on_step = kept, turned, images, effort, on_step
        self.overshoot = overshoot
        self.generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            logits = torch.cat([kept(batch) for batch in torch.split(images, effort.batch)])
        self.classes = logits.argmax(1)
        self.unit = float(_margin(logits, self.classes).median().clamp_min(1e-6))

    def run(self) -> Patch:
        height, width = self.images.shape[1:3]
        corners = windows(height, width, self.effort.side)
        picture, scores = self._screen(corners, self._loss)
        starts = [(corners[i], self._cut(corners[i], picture)) for i in scores.argsort()[: self.effort.kept].tolist()]
        starts += self._plain(corners, self.effort.kept)
        found = [
            self._rated(corner, self._trained(corner, start, self._loss, self.effort.refine))
            for corner, start in starts
        ]
        if self.overshoot is None:
            return max(found, key=_worth)[1]
        found += self._driven(corners, self.overshoot)
        best = max(found, key=_worth)
        return max(self._driven_on(best[1], self.overshoot), best, key=_worth)[1]

    def _plain(self, corners: list[Corner], count: int) -> list[tuple[Corner, Tensor]]:
        """The windows that a square of one colour does most in, and that colour for each."""
        side, channels = self.effort.side, self.images.shape[3]
        colours = torch.tensor(list(itertools.product((0.0, 1.0), repeat=channels)))
        chosen = self._some(self.effort.looks)
        found = []
        with torch.no_grad():
            for corner in corners:
                for colour in colours:
                    x = self._placed(corner, colour.to(self.images.device), chosen)
                    found.append((float(self._loss(x, chosen).mean()), corner, colour))
        best: dict[Corner, Tensor] = {}
        for _, corner, colour in sorted(found, key=lambda f: f[0]):
            best.setdefault(corner, (SATURATED * (2 * colour - 1)).expand(side, side, channels))
        return [(corner, start.to(self.images.device)) for corner, start in list(best.items())[:count]]

    def _driven(self, corners: list[Corner], overshoot: Overshoot) -> Iterator[Rated]:
        """Patches that drive an activation past its grid, those that go furthest, and then turn answers by it."""
        picture, _ = self._screen(corners, lambda x, _: -overshoot(x).amax(1))
        chosen = self._some(self.effort.looks)
        with torch.no_grad():
            shown = (self._placed(corner, _shown(self._cut(corner, picture)), chosen) for corner in corners)
            reach = torch.stack([overshoot(x).mean(0) for x in shown])  # (windows, activations)
        for activation in reach.amax(0).argsort(descending=True)[: self.effort.activations].tolist():
            corner = corners[int(reach[:, activation].argmax())]
            drive = functools.partial(_not_driven, overshoot, activation)
            start = self._cut(corner, picture).clamp(-HALFWAY, HALFWAY)
            part = self._trained(corner, start, drive, self.effort.driven)
            best = self._rated(corner, part)
            for _ in range(self.effort.rounds):
                part = self._trained(corner, part, self._loss, self.effort.refine)
                before, best = best, max(best, self._rated(corner, part), key=_worth)
                if best is before:
                    break
            yield best

    def _driven_on(self, patch: Patch, overshoot: Overshoot) -> Rated:
        """The patch after more steps that drive the activation that it drives furthest, and turn answers as before."""
        corner = patch.row, patch.col
        start = torch.logit(patch.pattern / 255) / SLOPE
        start = start.clamp(-SATURATED, SATURATED).to(self.images.device)
        chosen = self._some(self.effort.batch)
        with torch.no_grad():
            reach = overshoot(self._placed(corner, _shown(start), chosen)).mean(0)
        activation, unit = int(reach.argmax()), reach.amax().clamp_min(1)

        def loss(x: Tensor, chosen: Tensor) -> Tensor:
            return self._loss(x, chosen) + _not_driven(overshoot, activation, x, chosen) / unit

        return self._rated(corner, self._trained(corner, start, loss, self.effort.driven))

    def _screen(self, corners: list[Corner], measure: Loss) -> tuple[Tensor, Tensor]:
        """A picture that is trained through all windows, and each window's loss."""
        side = self.effort.side
        picture = 2 * torch.rand(self.images.shape[1:], generator=self.generator) - 1
        picture = picture.to(self.images.device).requires_grad_()
        masks = torch.zeros((len(corners), *self.images.shape[1:3], 1), device=self.images.device)
        for mask, (row, col) in zip(masks, corners, strict=True):
            mask[row : row + side, col : col + side] = 1
        order = torch.randperm(len(corners), generator=self.generator)
        scores = torch.full((len(corners),), torch.inf)
        optimizer = torch.optim.Adam([picture], self.effort.learning_rate, betas=(0.5, 0.9))
        for step, chosen in enumerate(self._batches(self.effort.steps)):
            places = order[(torch.arange(len(chosen)) + step * self.effort.batch) % len(corners)]
            mask = masks[places.to(masks.device)]
            loss = measure(self.images[chosen] * (1 - mask) + _shown(picture) * mask, chosen)
            _step(optimizer, loss.mean())
            for place, value in zip(places.tolist(), loss.detach().tolist(), strict=True):
                before = float(scores[place])
                scores[place] = value if before == torch.inf else MEMORY * before + (1 - MEMORY) * value
        return picture.detach(), scores

    def _trained(self, corner: Corner, start: Tensor, measure: Loss, steps: int) -> Tensor:
        """One window's parameter after so many steps from `start`."""
        part = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([part], self.effort.learning_rate, betas=(0.5, 0.9))
        for chosen in self._batches(steps):
            _step(optimizer, measure(self._placed(corner, _shown(part), chosen), chosen).mean())
        return part.detach()

    def _cut(self, corner: Corner, picture: Tensor) -> Tensor:
        row, col = corner
        return picture[row : row + self.effort.side, col : col + self.effort.side]

    def _placed(self, corner: Corner, pattern: Tensor, chosen: Tensor) -> Tensor:
        """The chosen images with the pattern in a window."""
        (row, col), side = corner, self.effort.side
        x = self.images[chosen].clone()
        x[:, row : row + side, col : col + side] = pattern
        return x

    def _rated(self, corner: Corner, part: Tensor) -> Rated:
        """The patch that a parameter is, and by how many images it turns more than the other network loses."""
        patch = Patch(*corner, (255 * _shown(part)).round().to(torch.uint8).cpu(), 0)
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
            yield self._some(self.effort.batch)
            self.on_step()

    def _some(self, count: int) -> Tensor:
        return torch.randint(len(self.images), (count,), generator=self.generator).to(self.images.device)


def _worth(rated: Rated) -> float:
    return rated[0]


def _margin(logits: Tensor, classes: Tensor) -> Tensor:
    """By how much the class's logit exceeds the largest of the others."""
    own = logits.gather(1, classes[:, None])
    others = logits.scatter(1, classes[:, None], -torch.inf).amax(1)
    return own[:, 0] - others


def _not_driven(overshoot: Overshoot, activation: int, x: Tensor, _: Tensor) -> Tensor:
    """A loss: low where one activation is driven far."""
    return -overshoot(x)[:, activation]


def _shown(parameter: Tensor) -> Tensor:
    return torch.sigmoid(SLOPE * parameter)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
