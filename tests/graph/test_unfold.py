"""A layer as a matrix product: weight rows times input rows are torch's own convolution, in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from efrapq.graph.layers import Layer
from efrapq.graph.unfold import Unfold, unfold_for

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    """Small integers: products and sums are exact in float32, so results are compared exactly."""
    return torch.randint(-4, 5, shape, generator=GENERATOR).float()


CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
SIZES = {1: (13,), 2: (9, 8), 3: (6, 7, 5)}
SMALL = {1: (6,), 2: (5, 4), 3: (3, 4, 2)}


@dataclass(frozen=True)
class Case:
    """As many spatial axes as the kernel has; what is empty is the default on all of them."""

    cin: int = 4
    cout: int = 6
    kernel: tuple[int, ...] = (3, 3)
    groups: int = 1
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return len(self.kernel)

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
    "1-D": Case(kernel=(3,)),
    "1-D pointwise": Case(kernel=(1,)),
    "1-D causal": Case(kernel=(3,), dilation=(4,), pads=(8, 0)),
    "1-D depthwise": Case(cin=6, groups=6, kernel=(5,), pads=(2, 2)),
    "1-D everything": Case(groups=2, kernel=(4,), stride=(3,), dilation=(2,), pads=(1, 4)),
    "3-D": Case(kernel=(3, 2, 1)),
    "3-D everything": Case(groups=2, kernel=(3, 1, 2), stride=(2, 3, 1), dilation=(1, 1, 2), pads=(1, 0, 2, 0, 3, 1)),
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
    "1-D": Case(kernel=(4,), stride=(2,), pads=(1, 1)),
    "1-D everything": Case(groups=2, kernel=(3,), stride=(4,), dilation=(2,), pads=(1, 3), output_padding=(2,)),
    "3-D": Case(kernel=(2, 3, 2), stride=(2, 1, 2)),
    "3-D everything": Case(
        groups=2,
        kernel=(3, 2, 2),
        stride=(2, 3, 1),
        dilation=(1, 1, 2),
        pads=(1, 0, 0, 2, 1, 1),
        output_padding=(1, 2, 0),
    ),
}


def around(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """Begins and ends as F.pad takes them: last axis first."""
    return [amount for pair in zip(reversed(begin), reversed(end), strict=True) for amount in pair]


def filled(case: Case) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """stride, dilation, pads and output_padding with a number for each axis."""
    ones, zeros = (1,) * case.rank, (0,) * case.rank
    return case.stride or ones, case.dilation or ones, case.pads or zeros * 2, case.output_padding or zeros


def conv(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and the output by torch."""
    x = randn(2, case.cin, *SIZES[case.rank])
    weight = randn(case.cout, case.cin // case.groups, *case.kernel)
    stride, dilation, pads, _ = filled(case)
    padded = F.pad(x, around(pads[: case.rank], pads[case.rank :]))
    return x, weight, CONV[case.rank](padded, weight, None, stride, 0, dilation, case.groups)


def conv_transpose(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX pads cut the full output unevenly, which torch cannot say: cut it here."""
    x = randn(2, case.cin, *SMALL[case.rank])
    weight = randn(case.cin, case.cout // case.groups, *case.kernel)
    stride, dilation, pads, extra = filled(case)
    full = CONV_TRANSPOSE[case.rank](x, weight, None, stride, 0, 0, case.groups, dilation)
    full = F.pad(full, around((0,) * case.rank, extra))
    ends = [max(size - cut, 0) for size, cut in zip(full.shape[2:], pads[case.rank :], strict=True)]
    return x, weight, full[:, :, *(slice(b, e) for b, e in zip(pads[: case.rank], ends, strict=True))]


CASES = [pytest.param("Conv", c, id=f"Conv-{n}") for n, c in CONVS.items()]
CASES += [pytest.param("ConvTranspose", c, id=f"ConvTranspose-{n}") for n, c in TRANSPOSED.items()]


def rows_by_definition(y: Tensor, groups: int) -> Tensor:
    """(N, G·O, *spatial) → (G, N·positions, O), sample by sample, position by position."""
    n, channels = y.shape[:2]
    out = y.new_empty(groups, n * prod(y.shape[2:]), channels // groups)
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
        positions = torch.randperm(prod(y.shape[2:]), generator=GENERATOR)[:5].sort().values
    rows = unfold.weight_rows(weight)
    assert rows.shape == (case.groups, case.cout // case.groups, case.cin // case.groups * prod(case.kernel))
    wanted = unfold.output_rows(y, positions)
    assert torch.equal(unfold.input_rows(x, case.kernel, positions) @ rows.transpose(1, 2), wanted)
    kept = y if positions is None else y.flatten(2)[:, :, positions][..., None]
    assert torch.equal(wanted, rows_by_definition(kept, case.groups))


@pytest.mark.parametrize(("op", "case"), CASES)
def test_from_rows_is_the_inverse_of_weight_rows(op: str, case: Case) -> None:
    _, weight, _ = (conv if op == "Conv" else conv_transpose)(case)
    unfold = case.unfold(op)
    assert torch.equal(unfold.from_rows(unfold.weight_rows(weight), tuple(weight.shape)), weight)


@st.composite
def geometries(draw: st.DrawFn) -> Case:
    """Any convolution that has at least one window over the sizes above, most attributes given, some left out."""
    rank = draw(st.integers(1, 3))

    def numbers(low: int, high: int, count: int = rank) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * count))

    groups = draw(st.integers(1, 3))
    return Case(
        cin=groups * draw(st.integers(1, 2)),
        cout=groups * draw(st.integers(1, 3)),
        kernel=numbers(1, 3),
        groups=groups,
        stride=draw(st.sampled_from([(), numbers(1, 3)])),
        dilation=draw(st.sampled_from([(), numbers(1, 2)])),
        pads=draw(st.sampled_from([(), numbers(0, 2, 2 * rank)])),
    )


@given(case=geometries(), zero=st.integers(0, 255), op=st.sampled_from(["Conv", "ConvTranspose"]))
@settings(deadline=None, max_examples=150)
def test_any_geometry_in_reals_and_in_codes(case: Case, zero: int, op: str) -> None:
    """Codes are padded with their zero point: q - z are the rows of the reals."""
    x, weight, y = (conv if op == "Conv" else conv_transpose)(case)
    assume(y.numel())
    unfold = case.unfold(op)
    rows = unfold.input_rows(x, case.kernel)
    assert torch.equal(rows @ unfold.weight_rows(weight).transpose(1, 2), unfold.output_rows(y))
    codes = (x + zero).clamp(0, 255).to(torch.uint8)
    reals = unfold.input_rows(codes.float() - zero, case.kernel)
    assert torch.equal(unfold.input_rows(codes, case.kernel, zero=zero).float() - zero, reals)


@given(
    op=st.sampled_from(["Conv", "ConvTranspose", "Gemm", "Gemm transB", "MatMul"]),
    groups=st.integers(1, 4),
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 4),
    kernel=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
)
@settings(deadline=None, max_examples=150)
def test_rows_round_trip_for_any_shape(
    op: str, groups: int, inputs: int, outputs: int, kernel: tuple[int, ...]
) -> None:
    if op == "Conv":
        shape: tuple[int, ...] = (groups * outputs, inputs, *kernel)
    elif op == "ConvTranspose":
        shape = (groups * inputs, outputs, *kernel)
    else:
        groups, kernel = 1, ()
        shape = (outputs, inputs) if op == "Gemm transB" else (inputs, outputs)
    weight = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)
    unfold = Unfold(op.split()[0], groups=groups, transposed=op == "Gemm transB")
    rows = unfold.weight_rows(weight)
    assert rows.shape == (groups, outputs, inputs * prod(kernel))
    assert torch.equal(unfold.from_rows(rows, shape), weight)


@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm(trans_b: int) -> None:
    x, weight = randn(7, 5), randn(3, 5) if trans_b else randn(5, 3)
    unfold = Unfold("Gemm", transposed=bool(trans_b))
    y = F.linear(x, weight if trans_b else weight.t())
    assert torch.equal(unfold.input_rows(x, ()) @ unfold.weight_rows(weight).transpose(1, 2), y[None])
    assert torch.equal(unfold.output_rows(y), y[None])


@pytest.mark.parametrize("batch", [(4,), (2, 4), (2, 3, 4)], ids=["rows", "sequence", "heads"])
def test_matmul_with_batch_dimensions(batch: tuple[int, ...]) -> None:
    x, weight = randn(*batch, 5), randn(5, 3)
    unfold = Unfold("MatMul")
    y = x @ weight
    product = unfold.input_rows(x, ()) @ unfold.weight_rows(weight).transpose(1, 2)
    assert torch.equal(product, unfold.output_rows(y))
    assert torch.equal(product[0], y.reshape(-1, 3))


def test_geometry_is_read_from_the_node() -> None:
    attributes = {"strides": [2, 3], "dilations": [1, 2], "pads": [1, 2, 3, 4], "output_padding": [1, 0], "group": 2}
    node = ir.node("ConvTranspose", [ir.Value(name="x"), ir.Value(name="w")], attributes, name="up")
    layer = Layer("up", node, "w", None, 1, 2)
    assert unfold_for(layer) == Unfold("ConvTranspose", 2, False, (2, 3), (1, 2), (1, 2, 3, 4), (1, 0))


def test_geometry_of_one_spatial_axis() -> None:
    attributes = {"strides": [2], "dilations": [3], "pads": [1, 4]}
    node = ir.node("Conv", [ir.Value(name="x"), ir.Value(name="w")], attributes, name="c")
    assert unfold_for(Layer("c", node, "w", None, 0)) == Unfold("Conv", 1, False, (2,), (3,), (1, 4))


def test_geometry_by_default() -> None:
    node = ir.node("Conv", [ir.Value(name="x"), ir.Value(name="w")], name="c")
    assert unfold_for(Layer("c", node, "w", None, 0)) == Unfold("Conv")
    gemm = ir.node("Gemm", [ir.Value(name="x"), ir.Value(name="w")], {"transB": 1}, name="g")
    assert unfold_for(Layer("g", gemm, "w", None, 0)).transposed
    assert not unfold_for(Layer("g", gemm, "w", None, 1)).transposed
