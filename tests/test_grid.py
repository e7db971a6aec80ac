"""The grid against an independent NumPy reference and against ONNX Runtime's own QuantizeLinear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from efrapq.grid import (
    SMALLEST_SCALE,
    ActivationGrid,
    WeightGrid,
    activation_grid,
    code_range,
    grid_position,
    nearest_codes,
    symmetric_scale,
)

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 5, 8], ids=lambda b: f"{b}bit")
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
MATRICES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=FLOATS)


def reference_codes(weight: NDArray[np.float32], scale: NDArray[np.float32], bits: int) -> NDArray[np.int64]:
    """QuantizeLinear as the specification words it, float32, half to even, on ±(2^(bits-1) - 1)."""
    with np.errstate(over="ignore"):
        u = weight / scale[:, None]
    limit = 2 ** (bits - 1) - 1
    return np.clip(np.rint(u), -limit, limit).astype(np.int64)


def reference_scale(weight: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    scale = np.abs(weight).max(axis=1) / np.float32(2 ** (bits - 1) - 1)
    return np.maximum(scale, np.float32(1e-20))


@pytest.fixture(scope="module")
def ort_quantize() -> Callable[..., NDArray[Any]]:
    """(x, scale, zero_point of the wanted type, axis) → the codes that ONNX Runtime computes."""
    onnx_types = {
        np.dtype(np.int8): TensorProto.INT8,
        np.dtype(np.uint8): TensorProto.UINT8,
        np.dtype(ml_dtypes.int4): TensorProto.INT4,
    }
    import onnxruntime as ort

    def quantize(x: NDArray[np.float32], scale: NDArray[np.float32], zero_point: NDArray[Any], axis: int = 0) -> Any:
        kind = onnx_types[zero_point.dtype]
        nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=axis)]
        if kind == TensorProto.INT4:  # onnxruntime's Python API does not hand out int4 arrays
            nodes.append(helper.make_node("Cast", ["q"], ["y"], to=TensorProto.INT8))
        graph = helper.make_graph(
            nodes,
            "quantize",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
            [
                helper.make_tensor_value_info(
                    "y" if kind == TensorProto.INT4 else "q",
                    TensorProto.INT8 if kind == TensorProto.INT4 else kind,
                    list(x.shape),
                )
            ],
            [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero_point, "z")],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": x})[0]

    return quantize


@pytest.mark.parametrize(("bits", "expected"), [(2, (-1, 1)), (4, (-7, 7)), (8, (-127, 127))])
def test_code_range_is_symmetric(bits: int, expected: tuple[int, int]) -> None:
    assert code_range(bits) == expected


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_code_range_refuses_other_widths(bits: int) -> None:
    with pytest.raises(ValueError, match="2 to 8"):
        code_range(bits)


@BITS
@given(weight=MATRICES)
@settings(deadline=None, max_examples=60)
def test_nearest_codes_equal_numpy(bits: int, weight: NDArray[np.float32]) -> None:
    scale = symmetric_scale(torch.from_numpy(weight), bits)
    assert np.array_equal(scale.numpy(), reference_scale(weight, bits))
    codes = nearest_codes(torch.from_numpy(weight), WeightGrid(scale, bits))
    assert codes.dtype == torch.int8
    assert np.array_equal(codes.numpy(), reference_codes(weight, scale.numpy(), bits))


@BITS
def test_ties_go_to_the_even_code(bits: int) -> None:
    limit = 2 ** (bits - 1) - 1
    halves = np.arange(-limit - 0.5, limit + 1, 1, dtype=np.float32)[None]
    codes = nearest_codes(torch.from_numpy(halves), WeightGrid(torch.ones(1), bits)).numpy()[0]
    inner = codes[1:-1]
    assert (np.abs(inner - halves[0, 1:-1]) == 0.5).all()
    assert (inner % 2 == 0).all()
    assert (codes[0], codes[-1]) == (-limit, limit)


@pytest.mark.parametrize(("bits", "element"), [(8, np.int8), (4, ml_dtypes.int4)], ids=["int8", "int4"])
@pytest.mark.parametrize("seed", range(3))
def test_nearest_codes_equal_onnxruntime_per_axis(
    ort_quantize: Callable[..., Any], bits: int, element: Any, seed: int
) -> None:
    """Where absmax sets the scale no code saturates, so ORT's wider two's complement range gives the same codes."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((16, 37)) * 10.0 ** rng.uniform(-6, 4, (16, 1))).astype(np.float32)
    weight[0], weight[1, :5] = 0, 0
    scale = symmetric_scale(torch.from_numpy(weight), bits).numpy()
    weight[2] = np.float32(scale[2]) * (np.arange(37) % (2**bits - 2) - 2 ** (bits - 1) + 1.5).astype(np.float32)
    weight[2] = weight[2].clip(-scale[2] * (2 ** (bits - 1) - 1), scale[2] * (2 ** (bits - 1) - 1))  # ties
    codes = nearest_codes(torch.from_numpy(weight), WeightGrid(torch.from_numpy(scale), bits))
    assert np.array_equal(codes.numpy(), ort_quantize(weight, scale, np.zeros(16, element)))


