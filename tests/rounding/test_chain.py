"""The compiled kernels against the definition of a chain, and the solvers with them against the solvers without."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from efrapq.grid import WeightGrid, symmetric_scale
from efrapq.rounding import (
    Coordinate,
    Moments,
    RoundingProblem,
    coordinate,
    greedy,
    make_problem,
    solve_coordinate,
    solve_within,
)
from efrapq.rounding.chain import LONGEST_BLOCK, chain, has_kernel, sweep_on_cpu

CPU = torch.device("cpu")
on_cpu = pytest.mark.skipif(not has_kernel(CPU), reason="numba is not installed: pip install 'efrapq[fast]'")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
interpreted = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def random_chain(groups: int, inputs: int, outputs: int, seed: int) -> tuple[Tensor, ...]:
    """base, rows, a, b, high, low: some columns are not free to choose, as a is infinite there."""
    g = torch.Generator().manual_seed(seed)
    base, a, b, high, low = (torch.randn(groups, inputs, outputs, generator=g) for _ in range(5))
    rows = torch.randn(groups, inputs, inputs, generator=g) / inputs
    a[:, ::3] = torch.inf
    low[:, 1::2] = 0
    return base, rows, a, b, high, low


def expected(
    base: Tensor, rows: Tensor, a: Tensor, b: Tensor, high: Tensor, low: Tensor, begin: int, end: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """out and v of the columns begin to end in float64, column by column, as the module's head defines them."""
    x = [t.double().numpy() for t in (base, rows, a, b, high, low)]
    out, values = np.zeros_like(x[0]), x[0].copy()
    for j in range(begin, end):
        values[:, j] = x[0][:, j] + np.einsum("gi,gio->go", x[1][:, begin:j, j], out[:, begin:j])
        out[:, j] = np.where(x[2][:, j] + x[3][:, j] * values[:, j] < 0, x[4][:, j], x[5][:, j])
    return out, values


def check(base: Tensor, rows: Tensor, a: Tensor, b: Tensor, high: Tensor, low: Tensor, begin: int, end: int) -> None:
    wanted, owed = expected(base, rows, a, b, high, low, begin, end)
    untouched = torch.full_like(base, 7.0)
    out, values = untouched.clone(), base.clone()
    chain(base, rows, a, b, high, low, out, values, begin, end)
    again = untouched.clone()
    chain(base, rows, a, b, high, low, again, None, begin, end)  # v not asked for
    assert torch.equal(out, again)
    assert torch.equal(out[:, :begin], untouched[:, :begin])
    assert torch.equal(out[:, end:], untouched[:, end:])
    np.testing.assert_allclose(out[:, begin:end].cpu(), wanted[:, begin:end], rtol=0, atol=0)
    np.testing.assert_allclose(values.cpu(), owed, rtol=1e-4, atol=1e-4)


@on_cpu
@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 5),
    outputs=st.integers(1, 150),
    begin=st.integers(0, 40),
    size=st.integers(1, 256),
    seed=st.integers(0, 1000),
)
def test_the_cpu_kernel_is_the_definition(groups: int, outputs: int, begin: int, size: int, seed: int) -> None:
    base, rows, a, b, high, low = random_chain(groups, begin + size + 3, outputs, seed)
    # float32 must not decide what float64 would decide otherwise: no column is that close to its border.
    _, values = expected(base, rows, a, b, high, low, begin, begin + size)
    margin = a.double().numpy() + b.double().numpy() * values
    a[torch.from_numpy(np.abs(margin) < 1e-3)] = torch.inf
    check(base, rows, a, b, high, low, begin, begin + size)


@on_cpu
def test_a_chain_refuses_what_it_would_misread() -> None:
    base, rows, a, b, high, low = random_chain(1, 300, 8, 0)
    out = torch.empty_like(base)
    with pytest.raises(ValueError, match="at most 256"):
        chain(base, rows, a, b, high, low, out, None, 0, LONGEST_BLOCK + 1)
    with pytest.raises(ValueError, match="contiguous"):
        chain(base[:, :, ::2], rows, a[:, :, ::2], b[:, :, ::2], high[:, :, ::2], low[:, :, ::2], out, None, 0, 5)


