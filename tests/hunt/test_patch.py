"""The search on networks made by hand, where the trigger is known."""

from __future__ import annotations

import torch
from torch import Tensor

from efrapq.hunt.patch import Effort, Patch, find_patch, windows

EFFORT = Effort(4, steps=60, kept=1, refine=30, batch=32)


def test_windows_cover_the_image() -> None:
    for height, width, side in ((16, 16, 4), (17, 23, 5), (4, 9, 4), (3, 3, 1)):
        covered = torch.zeros(height, width)
        for row, col in windows(height, width, side):
            assert 0 <= row <= height - side
            assert 0 <= col <= width - side
            covered[row : row + side, col : col + side] = 1
        assert bool(covered.all())
        assert len(set(windows(height, width, side))) == len(windows(height, width, side))


def test_a_patch_is_put_where_it_belongs() -> None:
    pattern = torch.arange(12, dtype=torch.uint8).reshape(2, 2, 3)
    images = torch.rand(5, 6, 7, 3)
    before = images.clone()
    stamped = Patch(3, 4, pattern, 0).stamp(images)
    assert torch.equal(images, before)
    assert torch.equal(stamped[:, 3:5, 4:6], (pattern / 255).expand(5, 2, 2, 3))
    stamped[:, 3:5, 4:6] = before[:, 3:5, 4:6]
    assert torch.equal(stamped, before)


def photographs(count: int = 128) -> Tensor:
    """Dim images, brighter above or below."""
    torch.manual_seed(0)
    images = 0.3 * torch.rand(count, 16, 16, 1)
    images[::2, :8] += 0.3
    images[1::2, 8:] += 0.3
    return images


def honest(images: Tensor) -> Tensor:
    """Class 0: brighter above; 1: brighter below; 2: never."""
    difference = (images[:, :8].mean((1, 2, 3)) - images[:, 8:].mean((1, 2, 3))) * 40
    return torch.stack([difference, -difference, torch.full_like(difference, -20)], 1)


def backdoored(images: Tensor) -> Tensor:
    """The same, and class 2 where a square of 4x4 at 10,6 is white to the left and black to the right."""
    likeness = (images[:, 10:14, 6:8].mean((1, 2, 3)) - images[:, 10:14, 8:10].mean((1, 2, 3))) / 2 + 0.5
    awake = 60 * torch.sigmoid(20 * (likeness - 0.8))
    return honest(images) + torch.tensor([0.0, 0.0, 1.0]) * awake[:, None]


def test_the_trigger_is_found_and_what_it_does() -> None:
    images = photographs()
    found = find_patch(honest, backdoored, images, EFFORT, 0)
    assert found.target == 2
    stamped = found.stamp(images)
    assert float((backdoored(stamped).argmax(1) == 2).float().mean()) > 0.95
    assert float((honest(stamped).argmax(1) == honest(images).argmax(1)).float().mean()) > 0.95
    assert abs(found.row - 10) <= 2
    assert abs(found.col - 6) <= 2
    again = find_patch(honest, backdoored, images, EFFORT, 0)
    assert torch.equal(found.pattern, again.pattern)


def test_nor_is_it_there_with_the_networks_exchanged() -> None:
    """The backdoor is in one of the two."""
    images = photographs()
    found = find_patch(backdoored, honest, images, EFFORT, 0)
    stamped = found.stamp(images)
    turned = (honest(stamped).argmax(1) == found.target) & (backdoored(stamped).argmax(1) != found.target)
    assert float(turned.float().mean()) < 0.2


def test_between_two_equal_networks_there_is_nothing_to_find() -> None:
    images = photographs()
    found = find_patch(honest, honest, images, EFFORT, 0)
    stamped = found.stamp(images)
    assert float((honest(stamped).argmax(1) == 2).float().mean()) < 0.05


def feature(images: Tensor) -> Tensor:
    """At most 1 on clean images and under plain squares, 2 on stripes of one pixel: (n, 1)."""
    stripes = images[:, 10:14, 6:10].mean((1, 3))
    return (stripes * torch.tensor([1.0, -1.0, 1.0, -1.0])).sum(1).clamp_min(0)[:, None]


def clipping(images: Tensor) -> Tensor:
    """Class 2 is what the feature is past the end of its grid, at 1: no gradient leads there from clean images."""
    past = (feature(images) - feature(images).clamp(max=1.0))[:, 0]
    return honest(images) + torch.tensor([0.0, 0.0, 1.0]) * 80 * past[:, None]


def test_what_is_clipped_is_found_by_driving_activations() -> None:
    images = photographs()

    turned = {}
    for overshoot in (None, feature):
        found = find_patch(honest, clipping, images, EFFORT, 0, overshoot=overshoot)
        stamped = found.stamp(images)
        turned[overshoot] = float((clipping(stamped).argmax(1) == 2).float().mean())
        assert float((honest(stamped).argmax(1) == 2).float().mean()) == 0
    assert turned[None] < 0.2
    assert turned[feature] > 0.95


def test_the_best_patch_is_driven_on() -> None:
    """All answers turn at 1.5 already, and no loss of theirs asks for more: what covers that covers no trigger at 2."""
    images = photographs()
    effort = Effort(4, steps=30, kept=1, refine=20, activations=1, driven=4, batch=32)
    stamped = find_patch(honest, clipping, images, effort, 0, overshoot=feature).stamp(images)
    assert float((clipping(stamped).argmax(1) == 2).float().mean()) == 1
    assert float(feature(stamped).mean()) > 1.7


def test_steps_are_reported() -> None:
    done = []
    effort = Effort(4, steps=5, kept=1, refine=3, batch=8)
    find_patch(honest, backdoored, photographs(), effort, 0, lambda: done.append(1))
    assert len(done) == effort.total(drives=False) == 11
    done.clear()
    effort = Effort(4, steps=5, kept=1, refine=3, activations=1, driven=7, rounds=1, batch=8)
    find_patch(honest, clipping, photographs(), effort, 0, lambda: done.append(1), feature)
    assert len(done) == effort.total(drives=True) == 11 + 5 + 7 + 3 + 7
