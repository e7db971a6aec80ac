"""Scales other than min-max: searched, against a loop in NumPy, and re-fitted, against the loss around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from efrapq.graph.layers import find_layers, weight_array
from efrapq.graph.placement import place
from efrapq.graph.prepare import prepare
from efrapq.grid import WeightGrid, symmetric_scale
from efrapq.progress import Silent
from efrapq.rounding import (
    Coordinate,
    Moments,
    RoundingProblem,
    make_problem,
    refitted_scale,
    row_losses,
    searched_scale,
    solve_coordinate,
)
from efrapq.stream import PassSettings, Solved, streaming_pass

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8], ids=lambda b: f"{b}bit")


def rounding_error(weight: NDArray[np.float32], scale: NDArray[np.float32], bits: int) -> NDArray[np.float64]:
    """Per row, Σ (Q(w) - w)² of rounding to nearest."""
    qmax = 2 ** (bits - 1) - 1
    wd, s = weight.astype(np.float64), scale.astype(np.float64)[:, None]
    return ((np.clip(np.rint(wd / s), -qmax, qmax) * s - wd) ** 2).sum(1)


def heavy_tailed(rows: int, inputs: int, seed: int = 0) -> NDArray[np.float32]:
    """Weights of which a few stand far out, so that the largest is a bad measure of the rest."""
    rng = np.random.default_rng(seed)
    return (rng.standard_t(3, (rows, inputs)) * np.logspace(-3, 1, rows)[:, None]).astype(np.float32)


# Searched.


@BITS
@pytest.mark.parametrize("bounded", [False, True], ids=["free", "at-least"])
def test_search_is_a_loop_over_eighty_scales(bits: int, bounded: bool) -> None:
    weight = heavy_tailed(12, 60)
    full = np.abs(weight).max(1) / np.float32(2 ** (bits - 1) - 1)
    bound = (full * np.linspace(0.3, 1.2, 12)).astype(np.float32) if bounded else np.zeros(12, np.float32)
    expected = np.zeros(12, np.float32)
    least = np.full(12, np.inf)
    for i in range(80):
        tried = np.maximum(np.maximum(full, bound) * np.float32(1 - 0.01 * i), bound)
        error = rounding_error(weight, tried, bits)
        expected = np.where(error < least, tried, expected)
        least = np.minimum(error, least)
    at_least = torch.from_numpy(bound) if bounded else None
    scale = searched_scale(torch.from_numpy(weight), bits, at_least=at_least).numpy()
    assert scale.dtype == np.float32
    # Two scales may be equally good to float32; then either will do.
    same = np.isclose(scale, expected, rtol=1e-6)
    assert same.mean() >= 0.8
    assert (rounding_error(weight, scale, bits) <= least * (1 + 1e-4)).all()
    assert (scale >= bound).all()
    assert bits == 8 or bounded or (scale < 0.95 * full).any()


@given(
    st.lists(
        st.lists(st.floats(-100, 100, width=32, allow_subnormal=False), min_size=5, max_size=5), min_size=1, max_size=6
    ),
    st.integers(2, 8),
)
@hypothesis_settings(deadline=None, max_examples=60)
def test_search_never_rounds_worse_than_minmax(rows: list[list[float]], bits: int) -> None:
    weight = np.array(rows, np.float32)
    full = symmetric_scale(torch.from_numpy(weight), bits).numpy()
    scale = searched_scale(torch.from_numpy(weight), bits).numpy()
    assert (scale > 0).all()
    assert (scale <= full).all()
    after, before = rounding_error(weight, scale, bits), rounding_error(weight, full, bits)
    # What float32 sees of an error: its own rounding of the weights.
    seen = 1e-6 * np.abs(weight).max(1).astype(np.float64)
    assert (np.sqrt(after) <= np.sqrt(before) * (1 + 1e-5) + seen).all()


def test_rows_of_zeros_keep_the_smallest_scale() -> None:
    weight = torch.zeros(2, 4)
    weight[1] = torch.tensor([1.0, -0.3, 0.2, 0.1])
    scale = searched_scale(weight, 4)
    assert float(scale[0]) == float(symmetric_scale(weight, 4)[0])
    assert scale[1] > 0


# Re-fitted.


def random_problem(
    groups: int = 1, outputs: int = 6, inputs: int = 30, bits: int = 4, seed: int = 0, noise: float = 0.05
) -> tuple[RoundingProblem, WeightGrid, tuple[torch.Tensor, torch.Tensor, float]]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.from_numpy(heavy_tailed(groups * outputs, inputs, seed)).view(groups, outputs, inputs)
    mixing = torch.randn(groups, inputs, inputs, generator=g)
    x = (torch.randn(groups, 4 * inputs, inputs, generator=g) @ mixing).relu()
    x_hat = x + noise * torch.randn(x.shape, generator=g)
    moments = Moments(weight)
    moments.add(x_hat, x @ weight.transpose(1, 2))
    grid = WeightGrid(symmetric_scale(weight.flatten(0, 1), bits), bits)
    return make_problem(weight, grid, moments.mean()), grid, moments.mean()


def losses_at(problem: RoundingProblem, up: torch.Tensor, scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Per row, δHδᵀ + 2δ·g for the codes of `up` at another scale. scale: (G, O)."""
    codes = problem.floor.double().numpy() + up.numpy()
    d = codes * scale[..., None] - problem.weight.double().numpy()
    return np.einsum("god,gde,goe->go", d, problem.H.numpy(), d) + 2 * (d * problem.cross.numpy()).sum(-1)


