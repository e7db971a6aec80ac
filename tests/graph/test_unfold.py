"""A layer as a matrix product: weight rows times input rows are torch's own convolution, in the same order."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efrapq.graph.layers import Layer
from efrapq.graph.unfold import Unfold, unfold_for

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    """Small integers: products and sums are exact in float32, so results are compared exactly."""
    return torch.randint(-4, 5, shape, generator=GENERATOR).float()


@dataclass(frozen=True)
class Case:
    cin: int = 4
    cout: int = 6
    kernel: tuple[int, int] = (3, 3)
    groups: int = 1
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    output_padding: tuple[int, int] = (0, 0)

    def unfold(self, op: str) -> Unfold:
        return Unfold(op, self.groups, False, self.stride, self.dilation, self.pads, self.output_padding)


CONVS = {
    "plain": Case(),
    "pointwise": Case(kernel=(1, 1)),
    "one by five": Case(kernel=(1, 5), pads=(0, 2, 0, 2)),
    "stride": Case(stride=(2, 3), pads=(1, 1, 1, 1)),
    "dilation": Case(dilation=(2, 1), pads=(2, 1, 2, 1)),
    "uneven pads": Case(pads=(0, 1, 2, 3)),
    "groups": Case(groups=2, pads=(1, 1, 1, 1)),
    "depthwise": Case(cin=6, groups=6, pads=(1, 1, 1, 1)),
    "depthwise multiplier": Case(cin=3, groups=3),
    "everything": Case(groups=2, stride=(2, 1), dilation=(1, 2), pads=(1, 0, 2, 3), kernel=(3, 2)),
}
TRANSPOSED = {
    "plain": Case(),
    "pointwise": Case(kernel=(1, 1)),
    "stride": Case(stride=(2, 3)),
    "kernel smaller than stride": Case(kernel=(2, 2), stride=(3, 3)),
    "pads": Case(stride=(2, 2), pads=(1, 1, 1, 1)),
    "pads beyond the kernel": Case(stride=(2, 2), pads=(3, 3, 3, 3)),
    "uneven pads": Case(stride=(2, 2), pads=(0, 1, 2, 1)),
    "output padding": Case(stride=(2, 2), pads=(1, 1, 1, 1), output_padding=(1, 1)),
    "output padding one side": Case(stride=(2, 3), output_padding=(1, 2)),
    "dilation": Case(dilation=(2, 1), stride=(1, 2)),
    "groups": Case(groups=2, stride=(2, 2)),
    "depthwise": Case(cin=4, cout=4, groups=4, stride=(2, 2), pads=(1, 1, 1, 1)),
    "everything": Case(
        groups=2, stride=(2, 3), dilation=(1, 2), pads=(1, 0, 2, 1), output_padding=(1, 0), kernel=(3, 2)
    ),
}


def conv(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and the output by torch."""
    x = randn(2, case.cin, 9, 8)
    weight = randn(case.cout, case.cin // case.groups, *case.kernel)
    top, left, bottom, right = case.pads
    padded = F.pad(x, (left, right, top, bottom))
    return x, weight, F.conv2d(padded, weight, None, case.stride, 0, case.dilation, case.groups)


def conv_transpose(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX pads cut the full output unevenly, which torch cannot say: cut it here."""
    x = randn(2, case.cin, 5, 4)
    weight = randn(case.cin, case.cout // case.groups, *case.kernel)
    full = F.conv_transpose2d(x, weight, None, case.stride, 0, 0, case.groups, case.dilation)
    full = F.pad(full, (0, case.output_padding[1], 0, case.output_padding[0]))
    top, left, bottom, right = case.pads
    return x, weight, full[:, :, top : full.shape[2] - bottom, left : full.shape[3] - right]


CASES = [pytest.param("Conv", c, id=f"Conv-{n}") for n, c in CONVS.items()]
CASES += [pytest.param("ConvTranspose", c, id=f"ConvTranspose-{n}") for n, c in TRANSPOSED.items()]


def rows_by_definition(y: Tensor, groups: int) -> Tensor:
    """(N, G·O, H, W) → (G, N·H·W, O), sample by sample, position by position."""
    n, channels, height, width = y.shape
    out = y.new_empty(groups, n * height * width, channels // groups)
    for g in range(groups):
        for o in range(channels // groups):
            out[g, :, o] = y[:, g * (channels // groups) + o].reshape(-1)
    return out


@pytest.mark.parametrize(("op", "case"), CASES)
@pytest.mark.parametrize("subset", [False, True], ids=["all", "subset"])
def test_weight_rows_times_input_rows_are_the_output(op: str, case: Case, subset: bool) -> None:
    x, weight, y = (conv if op == "Conv" else conv_transpose)(case)
    unfold = case.unfold(op)
    positions = None
    if subset:
        positions = torch.randperm(y.shape[2] * y.shape[3], generator=GENERATOR)[:5].sort().values
    rows = unfold.weight_rows(weight)
    assert rows.shape == (
        case.groups,
        case.cout // case.groups,
        case.cin // case.groups * case.kernel[0] * case.kernel[1],
    )
    wanted = unfold.output_rows(y, positions)
    assert torch.equal(unfold.input_rows(x, case.kernel, positions) @ rows.transpose(1, 2), wanted)
    kept = y if positions is None else y.flatten(2)[:, :, positions][..., None]
    assert torch.equal(wanted, rows_by_definition(kept, case.groups))


@pytest.mark.parametrize(("op", "case"), CASES)
def test_from_rows_is_the_inverse_of_weight_rows(op: str, case: Case) -> None:
    _, weight, _ = (conv if op == "Conv" else conv_transpose)(case)
    unfold = case.unfold(op)
    assert torch.equal(unfold.from_rows(unfold.weight_rows(weight), tuple(weight.shape)), weight)


@given(
    op=st.sampled_from(["Conv", "ConvTranspose", "Gemm", "Gemm transB", "MatMul"]),
    groups=st.integers(1, 4),
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 4),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
@settings(deadline=None, max_examples=150)
def test_rows_round_trip_for_any_shape(
    op: str, groups: int, inputs: int, outputs: int, kernel: tuple[int, int]
) -> None:
    if op == "Conv":
        shape: tuple[int, ...] = (groups * outputs, inputs, *kernel)
    elif op == "ConvTranspose":
        shape = (groups * inputs, outputs, *kernel)
    else:
        groups, kernel = 1, (1, 1)
        shape = (outputs, inputs) if op == "Gemm transB" else (inputs, outputs)
    weight = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)
    unfold = Unfold(op.split()[0], groups=groups, transposed=op == "Gemm transB")
    rows = unfold.weight_rows(weight)
    assert rows.shape == (groups, outputs, inputs * kernel[0] * kernel[1])
    assert torch.equal(unfold.from_rows(rows, shape), weight)


@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm(trans_b: int) -> None:
    x, weight = randn(7, 5), randn(3, 5) if trans_b else randn(5, 3)
    unfold = Unfold("Gemm", transposed=bool(trans_b))
    y = F.linear(x, weight if trans_b else weight.t())
    assert torch.equal(unfold.input_rows(x, (1, 1)) @ unfold.weight_rows(weight).transpose(1, 2), y[None])
    assert torch.equal(unfold.output_rows(y), y[None])


@pytest.mark.parametrize("batch", [(4,), (2, 4), (2, 3, 4)], ids=["rows", "sequence", "heads"])
def test_matmul_with_batch_dimensions(batch: tuple[int, ...]) -> None:
    x, weight = randn(*batch, 5), randn(5, 3)
    unfold = Unfold("MatMul")
    y = x @ weight
    product = unfold.input_rows(x, (1, 1)) @ unfold.weight_rows(weight).transpose(1, 2)
    assert torch.equal(product, unfold.output_rows(y))
    assert torch.equal(product[0], y.reshape(-1, 3))


def test_geometry_is_read_from_the_node() -> None:
    attributes = {"strides": [2, 3], "dilations": [1, 2], "pads": [1, 2, 3, 4], "output_padding": [1, 0], "group": 2}
    node = ir.node("ConvTranspose", [ir.Value(name="x"), ir.Value(name="w")], attributes, name="up")
    layer = Layer("up", node, "w", None, 1, 2)
    assert unfold_for(layer) == Unfold("ConvTranspose", 2, False, (2, 3), (1, 2), (1, 2, 3, 4), (1, 0))


def test_geometry_by_default() -> None:
    node = ir.node("Conv", [ir.Value(name="x"), ir.Value(name="w")], name="c")
    assert unfold_for(Layer("c", node, "w", None, 0)) == Unfold("Conv")
    gemm = ir.node("Gemm", [ir.Value(name="x"), ir.Value(name="w")], {"transB": 1}, name="g")
    assert unfold_for(Layer("g", gemm, "w", None, 0)).transposed
    assert not unfold_for(Layer("g", gemm, "w", None, 1)).transposed
