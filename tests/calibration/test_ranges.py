"""Activation ranges against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from efrapq.calibration.ranges import RANGE_METHODS, Histogram, calibrate, extremes
from efrapq.errors import UnsupportedModelError
from efrapq.grid import ActivationGrid, activation_grid

METHODS = pytest.mark.parametrize("method", RANGE_METHODS)
BITS = pytest.mark.parametrize("bits", [4, 8])


def chunks(x: NDArray[np.float32], size: int = 1000) -> list[torch.Tensor]:
    return [torch.from_numpy(x[i : i + size]) for i in range(0, len(x), size)]


def samples(kind: str) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(40_000).astype(np.float32)
    if kind == "relu":
        return np.maximum(x, 0)
    if kind == "outlier":
        x[17] = 60
    return x


KINDS = pytest.mark.parametrize("kind", ["normal", "relu", "outlier"])


def span(grid: ActivationGrid) -> tuple[float, float]:
    return (grid.qmin - grid.zero_point) * grid.scale, (grid.qmax - grid.zero_point) * grid.scale


def squared_error(x: NDArray[np.float32], grid: ActivationGrid) -> float:
    """Mean squared rounding error, in float64 NumPy."""
    codes = np.clip(np.rint(x.astype(np.float64) / grid.scale) + grid.zero_point, grid.qmin, grid.qmax)
    return float((((codes - grid.zero_point) * grid.scale - x) ** 2).mean())


@KINDS
@BITS
def test_minmax(kind: str, bits: int) -> None:
    x = samples(kind)
    assert calibrate(chunks(x), bits, "minmax") == activation_grid(float(x.min()), float(x.max()), bits)


@KINDS
@BITS
def test_percentile(kind: str, bits: int) -> None:
    x = samples(kind)
    low, high = span(calibrate(chunks(x), bits, "percentile"))
    bin_width = (float(x.max()) - min(float(x.min()), 0)) / 4096
    # A bin of the histogram, half a step for the zero point, and no more than one sample off.
    slack = 2 * bin_width + (high - low) / (2**bits - 1) / 2
    for end, share in ((high, 0.9999), (low, 0.0001)):
        between = [float(np.quantile(x, share, method=m)) for m in ("lower", "higher")]
        if end == low:
            between = [min(v, 0.0) for v in between]
        assert between[0] - slack <= end <= between[1] + slack


def test_percentile_cuts_the_outlier() -> None:
    assert span(calibrate(chunks(samples("outlier")), 8, "percentile"))[1] < 6


@KINDS
@BITS
def test_mse_is_the_best_shrunken_range(kind: str, bits: int) -> None:
    x = samples(kind)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    errors = [squared_error(x, activation_grid(low * s, high * s, bits)) for s in 1 - 0.01 * np.arange(80)]
    found = squared_error(x, calibrate(chunks(x), bits, "mse"))
    # The search sees a histogram instead of the values.
    assert found <= min(errors) * 1.02 + ((high - low) / 4096) ** 2 / 12
    assert found <= errors[0]


def test_mse_at_four_bits_shrinks_a_bell() -> None:
    x = samples("normal")
    assert calibrate(chunks(x), 4, "mse").scale < 0.95 * calibrate(chunks(x), 4, "minmax").scale


@pytest.mark.parametrize("method", ["percentile", "mse"])
@BITS
def test_values_beside_count_like_the_others(method: str, bits: int) -> None:
    """Whatever range they were counted over: all of them in the bins of one."""
    x, more = samples("normal"), 3 * samples("relu")
    limits = extremes(chunks(np.concatenate([x, more])))
    together = calibrate(chunks(np.concatenate([x, more])), bits, method)
    own = Histogram.of(chunks(more), *extremes(chunks(more)))
    assert calibrate(chunks(x), bits, method, limits=limits, beside=own).scale == pytest.approx(
        together.scale, rel=0.02
    )
    assert calibrate(chunks(x), bits, method, limits=limits).scale < 0.9 * together.scale


def test_histograms_add_up_in_the_bins_of_the_first() -> None:
    first, second = (Histogram(low, high, torch.ones(4096, dtype=torch.float64)) for low, high in ((0, 1), (-1, 3)))
    found = first + second
    assert (found.low, found.high) == (0, 1)
    assert float(found.counts.sum()) == 2 * 4096
    # A quarter of the second lies below, a half above.
    assert float(found.counts[0]) >= 1 + 1024
    assert float(found.counts[-1]) >= 1 + 2048


@METHODS
@BITS
def test_chunks_do_not_matter(method: str, bits: int) -> None:
    x = samples("normal")
    assert calibrate(chunks(x, 40_000), bits, method) == calibrate(chunks(x, 777), bits, method)


@METHODS
def test_chunks_of_any_shape(method: str) -> None:
    x = samples("normal")
    shaped = [torch.from_numpy(x[:24_000].reshape(10, 6, 20, 20)), torch.from_numpy(x[24_000:].reshape(40, 400))]
    assert calibrate(shaped, 8, method) == calibrate(chunks(x), 8, method)


@METHODS
@BITS
def test_dead_activation(method: str, bits: int) -> None:
    assert calibrate([torch.zeros(2, 3), torch.zeros(1, 3)], bits, method) == ActivationGrid(1.0, 0, bits)


@METHODS
@pytest.mark.parametrize("value", [2.5, -2.5])
def test_constant_activation(method: str, value: float) -> None:
    grid = calibrate([torch.full((4, 5), value)], 8, method)
    x = torch.full((1,), value)
    assert float((grid.dequantize(grid.quantize(x)) - x).abs()) <= 2.5 / 4096 + grid.scale / 2


@METHODS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_values_that_are_not_finite_are_refused(method: str, value: float, position: int) -> None:
    x = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    x[position][1, 2] = value
    with pytest.raises(UnsupportedModelError, match=r"layer1/relu.*NaN or infinite"):
        calibrate(x, 8, method, "layer1/relu")