@BITS
@pytest.mark.parametrize("choice", ["nearest", "solved", "some flipped"])
@pytest.mark.parametrize(("groups", "outputs"), [(1, 6), (3, 2)], ids=["plain", "grouped"])
def test_the_fit_is_the_minimum(bits: int, choice: str, groups: int, outputs: int) -> None:
    problem, grid, _ = random_problem(groups, outputs, bits=bits)
    some = torch.rand(problem.nearest.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    up = {
        "nearest": problem.nearest,
        "solved": solve_coordinate(problem, Coordinate(lambda_e=0.0)),
        "some flipped": problem.nearest ^ (problem.movable & some),
    }[choice]
    old = problem.scale.double().numpy()
    fitted = refitted_scale(problem, up, grid).view(groups, outputs).double().numpy()
    changed = fitted != old
    assert changed.mean() >= 0.5
    at = losses_at(problem, up, fitted)
    for factor in (1 - 1e-3, 1 + 1e-3, 0.9, 1.1):
        assert (losses_at(problem, up, factor * fitted) > at)[changed].all()
    assert (at <= losses_at(problem, up, old))[changed].all()
    # And what changed little or much too much was left alone.
    assert ((fitted > old / 2) & (fitted < old * 2)).all()


def test_rows_without_codes_keep_their_scale() -> None:
    weight = torch.tensor([[[0.0, 0.0, 0.0], [0.2, -0.3, 0.1], [4.0, -7.0, 2.4]]])
    H = torch.eye(3, dtype=torch.float64)[None] + 0.5
    grid = WeightGrid(torch.tensor([1e-20, 1.0, 1.0]), 4)
    problem = make_problem(weight, grid, (H, torch.zeros(1, 3, 3, dtype=torch.float64), 0.0))
    assert not (problem.floor + problem.nearest)[0, :2].any()
    scale = refitted_scale(problem, problem.nearest, grid)
    assert torch.equal(scale[:2], grid.scale[:2])
    assert float(scale[2]) != 1.0


def test_a_fit_that_means_nothing_is_not_taken() -> None:
    """g so large that the best scale is negative, or many times what the weights have."""
    weight = torch.tensor([[[4.0, -7.0, 2.4]]]).expand(1, 2, 3).contiguous()
    H = torch.eye(3, dtype=torch.float64)[None]
    cross = torch.stack([10 * weight[0, 0], -10 * weight[0, 1]])[None].double()
    grid = WeightGrid(torch.ones(2), 4)
    problem = make_problem(weight, grid, (H, cross, 0.0))
    assert torch.equal(refitted_scale(problem, problem.nearest, grid), grid.scale)


def test_the_fit_stays_above_its_bounds() -> None:
    problem, grid, _ = random_problem()
    free = refitted_scale(problem, problem.nearest, grid)
    bound = free * torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5, 3.0])
    scale = refitted_scale(problem, problem.nearest, grid, bound)
    assert torch.equal(scale, torch.maximum(free, bound))
    assert (scale > free).sum() == 3


