"""One scale per block of inputs: the grid, the problem and the solvers against NumPy and against one scale per row."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from efrapq.grid import WeightGrid, grid_position, nearest_codes, symmetric_scale
from efrapq.rounding import (
    Coordinate,
    Moments,
    RoundingProblem,
    make_problem,
    quadratic_loss,
    row_losses,
    solve_coordinate,
    solve_within,
)


def moments_of(weight: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    g = torch.Generator().manual_seed(seed)
    inputs = weight.shape[2]
    x = (torch.randn(1, 4 * inputs, inputs, generator=g) @ torch.randn(1, inputs, inputs, generator=g)).relu()
    moments = Moments(weight)
    moments.add(x + 0.05 * torch.randn(x.shape, generator=g), x @ weight.transpose(1, 2))
    return moments.mean()


def weights(outputs: int, inputs: int, seed: int) -> torch.Tensor:
    """Rows whose blocks differ in size by orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, outputs, inputs, generator=g) * torch.logspace(-2, 0, inputs)


def blocked(outputs: int, inputs: int, block: int, bits: int = 4, seed: int = 0) -> RoundingProblem:
    weight = weights(outputs, inputs, seed)
    scale = symmetric_scale(weight.reshape(-1, block), bits).view(outputs, -1)
    return make_problem(weight, WeightGrid(scale, bits, block), moments_of(weight, seed))


def loss_by_hand(problem: RoundingProblem, up: NDArray[np.bool_]) -> NDArray[np.float64]:
    """δHδᵀ + 2δ·g per row, in float64 NumPy."""
    steps = problem.scale.double().numpy()
    assert steps.shape == problem.floor.shape
    d = (problem.floor.double().numpy() + up) * steps - problem.weight.double().numpy()
    return np.einsum("god,gde,goe->go", d, problem.H.numpy(), d) + 2 * (d * problem.cross.numpy()).sum(-1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_grid_against_numpy(bits: int) -> None:
    weight = weights(3, 12, seed=1)[0]
    qmax = 2 ** (bits - 1) - 1
    by_block = weight.numpy().reshape(3, 3, 4)
    scale = (np.abs(by_block).max(2) / np.float32(qmax)).astype(np.float32)
    grid = WeightGrid(symmetric_scale(weight.reshape(-1, 4), bits).view(3, 3), bits, 4)
    np.testing.assert_array_equal(grid.scale.numpy(), scale)
    np.testing.assert_array_equal(grid.steps.numpy(), np.repeat(scale, 4, 1))
    codes = np.clip(np.rint(by_block / scale[..., None]), -qmax, qmax).reshape(3, 12)
    np.testing.assert_array_equal(nearest_codes(weight, grid).numpy(), codes)
    assert (np.abs(codes.reshape(3, 3, 4)).max(2) == qmax).all()  # each block uses its whole range
    floor, residue = grid_position(weight, grid)
    assert (floor + residue).sub(weight / grid.steps).abs().max() < 1e-5


def test_the_problem_against_numpy() -> None:
    problem = blocked(4, 12, 4)
    up = torch.rand(problem.floor.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    steps = problem.scale.double().numpy()
    real = (problem.floor.double().numpy() + up.numpy()) * steps
    np.testing.assert_array_equal(problem.real(up).numpy(), real)
    np.testing.assert_array_equal(problem.delta(up).numpy(), real - problem.weight.double().numpy())
    off = np.minimum(problem.residue.numpy(), 1 - problem.residue.numpy())
    np.testing.assert_array_equal(problem.errors("absolute").numpy(), off * problem.scale.numpy())
    np.testing.assert_array_equal(problem.errors("relative").numpy(), off)
    np.testing.assert_allclose(row_losses(problem, up).numpy(), loss_by_hand(problem, up.numpy()), rtol=1e-4)


SOLVERS = pytest.mark.parametrize(
    "settings",
    [
        Coordinate(lambda_e=0.0),
        Coordinate(lambda_e=1e-2, error="relative"),
        Coordinate(lambda_e=1e-3, start="nearest"),
        Coordinate(lambda_e=1e-3, block=8, sweeps=4),
    ],
    ids=["plain", "relative", "nearest", "small blocks"],
)


@SOLVERS
@pytest.mark.parametrize("inputs", [24, 300])  # 300: more than a block of columns and of panels
def test_blocks_of_one_scale_are_rows_of_one_scale(settings: Coordinate, inputs: int) -> None:
    weight = weights(6, inputs, seed=3)
    moments = moments_of(weight, seed=3)
    scale = symmetric_scale(weight[0], 4)
    by_row = make_problem(weight, WeightGrid(scale, 4), moments)
    by_block = make_problem(weight, WeightGrid(scale[:, None].repeat(1, inputs // 12), 4, 12), moments)
    assert torch.equal(by_row.nearest, by_block.nearest)
    assert torch.equal(solve_coordinate(by_row, settings), solve_coordinate(by_block, settings))
    within = replace(settings, fidelity=1.1)
    for ours, theirs in zip(solve_within(by_row, within), solve_within(by_block, within), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@SOLVERS
@pytest.mark.parametrize("seed", range(3))
def test_no_single_flip_improves(settings: Coordinate, seed: int) -> None:
    problem = blocked(5, 24, 8, seed=seed)
    settings = replace(settings, sweeps=60)
    up = solve_coordinate(problem, settings).numpy()

    def objective(choice: NDArray[np.bool_]) -> NDArray[np.float64]:
        error = problem.errors(settings.error).double().numpy() * (choice == problem.nearest.numpy())
        return loss_by_hand(problem, choice) + settings.lambda_e * error.sum(-1)

    reached = objective(up)
    slack = 1e-5 * float(problem.scale.double().square().max() * problem.H.diagonal(dim1=1, dim2=2).sum())
    for j in range(24):
        neighbour = up.copy()
        neighbour[..., j] ^= problem.movable[..., j].numpy()
        assert (objective(neighbour) >= reached - slack).all()
    assert (reached <= objective(problem.nearest.numpy()) + slack).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_best_rounding_of_all(seed: int) -> None:
    problem = blocked(3, 8, 4, seed=seed)
    choices = [np.broadcast_to(np.array(c, bool), (1, 3, 8)) for c in itertools.product([False, True], repeat=8)]
    losses = np.stack([loss_by_hand(problem, c & problem.movable.numpy()) for c in choices])
    found = loss_by_hand(problem, solve_coordinate(problem, Coordinate(lambda_e=0.0)).numpy())
    nearest = loss_by_hand(problem, problem.nearest.numpy())
    best = losses.min(0)
    assert (found >= best - 1e-6).all()
    assert (found - best).sum() <= 0.3 * (nearest - best).sum() + 1e-6


def test_blocks_lose_less_than_rows_where_sizes_differ() -> None:
    weight = weights(8, 64, seed=5)
    moments = moments_of(weight, seed=5)
    rows = make_problem(weight, WeightGrid(symmetric_scale(weight[0], 4), 4), moments)
    blocks = make_problem(weight, WeightGrid(symmetric_scale(weight.reshape(-1, 16), 4).view(8, 4), 4, 16), moments)
    assert quadratic_loss(blocks, blocks.nearest) < quadratic_loss(rows, rows.nearest)
    solved = [quadratic_loss(p, solve_coordinate(p, Coordinate(lambda_e=0.0))) for p in (blocks, rows)]
    assert solved[0] < solved[1]
