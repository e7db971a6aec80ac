"""The paper's solver on a layer small enough to check: where it starts, what it lowers, what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from efrapq.grid import WeightGrid, grid_position, nearest_codes, symmetric_scale
from efrapq.rounding import Relaxed, solve_relaxed


class Linear:
    """y = W x for a seeded W (3, 6) and correlated inputs, with everything that `solve_relaxed` asks for."""

    def __init__(self, weight: Tensor | None = None, scale: Tensor | None = None, bits: int = 4) -> None:
        g = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3, 6, generator=g) if weight is None else weight
        inputs = self.weight.shape[1]
        self.x = (torch.randn(64, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g)).relu()
        self.y = self.x @ self.weight.t()
        self.grid = WeightGrid(symmetric_scale(self.weight, bits) if scale is None else scale, bits)
        self.floor, self.residue = grid_position(self.weight, self.grid)
        self.nearest = (nearest_codes(self.weight, self.grid) - self.floor).bool()
        self.seen: list[Tensor] = []

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        self.seen.append(weight.detach().clone())
        return x @ weight.t()

    def solve(self, settings: Relaxed, seed: int = 0, on_step: Callable[[int], None] | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)

        def sample() -> tuple[Tensor, Tensor]:
            picked = torch.randint(len(self.x), (settings.batch,), generator=generator)
            return self.x[picked], self.y[picked]

        scale = self.grid.scale[:, None]
        return solve_relaxed(self.floor, self.residue, scale, self.nearest, self.forward, sample, -1, settings, on_step)

    def loss(self, up: Tensor) -> float:
        weight = (self.floor + up).double() * self.grid.scale.double()[:, None]
        return float((self.x.double() @ weight.t() - self.y.double()).square().sum(1).mean())


def test_first_step_is_the_float_model() -> None:
    layer = Linear()
    layer.solve(Relaxed(steps=1))
    start = layer.seen[0]
    assert float((start - layer.weight).abs().max()) <= 1e-5
    loss = float((layer.x @ start.t() - layer.y).square().sum(1).mean())
    assert loss <= 1e-8 * float(layer.y.square().sum(1).mean())


def test_no_steps_round_to_nearest() -> None:
    layer = Linear()
    assert torch.equal(layer.solve(Relaxed(steps=0)), layer.nearest)


def test_result_is_no_worse_than_nearest() -> None:
    layer = Linear()
    up = layer.solve(Relaxed(lambda_e=0, steps=400, learning_rate=1e-2))
    assert up.dtype == torch.bool
    assert (up != layer.nearest).any()
    assert layer.loss(up) < layer.loss(layer.nearest)


def test_huge_lambda_flips_what_can_move() -> None:
    layer = Linear()
    up = layer.solve(Relaxed(lambda_e=1e6, error="relative", steps=300, learning_rate=5e-2))
    movable = (layer.residue > 1e-3) & (layer.residue < 1 - 1e-3)
    assert torch.equal(up[movable], ~layer.nearest[movable])


def test_preservation_alone_drives_h_to_the_corners() -> None:
    layer = Linear()
    layer.solve(Relaxed(lambda_e=0, lambda_p=1.0, steps=400, learning_rate=5e-2))
    h = layer.seen[-1] / layer.grid.scale[:, None] - layer.floor
    movable = layer.residue > 0
    assert float(torch.minimum(h, 1 - h)[movable].max()) < 0.05


def test_seed_decides() -> None:
    settings = Relaxed(lambda_e=1e-2, steps=30, learning_rate=1e-2, batch=4)
    layers = [Linear(), Linear(), Linear()]
    first, again, other = (layer.solve(settings, seed) for layer, seed in zip(layers, (0, 0, 1), strict=True))
    assert torch.equal(first, again)
    assert torch.equal(layers[0].seen[-1], layers[1].seen[-1])
    assert not torch.equal(layers[0].seen[-1], layers[2].seen[-1])
    assert other.shape == first.shape


@pytest.mark.parametrize("lambda_e", [0.0, 1e6])
def test_immovable_weights_stay(lambda_e: float) -> None:
    weight = torch.tensor([[3.0, -2.0, 0.0, 9.0, -9.0, 0.3], [1.2, -0.7, 20.0, 0.0, 7.0, -7.0]])
    layer = Linear(weight, torch.ones(2))
    up = layer.solve(Relaxed(lambda_e=lambda_e, steps=50, learning_rate=0.1))
    fixed = layer.residue == 0
    assert int(fixed.sum()) == 9
    assert not up[fixed].any()
    for seen in layer.seen:
        assert torch.isfinite(seen).all()
        assert torch.equal(seen[fixed], weight.clamp(-7, 7)[fixed])


def test_every_step_is_reported() -> None:
    steps: list[int] = []
    Linear().solve(Relaxed(steps=5), on_step=steps.append)
    assert steps == [0, 1, 2, 3, 4]