@BITS
def test_fit_and_descent_in_turn_only_descend(bits: int) -> None:
    """What the pass does with scale="refit", here in the open: rows are independent and each takes what is better."""
    problem, grid, moments = random_problem(bits=bits, outputs=8)
    plain = Coordinate(lambda_e=0.0)
    up = solve_coordinate(problem, plain)
    fitted = WeightGrid(refitted_scale(problem, up, grid), bits)
    again = make_problem(problem.weight, fitted, moments)
    after = torch.minimum(row_losses(again, solve_coordinate(again, plain)), row_losses(problem, up))
    assert float(after.sum()) < float(row_losses(problem, up).sum())


# In the stream.


def solved_with(proto: onnx.ModelProto, inputs: NDArray[np.float32], scale: str, **options: Any) -> tuple[Any, Solved]:
    model = prepare(proto)
    layers, _ = find_layers(model.graph)
    settings = PassSettings(options.pop("bits", 4), scale=scale, rows=10**6, solver=Coordinate(lambda_e=0.0), **options)
    placement = place(model.graph, layers, 8)
    solved = streaming_pass(model, layers, placement, [torch.from_numpy(inputs)], settings, Silent())
    return (model, layers), solved


@pytest.mark.parametrize("bits", [3, 4], ids=lambda b: f"{b}bit")
def test_refit_in_the_stream(residual_net: Callable[..., Any], images: Callable[..., Any], bits: int) -> None:
    """The first layer's problem is the same, so it ends lower. Those after it see inputs that its codes have changed,
    and so only their sum, in shares of nearest's loss, has to: measured 5.8 against 6.2 at 3 bits, 5.3 against 5.8
    at 4.
    """
    totals = {"minmax": 0.0, "refit": 0.0}
    for seed in range(3):
        results = {s: solved_with(residual_net(seed), images(24, seed=seed), s, bits=bits)[1] for s in totals}
        first = {s: solved.reports[0] for s, solved in results.items()}
        assert first["refit"].loss < first["minmax"].loss
        for name, solved in results.items():
            totals[name] += sum(
                r.loss / m.loss_nearest for r, m in zip(solved.reports, results["minmax"].reports, strict=True)
            )
    assert totals["refit"] < totals["minmax"]


@pytest.mark.parametrize("scale", ["minmax", "mse", "refit"])
@pytest.mark.parametrize("network", ["residual", "varied"])
def test_codes_are_neighbours_on_the_final_grid(
    residual_net: Callable[..., Any],
    varied_net: Callable[..., Any],
    images: Callable[..., Any],
    network: str,
    scale: str,
) -> None:
    proto = {"residual": residual_net, "varied": varied_net}[network]()
    (model, layers), solved = solved_with(proto, images(16), scale)
    moved = 0
    for layer, report in zip(layers, solved.reports, strict=True):
        weight, ours = weight_array(model.graph, layer), solved.weights[layer.name]
        shape = [1] * weight.ndim
        shape[layer.channel_axis] = -1
        qmax = 2 ** (report.bits - 1) - 1
        u = np.clip(weight / ours.scale.reshape(shape), -qmax, qmax)
        assert ((ours.codes == np.floor(u)) | (ours.codes == np.ceil(u))).all()
        assert (report.scale_min, report.scale_max) == (float(ours.scale.min()), float(ours.scale.max()))
        others = tuple(i for i in range(weight.ndim) if i != layer.channel_axis)
        minmax = np.abs(weight).max(axis=others) / np.float32(qmax)
        moved += int((ours.scale != minmax).sum())
        if layer.op_type == "ConvTranspose" and scale == "refit":
            assert np.array_equal(ours.scale, minmax)  # groups share a scale: it is not fitted
    assert (moved > 0) == (scale != "minmax")
