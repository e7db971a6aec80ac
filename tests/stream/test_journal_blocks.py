"""Layers with one scale per block of inputs in the journal of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from efrapq.errors import UsageError
from efrapq.graph.quantized import QuantizedWeight
from efrapq.stream.journal import Journal
from efrapq.stream.settings import LayerReport


def layer(shape: tuple[int, int], scale: tuple[int, ...], axis: int, block: int) -> tuple[QuantizedWeight, LayerReport]:
    rng = np.random.default_rng(0)
    codes = rng.integers(-7, 8, shape, dtype=np.int8)
    weight = QuantizedWeight(codes, rng.random(scale, dtype=np.float32), axis, 4, block)
    return weight, LayerReport("w", "MatMul", 4, shape, 0.1, 0.2, 30.0, 0.0, 2.0, 1.0, 99, 0.5, block)


@pytest.mark.parametrize(
    ("shape", "scale", "axis", "block"),
    [((64, 5), (2, 5), 1, 32), ((5, 64), (5, 4), 0, 16), ((32, 3), (1, 3), 1, 32), ((6, 5), (5,), 1, 0)],
)
def test_a_layer_comes_back_as_it_was(
    tmp_path: Path, shape: tuple[int, int], scale: tuple[int, ...], axis: int, block: int
) -> None:
    journal = Journal(tmp_path / "j", "key")
    weight, report = layer(shape, scale, axis, block)
    journal.put("w", weight, report)
    found = journal.get("w", shape)
    assert found is not None
    assert found[1] == report
    np.testing.assert_array_equal(found[0].codes, weight.codes)
    np.testing.assert_array_equal(found[0].scale, weight.scale)
    np.testing.assert_array_equal(found[0].dequantized(), weight.dequantized())
    assert (found[0].axis, found[0].bits, found[0].block) == (axis, 4, block)


@pytest.mark.parametrize(
    ("scale", "axis", "block"),
    [
        ((2, 5), 1, 16),
        ((5,), 1, 32),
        ((2, 5), 1, 0),
        ((2, 5), 0, 32),
        ((2, 5), 1, -32),
        ((2, 5), 1, 48),
        ((2, 5), 2, 32),
    ],
)
def test_scales_that_do_not_fit_are_of_another_layer(
    tmp_path: Path, scale: tuple[int, ...], axis: int, block: int
) -> None:
    journal = Journal(tmp_path / "j", "key")
    journal.put("w", *layer((64, 5), scale, axis, block))
    with pytest.raises(UsageError, match="is of another layer; leave out --resume"):
        journal.get("w", (64, 5))
