"""Gram matrices against NumPy, and sums of moments that do not depend on how their rows were cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from efrapq.grid import ActivationGrid, WeightGrid, symmetric_scale
from efrapq.rounding import (
    Coordinate,
    Moments,
    exact_integers,
    make_problem,
    solve_coordinate,
)
from efrapq.rounding.gram import MOST_ROWS, PANEL, gram_, gram_codes_, mirror_

INTEGERS = pytest.mark.skipif(not exact_integers(), reason="this CPU has no VNNI: codes are multiplied as float32")


def cuts(total: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, total)) for i in range(0, total, chunk)]


# Of reals.


@pytest.mark.parametrize("groups", [1, 3], ids=["one-group", "groups"])
@pytest.mark.parametrize("inputs", [1, 2, 37, PANEL, PANEL + 1, 2 * PANEL + 77], ids=lambda d: f"D{d}")
@pytest.mark.parametrize("chunk", [1000, 11], ids=["whole", "chunks"])
def test_gram_is_numpy_s(groups: int, inputs: int, chunk: int) -> None:
    rows = 40
    x = torch.randn(groups, rows, inputs, generator=torch.Generator().manual_seed(inputs)) + 0.5
    total = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
    for cut in cuts(rows, chunk):
        gram_(total, x[:, cut])
    H = mirror_(total).numpy()
    xd = x.double().numpy()
    expected = xd.transpose(0, 2, 1) @ xd
    # float32 products of at most 40 rows: a few roundings, on the scale of what is summed.
    largest = np.sqrt(np.einsum("grd,grd->gd", xd, xd))
    assert (np.abs(H - expected) <= 1e-6 * largest[:, :, None] * largest[:, None, :]).all()
    assert np.array_equal(H, H.transpose(0, 2, 1))


def test_below_the_diagonal_panels_nothing_is_computed() -> None:
    inputs = PANEL + 3
    total = torch.zeros(1, inputs, inputs, dtype=torch.float64)
    gram_(total, torch.ones(1, 2, inputs))
    assert not total[:, PANEL:, :PANEL].any()
    assert total[:, :PANEL].eq(2).all()
    assert mirror_(total).eq(2).all()


# Of codes.


def integer_gram(codes: NDArray[np.uint8], zero_point: int) -> NDArray[np.int64]:
    centred = codes.astype(np.int64) - zero_point
    return centred.T @ centred


@INTEGERS
@given(st.data())
@hypothesis_settings(deadline=None, max_examples=80)
def test_gram_of_codes_is_exact(data: st.DataObject) -> None:
    rows, inputs = data.draw(st.integers(1, 70), "rows"), data.draw(st.integers(1, 40), "inputs")
    zero_point, chunk = data.draw(st.integers(0, 255), "zero point"), data.draw(st.integers(1, 70), "chunk")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    codes = rng.integers(0, 256, (rows, inputs), dtype=np.uint8)
    codes[rng.random(codes.shape) < data.draw(st.sampled_from([0.0, 0.5, 1.0]), "extremes")] = 255 * rng.integers(0, 2)
    total = torch.zeros(inputs, inputs, dtype=torch.float64)
    for cut in cuts(rows, chunk):
        gram_codes_(total, torch.from_numpy(codes[cut]), zero_point)
    assert np.array_equal(mirror_(total).numpy(), integer_gram(codes, zero_point))


@INTEGERS
@pytest.mark.parametrize("zero_point", [0, 17, 128, 255], ids=lambda z: f"zero{z}")
@pytest.mark.parametrize("inputs", [1, PANEL, PANEL + 5, 2 * PANEL + 77], ids=lambda d: f"D{d}")
def test_gram_of_codes_over_panels_and_chunks(zero_point: int, inputs: int) -> None:
    codes = np.random.default_rng(inputs).integers(0, 256, (90, inputs), dtype=np.uint8)
    total = torch.zeros(inputs, inputs, dtype=torch.float64)
    for cut in cuts(90, 32):
        gram_codes_(total, torch.from_numpy(codes[cut]), zero_point)
    # In float64 NumPy for speed: below 2^53, and so exact as well.
    centred = codes.astype(np.float64) - zero_point
    assert np.array_equal(mirror_(total).numpy(), centred.T @ centred)


@INTEGERS
@pytest.mark.parametrize("code", [0, 1, 255], ids=lambda c: f"code{c}")
def test_the_largest_products_fit_as_many_rows_as_are_taken(code: int) -> None:
    """A channel that ReLU has silenced holds code 0 in every row, which is -128 to the integer product."""
    codes = torch.full((MOST_ROWS, 3), code, dtype=torch.uint8)
    codes[:, 1] = 255 - code
    total = torch.zeros(3, 3, dtype=torch.float64)
    gram_codes_(total, codes, 0)
    pattern = np.array([code, 255 - code, code], dtype=np.float64)
    assert np.array_equal(mirror_(total).numpy(), MOST_ROWS * np.outer(pattern, pattern))


@INTEGERS
@pytest.mark.parametrize(
    ("rows", "inputs", "strides"),
    [(1, 40, (0, 1)), (1, 40, (1, 1)), (9, 1, (1, 0)), (9, 1, (1, 7)), (9, 40, (1, 9)), (1, 1, (0, 0))],
    ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else str(v),
)
def test_strides_do_not_matter(rows: int, inputs: int, strides: tuple[int, int]) -> None:
    """torch's integer product takes the stride of a dimension of one at its word (pytorch/pytorch#195066)."""
    pool = torch.randint(0, 256, (2000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    codes = pool.as_strided((rows, inputs), strides)
    total = torch.zeros(inputs, inputs, dtype=torch.float64)
    gram_codes_(total, codes, 31)
    assert np.array_equal(mirror_(total).numpy(), integer_gram(codes.numpy(), 31))


def test_more_rows_are_refused() -> None:
    total = torch.zeros(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="at most"):
        gram_codes_(total, torch.zeros(MOST_ROWS + 1, 1, dtype=torch.uint8), 0)
    assert not total.any()


# Moments of codes.

GRID = ActivationGrid(float(np.float32(0.037)), 93, 8)


def layer_rows(rows: int = 120, outputs: int = 5, inputs: int = 23, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """weight (1, O, D), codes (1, R, D) on GRID, and the float network's outputs (1, R, O)."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, outputs, inputs, generator=g)
    x = (torch.randn(1, rows, inputs, generator=g) @ torch.randn(1, inputs, inputs, generator=g)).relu() / 4
    return weight, GRID.quantize(x), x @ weight.transpose(1, 2)


def assert_close(ours: Tensor, reference: Tensor, weight: Tensor, H: Tensor) -> None:
    """g to float32: its products are of what is left of outputs that all but cancel, on the scale of the outputs."""
    outputs = float((weight.double() @ H @ weight.double().transpose(1, 2)).max()) ** 0.5
    assert float((ours - reference).abs().max()) <= 1e-6 * outputs * float(H.max()) ** 0.5


def summed(weight: Tensor, codes: Tensor, y: Tensor, chunk: int) -> Moments:
    moments = Moments(weight)
    for cut in cuts(codes.shape[1], chunk):
        moments.add_codes(codes[:, cut], GRID, y[:, cut])
    return moments


@INTEGERS
@pytest.mark.parametrize("chunk", [1, 7, 64, 119])
def test_h_of_codes_is_the_same_bits_in_any_chunks(chunk: int) -> None:
    weight, codes, y = layer_rows()
    whole = summed(weight, codes, y, 1000).mean()
    parts = summed(weight, codes, y, chunk).mean()
    assert torch.equal(whole[0], parts[0])
    # g and c are sums of float32 products, whose order the chunks do change.
    assert_close(parts[1], whole[1], weight, whole[0])
    assert parts[2] == pytest.approx(whole[2], rel=1e-4)


@INTEGERS
def test_moments_of_codes_are_those_of_what_they_stand_for() -> None:
    weight, codes, y = layer_rows()
    H, cross, error = summed(weight, codes, y, 50).mean()
    reals = Moments(weight)
    reals.add(GRID.dequantize(codes), y)
    assert float((H - reals.mean()[0]).abs().max()) <= 1e-6 * float(H.abs().max())
    x = (codes.numpy()[0].astype(np.float64) - GRID.zero_point) * GRID.scale
    assert np.abs(H[0].numpy() - x.T @ x / 120).max() <= 1e-14 * float(H.abs().max())
    changed = x @ weight[0].double().numpy().T - y[0].double().numpy()
    assert_close(cross[0], torch.from_numpy(changed.T @ x / 120), weight, H)
    assert error == pytest.approx((changed**2).sum() / 120, rel=1e-4)


@INTEGERS
def test_one_chunk_may_hold_more_rows_than_one_product() -> None:
    codes = torch.zeros(1, MOST_ROWS + 10, 2, dtype=torch.uint8)
    codes[:, -10:] = 255
    moments = Moments(torch.ones(1, 1, 2))
    moments.add_codes(codes, ActivationGrid(1.0, 0, 8), torch.zeros(1, MOST_ROWS + 10, 1))
    H, _, _ = moments.mean()
    assert torch.equal(H, torch.full((1, 2, 2), 10 * 255.0**2, dtype=torch.float64) / (MOST_ROWS + 10))


@INTEGERS
def test_codes_and_reals_do_not_mix() -> None:
    weight, codes, y = layer_rows(rows=20)
    other_grid = ActivationGrid(2 * GRID.scale, GRID.zero_point, 8)
    of_codes = summed(weight, codes, y, 20)
    of_reals = Moments(weight)
    of_reals.add(GRID.dequantize(codes), y)
    before = of_codes.mean()
    for refused in (
        lambda: of_codes.add(GRID.dequantize(codes), y),
        lambda: of_reals.add_codes(codes, GRID, y),
        lambda: of_codes.add_codes(codes, other_grid, y),
        lambda: of_codes.__iadd__(of_reals),
        lambda: of_reals.__iadd__(of_codes),
    ):
        with pytest.raises(ValueError, match="do not go into one sum"):
            refused()
    assert of_codes.rows == of_reals.rows == 20
    for ours, kept in zip(of_codes.mean(), before, strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(kept))


# Moments from several machines.


@pytest.mark.parametrize("kind", [pytest.param("codes", marks=INTEGERS), "reals"])
def test_shares_add_up_to_the_moments_of_all_rows(kind: str) -> None:
    weight, codes, y = layer_rows(rows=100)

    def share(cut: slice) -> Moments:
        moments = Moments(weight)
        if kind == "codes":
            moments.add_codes(codes[:, cut], GRID, y[:, cut])
        else:
            moments.add(GRID.dequantize(codes[:, cut]), y[:, cut])
        return moments

    total = Moments(weight)
    for cut in (slice(0, 0), slice(0, 31), slice(31, 32), slice(32, 100)):
        total += share(cut) if cut.stop else Moments(weight)
    everything = share(slice(0, 100))
    assert total.rows == 100
    (H, cross, error), (all_h, all_cross, all_error) = total.mean(), everything.mean()
    if kind == "codes":
        assert torch.equal(H, all_h)
    else:
        assert float((H - all_h).abs().max()) <= 1e-6 * float(all_h.abs().max())
    assert_close(cross, all_cross, weight, H)
    assert error == pytest.approx(all_error, rel=1e-4)


@INTEGERS
def test_a_share_without_rows_has_no_kind() -> None:
    weight, codes, y = layer_rows(rows=20)
    empty, of_codes, of_reals = Moments(weight), summed(weight, codes, y, 20), Moments(weight)
    of_reals.add(GRID.dequantize(codes), y)
    expected = of_codes.mean()[0]
    of_codes += empty
    assert torch.equal(of_codes.mean()[0], expected)
    of_reals += empty
    empty += of_codes
    assert torch.equal(empty.mean()[0], expected)
    with pytest.raises(ValueError, match="do not go into one sum"):
        empty += of_reals


SOLVERS = pytest.mark.parametrize(
    "settings",
    [Coordinate(lambda_e=v, start=start) for start in ("greedy", "nearest") for v in (0.0, 1e-3)],
    ids=lambda s: f"{s.start}-lambda{s.lambda_e:g}",
)


def whole_and_cut(settings: Coordinate, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """The choice for one problem, and the choice put together from five sets of its output rows, solved alone."""
    g = torch.Generator().manual_seed(outputs)
    weight = torch.randn(1, outputs, inputs, generator=g)
    x = (torch.randn(1, 4 * inputs, inputs, generator=g) @ torch.randn(1, inputs, inputs, generator=g)).relu()
    moments = Moments(weight)
    moments.add(x + 0.05 * torch.randn(x.shape, generator=g), x @ weight.transpose(1, 2))
    H, cross, error = moments.mean()
    scale = symmetric_scale(weight[0], 4)
    whole = make_problem(weight, WeightGrid(scale, 4), (H, cross, error))
    parts = []
    for rows in cuts(outputs, -(-outputs // 5)):
        part = make_problem(weight[:, rows], WeightGrid(scale[rows], 4), (H, cross[:, rows], 0.0))
        parts.append(solve_coordinate(part, settings))
    return solve_coordinate(whole, settings), torch.cat(parts, dim=1)


@SOLVERS
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 40), (24, 150), (64, 150)], ids=["5x40", "24x150", "64x150"])
def test_rows_may_be_solved_elsewhere(settings: Coordinate, outputs: int, inputs: int) -> None:
    """A machine that has the sums of all samples may take any share of the output rows."""
    together, apart = whole_and_cut(settings, outputs, inputs)
    assert torch.equal(together, apart)
