"""The rounding problem: its quadratic is the loss computed from the data, however the data came in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from efrapq.grid import WeightGrid, nearest_codes, symmetric_scale
from efrapq.rounding import Moments, make_problem, quadratic_loss

SHAPES = pytest.mark.parametrize(
    ("groups", "outputs", "inputs", "bits"),
    [(1, 4, 9, 4), (1, 3, 1, 4), (1, 1, 7, 4), (3, 2, 5, 4), (6, 1, 9, 8), (2, 5, 12, 2)],
    ids=["plain", "one-input", "one-output", "grouped", "depthwise-8bit", "grouped-2bit"],
)


def data(groups: int, outputs: int, inputs: int, rows: int = 64, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """weight (G, O, D), x and x_hat (G, R, D): correlated inputs, the second a perturbed first."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, outputs, inputs, generator=g)
    mixing = torch.randn(groups, inputs, inputs, generator=g)
    x = torch.randn(groups, rows, inputs, generator=g) @ mixing + 0.5
    return weight, x, x + 0.05 * torch.randn(x.shape, generator=g)


@SHAPES
@pytest.mark.parametrize("choice", ["nearest", "random", "all up"])
def test_quadratic_loss_is_the_loss_on_the_data(groups: int, outputs: int, inputs: int, bits: int, choice: str) -> None:
    weight, x, x_hat = data(groups, outputs, inputs)
    grid = WeightGrid(symmetric_scale(weight.flatten(0, 1), bits), bits)
    moments = Moments(weight)
    moments.add(x_hat, x @ weight.transpose(1, 2))
    problem = make_problem(weight, grid, moments.mean())
    random = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    up = {"nearest": problem.nearest, "random": random & problem.movable, "all up": problem.movable}[choice]

    codes = problem.floor.numpy().astype(np.float64) + up.numpy()
    w_hat = codes * grid.scale.numpy().astype(np.float64).reshape(groups, outputs, 1)
    difference = np.einsum("god,grd->gro", w_hat, x_hat.double().numpy()) - np.einsum(
        "god,grd->gro", weight.double().numpy(), x.double().numpy()
    )
    expected = (difference**2).sum() / x.shape[1]  # mean over rows, sum over groups and outputs
    assert quadratic_loss(problem, up) == pytest.approx(expected, rel=1e-5)


@SHAPES
def test_nearest_is_the_grid_s_nearest(groups: int, outputs: int, inputs: int, bits: int) -> None:
    weight, x, x_hat = data(groups, outputs, inputs)
    grid = WeightGrid(symmetric_scale(weight.flatten(0, 1), bits), bits)
    moments = Moments(weight)
    moments.add(x_hat, x @ weight.transpose(1, 2))
    problem = make_problem(weight, grid, moments.mean())
    codes = (problem.floor + problem.nearest).to(torch.int8).flatten(0, 1)
    assert torch.equal(codes, nearest_codes(weight.flatten(0, 1), grid))
    assert torch.equal(problem.real(problem.nearest), codes.view(weight.shape) * problem.scale.double()[..., None])
    assert not (problem.nearest & ~problem.movable).any()


@given(st.lists(st.floats(-7.5, 7.5, width=32), min_size=1, max_size=30))
@hypothesis_settings(deadline=None, max_examples=200)
def test_nearest_choice_equals_nearest_code(values: list[float]) -> None:
    weight = torch.tensor([values], dtype=torch.float32)
    grid = WeightGrid(torch.ones(1), 4)
    d = len(values)
    problem = make_problem(weight[None], grid, (torch.eye(d)[None].double(), torch.zeros(1, 1, d).double(), 0.0))
    assert torch.equal((problem.floor + problem.nearest)[0].to(torch.int8), nearest_codes(weight, grid))


def test_residue_of_one_half_goes_to_the_even_code() -> None:
    weight = torch.tensor([[[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]]])
    zeros = torch.zeros(1, 1, 7, dtype=torch.float64)
    problem = make_problem(weight, WeightGrid(torch.ones(1), 4), (torch.eye(7)[None].double(), zeros, 0.0))
    assert problem.residue.eq(0.5).all()
    assert (problem.floor + problem.nearest).flatten().tolist() == [-2, -2, 0, 0, 2, 2, 4]


def test_errors_in_weight_units_and_in_steps() -> None:
    weight = torch.tensor([[[0.25, 0.4, -0.1]], [[1.0, 1.75, 0.0]]])
    scale = torch.tensor([0.5, 2.0])
    moments = (torch.eye(3).expand(2, 3, 3).double(), torch.zeros(2, 1, 3).double(), 0.0)
    problem = make_problem(weight, WeightGrid(scale, 4), moments)
    steps = torch.tensor([[[0.5, 0.2, 0.2]], [[0.5, 0.125, 0.0]]])
    assert float((problem.errors("relative") - steps).abs().max()) <= 1e-6
    absolute = (problem.real(problem.nearest) - weight).abs()
    assert float((problem.errors("absolute") - absolute).abs().max()) <= 1e-6


@pytest.mark.parametrize("chunk", [1, 3, 7, 31, 200])
def test_moments_do_not_depend_on_chunks(chunk: int) -> None:
    weight, x, x_hat = data(2, 3, 5, rows=200)
    y = x @ weight.transpose(1, 2)
    moments = Moments(weight)
    for i in range(0, 200, chunk):
        moments.add(x_hat[:, i : i + chunk], y[:, i : i + chunk])
    H, cross, error = moments.mean()
    assert moments.rows == 200
    xd = x_hat.double().numpy()
    changed = np.einsum("god,grd->gro", weight.double().numpy(), xd - x.double().numpy())
    for ours, reference in (
        (H.numpy(), np.einsum("grd,gre->gde", xd, xd) / 200),
        (cross.numpy(), np.einsum("gro,grd->god", changed, xd) / 200),
        (np.array(error), (changed**2).sum() / 200),
    ):
        assert np.abs(ours - reference).max() <= 1e-5 * np.abs(reference).max()
    assert H.dtype == cross.dtype == torch.float64


def test_moments_without_rows_are_zero() -> None:
    H, cross, error = Moments(torch.zeros(1, 2, 3)).mean()
    assert not H.any()
    assert not cross.any()
    assert error == 0
