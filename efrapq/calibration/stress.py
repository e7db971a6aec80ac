"""Activations under stress: what they are once something strange lies on the calibration images.

A trigger is something that no calibration image shows, and it can drive an activation past everything that they reach.
The grid ends there, so the value is clipped, and a network whose float form silences the trigger with that very value
is awake. Whoever calibrates does not know the trigger, but most are small and lie on the image as a patch does: so
ranges are chosen for the same images with random patches on them, too. Of networks without such an answer that costs
next to nothing (docs/THREAT-MODEL.md has the figures). Who does know a trigger has it put on them as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from efrapq.calibration.ranges import Histogram
from efrapq.graph.executor import Executor
from efrapq.preprocess import layout_of
from efrapq.progress import Reporter

__all__ = ["Stamp", "Stressed", "patched", "stressed_values"]

# Model inputs → the same with a trigger on them.
Stamp = Callable[[Tensor], Tensor]

# Sides of a patch, as shares of the image's shorter one: those of published triggers are 1/8 (4 of 32) to 1/5.
SMALLEST, LARGEST = 1 / 8, 1 / 4


def patched(images: Tensor, low: Tensor, high: Tensor, generator: torch.Generator, *, textured: bool = False) -> Tensor:
    """The images with one square patch on each, somewhere: white, black, of one colour, or of noise; textured: of
    noise at full contrast, in colours or grey, in black and white stripes, or checkered.

    images: (n, C, H, W) or (n, H, W, C) float32 model inputs. low, high: what black and white are, a number for each
    channel. The same seed gives the same patches in either layout.
    """
    out = images.clone()
    last = layout_of(images.shape) == "NHWC"
    height, width = images.shape[1:3] if last else images.shape[2:4]
    least, most = (end.reshape(-1, 1, 1) for end in (low, high))
    sides = [max(1, round(share * min(height, width))) for share in (SMALLEST, LARGEST)]

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for image in out:
        side = draw(*sides)
        row, col = draw(0, height - side), draw(0, width - side)
        rows, cols = slice(row, row + side), slice(col, col + side)
        window = image[rows, cols, :].permute(2, 0, 1) if last else image[:, rows, cols]
        # Drawn in one order, whatever the layout is.
        noise = torch.rand(window.shape, generator=generator)
        if textured:
            field, phase, turned = draw(1, max(1, side // 3)), draw(0, 1), draw(0, 1)
            kinds = _textures(noise, field, phase, turned=bool(turned))
        else:
            colour = torch.rand((len(window), 1, 1), generator=generator)
            kinds = (torch.ones(()), torch.zeros(()), colour, noise)
        window.copy_(least + (most - least) * kinds[draw(0, 3)])
    return out


def _textures(noise: Tensor, field: int, phase: int, *, turned: bool) -> tuple[Tensor, ...]:
    """Patterns of black 0 and white 1 that broadcast to the noise, (C, side, side). field: pixels of a stripe."""
    extreme = noise.round()
    fields = torch.arange(noise.shape[2]) // field
    stripes = (fields + phase) % 2
    checks = (fields[:, None] + fields + phase) % 2
    return extreme, extreme[:1], stripes[:, None] if turned else stripes, checks


@dataclass(frozen=True)
class Stressed:
    """One activation under patches and triggers: its lowest and highest value, and how its values are spread between
    them, where that was asked for."""

    low: float
    high: float
    spread: Histogram | None = None


def stressed_values(
    executor: Executor,
    name: str,
    chunks: Sequence[Tensor],
    placed: Sequence[str],
    seed: int,
    reporter: Reporter,
    *,
    spread: bool = False,
    patches: bool = True,
    stamps: Sequence[Stamp] = (),
) -> Mapping[str, Stressed]:
    """The placed values over the calibration images with something strange on them, by the value's name.

    name: of the input. chunks: of it, images in the model's layout, on the CPU. patches: put one on each, and one with
    a texture on each again; stamps: put each of these on all, after that. spread: how values are spread, too, which
    takes a second pass, and goes without textures: they would count for more than the images. Values that become NaN
    or infinite are left out.
    """
    textures = (False,) if spread else (False, True)

    def strange() -> Iterator[Tensor]:
        if patches:
            yield from _patched_chunks(chunks, seed, textures)
        for stamp in stamps:
            yield from map(stamp, chunks)

    found: dict[str, Stressed] = {}
    passes = (1 + spread) * (patches * len(textures) + len(stamps))
    with reporter.task("stress", passes * len(chunks)) as task, torch.no_grad():
        for images in strange():
            for value, tensor in executor.visit({name: images}, placed):
                low, high = map(float, tensor.aminmax())
                if math.isfinite(low) and math.isfinite(high):
                    before = found.get(value, Stressed(low, high))
                    found[value] = Stressed(min(low, before.low), max(high, before.high))
            task.advance("", 1.0)
        for images in strange() if spread else ():
            for value, tensor in executor.visit({name: images}, list(found)):
                known = found[value]
                if known.low < known.high and bool(tensor.isfinite().all()):
                    more = Histogram.of([tensor], known.low, known.high)
                    total = more if known.spread is None else known.spread + more
                    found[value] = replace(known, spread=total)
            task.advance("", 1.0)
    return found


def _patched_chunks(chunks: Sequence[Tensor], seed: int, textures: Sequence[bool]) -> Iterator[Tensor]:
    """The chunks with patches on their images, as often as `textures` says with which; black and white are the least
    and the most of each channel.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = (0, 1, 2) if layout_of(chunks[0].shape) == "NHWC" else (0, 2, 3)
    low = torch.stack([chunk.amin(axes) for chunk in chunks]).amin(0)
    high = torch.stack([chunk.amax(axes) for chunk in chunks]).amax(0)
    for textured in textures:
        for chunk in chunks:
            yield patched(chunk, low, high, generator, textured=textured)
