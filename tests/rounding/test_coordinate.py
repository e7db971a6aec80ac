"""Coordinate descent against brute force over every rounding, and against its own definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from efrapq.grid import WeightGrid, symmetric_scale
from efrapq.rounding import Coordinate, Moments, RoundingProblem, make_problem, quadratic_loss, solve_coordinate

LAMBDAS = pytest.mark.parametrize("lambda_e", [0.0, 1e-3, 0.1], ids=lambda v: f"lambda{v:g}")


def random_problem(
    groups: int = 1, outputs: int = 4, inputs: int = 8, bits: int = 4, seed: int = 0, noise: float = 0.05
) -> RoundingProblem:
    """Correlated inputs, as the windows of an image are."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, outputs, inputs, generator=g)
    mixing = torch.randn(groups, inputs, inputs, generator=g)
    x = (torch.randn(groups, 4 * inputs, inputs, generator=g) @ mixing).relu()
    x_hat = x + noise * torch.randn(x.shape, generator=g)
    moments = Moments(weight)
    moments.add(x_hat, x @ weight.transpose(1, 2))
    return make_problem(weight, WeightGrid(symmetric_scale(weight.flatten(0, 1), bits), bits), moments.mean())


def objectives(problem: RoundingProblem, up: NDArray[np.bool_], settings: Coordinate) -> NDArray[np.float64]:
    """Per row, in float64 NumPy: δHδᵀ + 2δ·g + λ Σ e·[h is nearest's]. up: (G, O, D). Returns (G, O)."""
    w_hat = (problem.floor.double().numpy() + up) * problem.scale.double().numpy()[..., None]
    d = w_hat - problem.weight.double().numpy()
    quadratic = np.einsum("god,gde,goe->go", d, problem.H.numpy(), d) + 2 * (d * problem.cross.numpy()).sum(-1)
    stays = up == problem.nearest.numpy()
    return quadratic + settings.lambda_e * (problem.errors(settings.error).double().numpy() * stays).sum(-1)


def slack(problem: RoundingProblem) -> float:
    """What float32 in the solver may cost, on the scale of the objective."""
    steps = problem.scale.double().square().max() * problem.H.diagonal(dim1=1, dim2=2).sum(-1).max()
    return 1e-5 * float(steps)


@LAMBDAS
@pytest.mark.parametrize("error", ["absolute", "relative"])
@pytest.mark.parametrize("seed", range(4))
def test_no_single_flip_improves(lambda_e: float, error: str, seed: int) -> None:
    problem = random_problem(groups=2, outputs=5, inputs=10, seed=seed)
    settings = Coordinate(lambda_e=lambda_e, error=error, sweeps=30)
    up = solve_coordinate(problem, settings).numpy()
    reached = objectives(problem, up, settings)
    for j in range(10):
        neighbour = up.copy()
        neighbour[..., j] ^= problem.movable[..., j].numpy()
        assert (objectives(problem, neighbour, settings) >= reached - slack(problem)).all()
    nearest = objectives(problem, problem.nearest.numpy(), settings)
    assert (reached <= nearest + slack(problem)).all()


@LAMBDAS
@pytest.mark.parametrize(("inputs", "floor"), [(4, 0.75), (6, 0.6), (8, 0.47)], ids=["D4", "D6", "D8"])
def test_how_often_the_global_optimum_is_reached(lambda_e: float, inputs: int, floor: float) -> None:
    """Of 240 strongly correlated rows each, measured: 78 to 90 % (D = 4), 63 to 81 % (6), 50 to 57 % (8).

    Nearest itself is optimal for far fewer; one descent from nearest is a heuristic, and these are its figures.
    """
    settings = Coordinate(lambda_e=lambda_e)
    hits = rows = 0
    for seed in range(40):
        problem = random_problem(outputs=6, inputs=inputs, seed=seed)
        reached = objectives(problem, solve_coordinate(problem, settings).numpy(), settings)
        movable = problem.movable.numpy()
        best = np.full_like(reached, np.inf)
        for bits in itertools.product([False, True], repeat=inputs):
            up = np.broadcast_to(np.array(bits), movable.shape) & movable
            best = np.minimum(best, objectives(problem, up, settings))
        assert (reached >= best - slack(problem)).all()
        hits += int((reached <= best + slack(problem)).sum())
        rows += reached.size
    assert hits / rows >= floor


@pytest.mark.parametrize("error", ["absolute", "relative"])
def test_huge_lambda_flips_everything_movable(error: str) -> None:
    problem = random_problem(groups=2, outputs=4, inputs=12)
    up = solve_coordinate(problem, Coordinate(lambda_e=1e9, error=error))
    assert torch.equal(up, ~problem.nearest & problem.movable)
    assert (problem.movable & problem.nearest).any()
    assert (problem.movable & ~problem.nearest).any()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_nearest_is_optimal_for_white_inputs(bits: int) -> None:
    """With H = I and x̂ = x the weights do not interact: each goes to its own nearest code."""
    weight = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    H = torch.eye(16, dtype=torch.float64).expand(2, 16, 16)
    grid = WeightGrid(symmetric_scale(weight.flatten(0, 1), bits), bits)
    problem = make_problem(weight, grid, (H, torch.zeros_like(weight).double(), 0.0))
    worst = solve_coordinate(problem, Coordinate(lambda_e=1e9))
    assert torch.equal(solve_coordinate(problem, Coordinate(lambda_e=0)), problem.nearest)
    assert torch.equal(solve_coordinate(problem, Coordinate(lambda_e=0), start=worst), problem.nearest)