def test_scale_floor_for_zero_and_denormal_channels() -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-42, -1e-44], [1.0, 0.0]])
    scale = symmetric_scale(weight, 4)
    assert (scale[:2] == SMALLEST_SCALE).all()
    assert nearest_codes(weight, WeightGrid(scale, 4))[:2].eq(0).all()


def test_scale_lower_bound_is_respected() -> None:
    weight = torch.tensor([[7.0, 0.0], [7.0, 0.0]])
    assert symmetric_scale(weight, 4, at_least=torch.tensor([0.25, 3.0])).tolist() == [1.0, 3.0]


@BITS
@given(weight=MATRICES, stretch=st.sampled_from([1.0, 0.3, 5.0]))
@settings(deadline=None, max_examples=60)
def test_position_splits_the_weight(bits: int, weight: NDArray[np.float32], stretch: float) -> None:
    w = torch.from_numpy(weight)
    grid = WeightGrid((symmetric_scale(w, bits) * stretch).clamp(SMALLEST_SCALE, 3e38), bits)
    floor, residue = grid_position(w, grid)
    with np.errstate(over="ignore"):
        u = (weight / grid.scale.numpy()[:, None]).astype(np.float64)
    inside = np.abs(u) <= grid.qmax
    f, r = floor.double().numpy(), residue.double().numpy()
    assert np.array_equal(f, np.rint(f))
    assert ((r >= 0) & (r <= 1)).all()
    # u is reproduced exactly, but for tiny negatives, where 1 - |u| is rounded to float32.
    assert np.abs((f + r - u)[inside]).max(initial=0) <= 2**-25
    assert ((f + r) == u)[inside & ~((u < 0) & (u > -1))].all()
    # A code that is movable stays on the grid both ways; a clipped weight has one code only.
    up = r > 0
    assert ((f >= grid.qmin) & (f + up <= grid.qmax)).all()
    assert not up[~inside].any()
    assert np.array_equal(f[~inside], (np.sign(u) * grid.qmax)[~inside])


def test_position_of_grid_points_is_immovable() -> None:
    weight = torch.arange(-9.0, 10.0)[None]
    floor, residue = grid_position(weight, WeightGrid(torch.ones(1), 4))
    assert residue.eq(0).all()
    assert torch.equal(floor, weight.clamp(-7, 7))


# Activations.