def expected_sweep(
    R: Tensor, H: Tensor, scale: Tensor, up: Tensor, pull: Tensor, curvature: Tensor
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """`up` and R behind one sweep in float64, flip by flip, as the head of `coordinate` defines it.

    Columns whose choice float32 might see otherwise are kept from flipping: their `curvature` is made infinite.
    """
    rest, state, resist = R.double().numpy().copy(), up.numpy().copy(), curvature.numpy()
    steps, pulls = scale.double().expand_as(R).numpy(), pull.double().numpy()
    for g, j, o in np.ndindex(R.shape):
        d = steps[g, j, o] * (-1 if state[g, j, o] else 1)
        change = 2 * d * rest[g, j, o] + float(resist[g, j, o]) + np.sign(d) * pulls[g, j, o]
        if abs(change) < 1e-3:
            resist[g, j, o] = np.inf
        elif change < 0:
            state[g, j, o] ^= True
            rest[g, :, o] += d * H[g, :, j].double().numpy()
    return state, rest


@on_cpu
@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 50),
    own_scales=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_sweep_kernel_is_the_definition(
    groups: int, inputs: int, outputs: int, own_scales: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    shape = (groups, inputs, outputs)
    x = torch.randn(groups, 2 * inputs, inputs, generator=g)
    H = (x.transpose(1, 2) @ x / len(x[0])).contiguous()
    scale = torch.rand(groups, inputs if own_scales else 1, outputs, generator=g) + 0.5
    up, pull, R = torch.rand(shape, generator=g) < 0.5, torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    curvature = (scale.square() * H.diagonal(dim1=1, dim2=2)[..., None]).contiguous()
    before = up.clone()
    wanted, rest = expected_sweep(R, H, scale, up, pull, curvature)
    flips = sweep_on_cpu(R, H, scale, up, pull, curvature)
    assert np.array_equal(up.numpy(), wanted)
    assert flips == int((up != before).sum())
    np.testing.assert_allclose(R.numpy(), rest, rtol=1e-4, atol=1e-4)


def random_problem(groups: int, outputs: int, inputs: int, device: str = "cpu") -> RoundingProblem:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(groups, outputs, inputs, generator=g).to(device)
    x = (torch.randn(groups, 4 * inputs, inputs, generator=g).relu() + 0.1).to(device)
    moments = Moments(weight)
    moments.add(x, x @ weight.transpose(1, 2) + 0.01)
    return make_problem(weight, WeightGrid(symmetric_scale(weight.flatten(0, 1), 4), 4), moments.mean())


def solutions(problem: RoundingProblem) -> list[Tensor]:
    plain = Coordinate(lambda_e=0.0, start="nearest", sweeps=3)
    within = solve_within(problem, Coordinate(fidelity=1.1))[0]
    return [within, solve_coordinate(problem, plain), solve_coordinate(problem, Coordinate(lambda_e=0.01))]


def assert_the_same_without(problem: RoundingProblem, monkeypatch: pytest.MonkeyPatch, most: float) -> None:
    """Codes with the kernel and in panels: the same but for columns on the border, where the order of sums decides."""
    found = solutions(problem)
    for module in (coordinate, greedy):
        monkeypatch.setattr(module, "has_kernel", lambda _: False)
    for a, b in zip(found, solutions(problem), strict=True):
        assert float((a != b).float().mean()) <= most


SHAPES = pytest.mark.parametrize("shape", [(1, 20, 300), (1, 150, 40), (40, 1, 9), (3, 17, 150)], ids=str)


@on_cpu
@SHAPES
def test_solutions_are_those_of_the_panels(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_the_same_without(random_problem(*shape), monkeypatch, 1e-3)


@on_gpu
@SHAPES
def test_solutions_on_a_gpu_are_those_of_the_panels(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernel(torch.device("cuda")):
        pytest.skip("triton is not installed")
    assert_the_same_without(random_problem(*shape, device="cuda"), monkeypatch, 1e-3)


# Triton reads the variable when it is imported, and keeps to it: the interpreter needs a process of its own.
INTERPRETED = """
import torch
from efrapq.rounding import chain as module
from tests_chain import check, random_chain

for symmetric in (False, True):
    module._on_cpu = lambda *a: module._on_gpu(*a, symmetric=symmetric)
    for groups, inputs, outputs, begin, end in ((1, 20, 11, 4, 18), (2, 9, 1, 0, 9), (1, 3, 8, 1, 2)):
        base, rows, *others = random_chain(groups, inputs, outputs, 0)
        rows = rows + rows.transpose(1, 2) if symmetric else rows
        check(base, rows, *others, begin, end)
print("as defined")
"""


@interpreted
def test_the_gpu_kernel_is_the_definition(tmp_path: Path) -> None:
    (tmp_path / "tests_chain.py").write_text(Path(__file__).read_text())
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout == "as defined\n", done.stderr
