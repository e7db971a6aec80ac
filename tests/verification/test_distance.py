"""Distance, spread and agreement over pieces, against the whole in float64."""

from __future__ import annotations

import numpy as np
import pytest

from efrapq.verification.distance import Agreement, Distance, Spread

F32 = np.float32


def test_the_spread_of_pieces_is_that_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    whole = (1000 + rng.standard_normal((30, 4, 5))).astype(F32)
    expected = np.linalg.norm(whole.astype(np.float64) - whole.astype(np.float64).mean(0))
    for size in (30, 7, 1):
        spread = Spread()
        for start in range(0, 30, size):
            spread.add(whole[start : start + size])
        assert spread.value == pytest.approx(float(expected), rel=1e-9)


def test_the_spread_does_not_drown_in_a_constant_part() -> None:
    # 1e6 + {0, 1, 2}: squares of the values leave no digit of the spread in float64 sums of many of them.
    values = (1_000_000 + np.arange(3, dtype=F32)[:, None] * np.ones((1, 1000), F32)).astype(F32)
    spread = Spread()
    spread.add(values)
    assert spread.value == pytest.approx(np.sqrt(2 * 1000), rel=1e-12)


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [np.ones((1, 3), F32)],
        [np.full((9, 3), 0.1, F32)],
        [np.ones((2, 3), F32), np.zeros((2, 4), F32)],
        [np.arange(6, dtype=F32).reshape(2, 3), None],
        [np.array([[1.0], [np.nan]], F32)],
        [np.array([[1.0], [np.inf]], F32)],
    ],
    ids=["nothing", "one sample", "all alike", "other sizes", "no axis of samples", "NaN", "infinity"],
)
def test_a_spread_that_is_not_defined_is_unknown(pieces: list[np.ndarray | None]) -> None:
    spread = Spread()
    for piece in pieces:
        spread.add(piece)
    assert spread.value is None


def test_an_error_beside_the_spread() -> None:
    a = np.array([[10.0, 0.0], [10.0, 4.0]], F32)
    distance, spread = Distance(), Spread()
    distance.add(a, a + np.array([[3.0, 0.0], [0.0, 0.0]], F32))
    spread.add(a)
    assert spread.value == pytest.approx(np.sqrt(8))
    assert distance.error_of(spread.value) == pytest.approx(3 / np.sqrt(8), abs=1e-6)
    assert distance.error_of(None) is None
    distance.add(a, a * np.nan)
    assert distance.error_of(spread.value) is None


def test_agreement_counts_positions() -> None:
    agreement = Agreement()
    assert agreement.percent is None
    agreement.add(np.array([[0, 1], [2, 3]]), np.array([[0, 1], [2, 0]]))
    agreement.add(np.array([5, 5, 5, 5]), np.array([5, 0, 0, 5]))
    assert agreement.positions == 8
    assert agreement.percent == 62.5
    agreement.add(np.zeros(3), np.zeros(4))
    assert agreement.percent is None