RANGES = [(-1.0, 3.0), (0.0, 6.0), (-4.0, 0.0), (0.5, 2.0), (-3.0, -1.0), (-1e-6, 1e-5), (-2e38, 3e38), (0.0, 1e-42)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_activation_grid_holds_zero_and_the_range(low: float, high: float, bits: int) -> None:
    grid = activation_grid(low, high, bits)
    assert grid.scale == float(np.float32(grid.scale)) > 0
    assert 0 <= grid.zero_point <= 2**bits - 1
    zero = torch.zeros(3)
    assert grid.dequantize(grid.quantize(zero)).eq(0).all()
    # The zero point is an integer, so either end may be cut by half a step; float32 rounds the scale.
    slack = grid.scale * (0.5 + 1e-4)
    assert (grid.qmin - grid.zero_point) * grid.scale <= min(low, 0) + slack
    assert (grid.qmax - grid.zero_point) * grid.scale >= max(high, 0) - slack


@pytest.mark.parametrize("bits", [4, 8])
@given(low=FLOATS, high=FLOATS)
@settings(deadline=None, max_examples=200)
def test_activation_grid_of_any_range(bits: int, low: float, high: float) -> None:
    grid = activation_grid(low, high, bits)
    assert np.isfinite(grid.scale)
    assert grid.scale >= np.float32(SMALLEST_SCALE)
    ends = torch.tensor([min(low, 0.0), 0.0, max(high, 0.0)])
    back = grid.dequantize(grid.quantize(ends)).double()
    assert back[1] == 0
    assert ((back - ends.double()).abs() <= grid.scale * (0.5 + 1e-4)).all()


def test_relu_range_starts_at_zero() -> None:
    assert activation_grid(0.0, 5.0, 8).zero_point == 0
    assert activation_grid(0.1, 5.0, 4).zero_point == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_dead_activation(bits: int) -> None:
    grid = activation_grid(0.0, 0.0, bits)
    assert grid == ActivationGrid(1.0, 0, bits)


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_activation_codes_equal_onnxruntime(ort_quantize: Callable[..., Any], low: float, high: float) -> None:
    grid = activation_grid(low, high, 8)
    rng = np.random.default_rng(0)
    span = np.float64(min(max(abs(low), abs(high)) * 1.5, 3e38))
    steps = (np.arange(-300, 300) * 0.5 * np.float64(grid.scale)).clip(-3e38, 3e38)  # grid points and ties
    x = np.concatenate([rng.uniform(-span, span, 4000), steps, [0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38]])
    x = x.astype(np.float32)
    expected = ort_quantize(x, np.array(grid.scale, np.float32), np.array(grid.zero_point, np.uint8))
    assert np.array_equal(grid.quantize(torch.from_numpy(x)).numpy(), expected)


@pytest.mark.parametrize("zero_point", [0, 37, 255])
def test_dequantize_equals_onnxruntime(
    make_model: Callable[..., onnx.ModelProto], run_ort: Callable[..., Any], zero_point: int
) -> None:
    grid = ActivationGrid(float(np.float32(0.0123)), zero_point, 8)
    codes = np.arange(256, dtype=np.uint8)
    node = helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"])
    constants = {"c": codes, "s": np.array(grid.scale, np.float32), "z": np.array(zero_point, np.uint8)}
    expected = run_ort(make_model([node], {}, {"y": [256]}, constants))[0]
    assert np.array_equal(grid.dequantize(torch.from_numpy(codes)).numpy(), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_survive_the_round_trip(bits: int) -> None:
    """Values already on the grid keep their code: moving operators requantize on their input's grid."""
    for scale in np.float32(10.0) ** np.linspace(-19, 30, 99, dtype=np.float32):
        grid = ActivationGrid(float(scale), 2 ** (bits - 1) - 3, bits)
        codes = torch.arange(2**bits, dtype=torch.uint8)
        assert torch.equal(grid.quantize(grid.dequantize(codes)), codes)


def test_quantize_leaves_its_input_alone() -> None:
    x = torch.linspace(-1, 1, 7)
    before = x.clone()
    activation_grid(-1, 1, 8).quantize(x)
    assert torch.equal(x, before)


def test_fake_quantize_is_on_the_grid_with_a_straight_gradient() -> None:
    grid = activation_grid(-1.0, 3.0, 4)
    x = torch.linspace(-2, 4, 61, requires_grad=True)
    y = grid.fake_quantize(x)
    on_grid = grid.dequantize(grid.quantize(x.detach()))
    assert float((y.detach() - on_grid).abs().max()) <= 1e-6
    y.sum().backward()
    low, high = -grid.zero_point * grid.scale, (15 - grid.zero_point) * grid.scale
    inside = (x.detach() > low) & (x.detach() < high)
    assert x.grad is not None
    assert torch.equal(x.grad, inside.float())