@LAMBDAS
def test_blocks_do_not_change_the_codes(lambda_e: float) -> None:
    problem = random_problem(groups=2, outputs=6, inputs=150, seed=5)
    whole = solve_coordinate(problem, Coordinate(lambda_e=lambda_e, block=1000))
    for block in (1, 7, 128, 150):
        assert torch.equal(solve_coordinate(problem, Coordinate(lambda_e=lambda_e, block=block)), whole)


@LAMBDAS
def test_rows_are_independent(lambda_e: float) -> None:
    problem = random_problem(outputs=7, inputs=20, seed=2)
    settings = Coordinate(lambda_e=lambda_e)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    permuted = make_problem(
        problem.weight[:, order],
        WeightGrid(problem.scale[0, order], 4),
        (problem.H, problem.cross[:, order], problem.error),
    )
    assert torch.equal(solve_coordinate(permuted, settings), solve_coordinate(problem, settings)[:, order])


@LAMBDAS
def test_groups_are_solved_as_if_alone(lambda_e: float) -> None:
    problem = random_problem(groups=4, outputs=3, inputs=18, seed=7)
    settings = Coordinate(lambda_e=lambda_e)
    together = solve_coordinate(problem, settings)
    for g in range(4):
        one = slice(g, g + 1)
        alone = make_problem(
            problem.weight[one], WeightGrid(problem.scale[g], 4), (problem.H[one], problem.cross[one], 0.0)
        )
        assert torch.equal(solve_coordinate(alone, settings)[0], together[g])


@pytest.mark.parametrize(
    ("groups", "outputs", "inputs"), [(5, 1, 9), (1, 6, 1), (1, 4, 8)], ids=["one-output", "one-input", "plain"]
)
def test_problem_and_start_are_not_modified(groups: int, outputs: int, inputs: int) -> None:
    problem = random_problem(groups, outputs, inputs, seed=1)
    nearest = problem.nearest.clone()
    start = torch.zeros_like(nearest)
    solve_coordinate(problem, Coordinate(lambda_e=1e9))
    solve_coordinate(problem, Coordinate(lambda_e=1e9), start=start)
    assert torch.equal(problem.nearest, nearest)
    assert not start.any()


@pytest.mark.parametrize("groups", [1, 6], ids=["linear", "depthwise"])
def test_single_output_rows_improve_on_nearest(groups: int) -> None:
    """Depthwise layers have one output a group: the loss before and after is reported of two different choices."""
    problem = random_problem(groups, 1, 9, seed=12)
    up = solve_coordinate(problem, Coordinate(lambda_e=0))
    assert (up != problem.nearest).any()
    assert quadratic_loss(problem, up) < quadratic_loss(problem, problem.nearest)


@pytest.mark.parametrize("lambda_e", [0.0, 1.0, 1e9])
def test_immovable_weights_stay(lambda_e: float) -> None:
    weight = torch.tensor([[[3.0, -2.0, 0.0, 9.0, -9.0, 0.3], [1.2, -0.7, 20.0, 0.0, 7.0, -7.0]]])
    H = torch.eye(6, dtype=torch.float64)[None] + 0.9
    problem = make_problem(weight, WeightGrid(torch.ones(2), 4), (H, weight.double() @ H, 0.0))
    assert problem.movable.flatten().tolist() == [False] * 5 + [True] * 3 + [False] * 4
    up = solve_coordinate(problem, Coordinate(lambda_e=lambda_e))
    assert not (up & ~problem.movable).any()
    codes = problem.floor + up
    expected = weight.clamp(-7, 7)
    assert torch.equal(codes[~problem.movable], expected[~problem.movable])


def test_zero_sweeps_give_nearest() -> None:
    problem = random_problem(seed=4)
    assert torch.equal(solve_coordinate(problem, Coordinate(start="nearest", sweeps=0)), problem.nearest)


def test_sweeps_run_out() -> None:
    problem = random_problem(outputs=8, inputs=60, seed=4)
    losses = [
        quadratic_loss(problem, solve_coordinate(problem, Coordinate(lambda_e=0, start="nearest", sweeps=n)))
        for n in (0, 1, 30, 60)
    ]
    assert losses[0] > losses[1] > losses[2] == losses[3]


def test_dead_inputs_cost_nothing() -> None:
    """Inputs that are always zero have a zero row in H: any code will do, and the solver must not stumble."""
    problem = random_problem(inputs=6, seed=9)
    H, cross = problem.H.clone(), problem.cross.clone()
    H[:, 2], H[:, :, 2], cross[:, :, 2] = 0, 0, 0
    dead = make_problem(problem.weight, WeightGrid(problem.scale[0], 4), (H, cross, problem.error))
    free = solve_coordinate(dead, Coordinate(lambda_e=0))
    assert torch.equal(free[..., 2], dead.nearest[..., 2])
    pulled = solve_coordinate(dead, Coordinate(lambda_e=1e-3))
    assert torch.equal(pulled[..., 2], (~dead.nearest & dead.movable)[..., 2])
