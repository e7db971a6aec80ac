"""The int16 pair sums of x86 without VNNI: what is reported beside what the instruction does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from efrapq.exporters import read_quantized, remarks
from efrapq.exporters.saturation import INT16_MAX, advice, saturating_layers, worst_pair_sum
from efrapq.graph.quantized import QuantizedModel
from efrapq.grid import ActivationGrid, code_range


def maddubs(x: NDArray[np.uint8], w: NDArray[np.int8]) -> tuple[int, int]:
    """VPMADDUBSW on one pair: the sum that is right, and the one that comes out."""
    right = int(x[0]) * int(w[0]) + int(x[1]) * int(w[1])
    return right, max(-32768, min(32767, right))


@given(st.integers(-128, 127), st.integers(-128, 127), st.sampled_from([15, 255]))
def test_the_worst_pair_is_the_worst_that_the_instruction_can_meet(a: int, b: int, highest: int) -> None:
    weights = np.array([a, b], np.int8)
    corners = [(x, y) for x in (0, highest) for y in (0, highest)]
    sums = [maddubs(np.array(c, np.uint8), weights) for c in corners]
    worst = worst_pair_sum([weights[None]], highest)
    assert worst == max(abs(right) for right, _ in sums)
    saturates = any(right != made for right, made in sums)
    # −32,768 itself still fits; no pair of a u8 and an s8 product reaches it.
    assert saturates == (worst > INT16_MAX)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_codes_of_up_to_seven_bits_never_saturate(bits: int) -> None:
    low, high = code_range(bits)
    for pair in ([low, low], [high, high], [low, high]):
        assert worst_pair_sum([np.array([pair], np.int8)], 255) <= INT16_MAX


def test_sixty_four_is_the_limit() -> None:
    assert worst_pair_sum([np.array([[64, 64]], np.int8)], 255) <= INT16_MAX
    assert worst_pair_sum([np.array([[-64, -64]], np.int8)], 255) <= INT16_MAX
    assert worst_pair_sum([np.array([[64, 65]], np.int8)], 255) > INT16_MAX
    assert worst_pair_sum([np.array([[127, 1]], np.int8)], 255) <= INT16_MAX
    assert worst_pair_sum([np.array([[127, -127, 127]], np.int8)], 255) <= INT16_MAX
    assert worst_pair_sum([np.array([[127]], np.int8)], 255) == 127 * 255


@pytest.fixture
def made(residual_net: Any, quantize: Any, images: Any) -> Callable[..., QuantizedModel]:
    return lambda **options: quantize(residual_net(), images(24), **options).quantized


def test_eight_bit_files_are_reported_and_seven_bit_files_are_not(made: Callable[..., QuantizedModel]) -> None:
    found = saturating_layers(made(bits=8))
    assert [s.layer for s in found] == [s.layer for s in sorted(found, key=lambda s: (-s.worst, s.layer))]
    assert "logits" in {s.layer for s in found}
    assert all(s.worst > INT16_MAX for s in found)
    assert saturating_layers(made(bits=7, edge_bits=7)) == []
    assert saturating_layers(made(bits=4, edge_bits=4)) == []
    # The first and the last layer have 8 bits by default.
    assert {s.layer for s in saturating_layers(made(bits=4))} <= {"c1", "logits"}


def test_float_activations_and_four_bit_ones_cannot_saturate(made: Callable[..., QuantizedModel]) -> None:
    assert saturating_layers(made(bits=8, act_bits=32)) == []
    quantized = made(bits=8)
    narrow = {name: ActivationGrid(g.scale, 0, 4) for name, g in quantized.activations.items()}
    assert saturating_layers(QuantizedModel(quantized.model, quantized.layers, quantized.weights, narrow)) == []


def test_a_layer_with_float_kernels_cannot_saturate(varied_net: Any, quantize: Any, images: Any) -> None:
    found = saturating_layers(quantize(varied_net(), images(24), bits=8).quantized)
    assert "up" not in {s.layer for s in found}


def test_both_orders_of_a_convolution_count(net: Any, quantize: Any, images: Any) -> None:
    """Two large codes that are neighbours only where the input channels come last."""
    n = net(channels=2)
    n.conv("input", "c1", 2, 1, bias=False)
    n.op("Relu", "c1", "a1")
    weight = n.constants["c1.weight"]
    weight[:] = 0
    weight[0, :, 1, 1] = 1.0
    found = saturating_layers(quantize(n.model(n.conv("a1", "out", 1, 1)), images(8, 2), bits=8).quantized)
    assert ("c1", 2 * 127 * 255) in [(s.layer, s.worst) for s in found]


def test_the_advice_is_given_where_it_matters(made: Callable[..., QuantizedModel]) -> None:
    quantized = made(bits=8)
    words = advice(saturating_layers(quantized), len(quantized.layers))
    assert "--bits 7 --edge-bits 7" in words
    assert words.isprintable()
    for target, expected in (("ort-x86", True), ("openvino", True), ("ort-arm", False), ("tensorrt", False)):
        assert any("saturate" in r for r in remarks(quantized, target)) == expected
    assert not any("saturate" in r for r in remarks(made(bits=7, edge_bits=7), "ort-x86"))


def test_what_a_file_says_is_what_was_solved(residual_net: Any, quantize: Any, images: Any) -> None:
    solved = quantize(residual_net(), images(24), bits=8)
    for target in ("ort-x86", "ort-arm", "portable"):
        assert saturating_layers(read_quantized(solved.export(target))) == saturating_layers(solved.quantized)
