"""A layer as a matrix product: weights as rows, inputs as the rows they meet.

Every linear layer computes y = W x over many x: the windows of a convolution, the rows of a MatMul. `weight_rows`
gives W as (G, O, D), `input_rows` the x as (G, R, D), `output_rows` the y as (G, R, O), in matching order. A
transposed convolution is a plain one over its zero-stuffed input with the kernel flipped. Convolutions have one
spatial axis or several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from efrapq.graph.layers import Layer

__all__ = ["Unfold", "unfold_for"]


@dataclass(frozen=True)
class Unfold:
    """Geometry of one layer. stride, dilation, output_padding: one number a spatial axis, pads: the begins, then the
    ends; empty where all are the default, 1 or 0.
    """

    op_type: str
    groups: int = 1
    transposed: bool = False  # Gemm with transB: weight is (O, D)
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()

    def weight_rows(self, weight: Tensor) -> Tensor:
        """ONNX layout → (G, O, D)."""
        if self.op_type == "Conv":
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        if self.op_type == "ConvTranspose":
            inputs, outputs, *kernel = weight.shape
            grouped = weight.reshape(self.groups, inputs // self.groups, outputs, *kernel)
            return grouped.flip(_axes(3, kernel)).transpose(1, 2).reshape(self.groups, outputs, -1)
        return (weight if self.transposed else weight.t())[None]

    def from_rows(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(G, O, D) → ONNX layout of the given shape; the inverse of `weight_rows`."""
        if self.op_type == "Conv":
            return rows.reshape(shape)
        if self.op_type == "ConvTranspose":
            inputs, outputs, *kernel = shape
            grouped = rows.reshape(self.groups, outputs, inputs // self.groups, *kernel)
            return grouped.transpose(1, 2).flip(_axes(3, kernel)).reshape(shape)
        return (rows[0] if self.transposed else rows[0].t()).reshape(shape)

    def output_rows(self, y: Tensor, positions: Tensor | None = None) -> Tensor:
        """The layer's output without bias → (G, R, O). positions: flat spatial indices to keep, all by default."""
        if self.op_type not in ("Conv", "ConvTranspose"):
            return y.reshape(1, -1, y.shape[-1])
        flat = y.flatten(2)
        if positions is not None:
            flat = flat[:, :, positions]
        n, channels, count = flat.shape
        grouped = flat.reshape(n, self.groups, channels // self.groups, count)
        return grouped.permute(1, 0, 3, 2).reshape(self.groups, n * count, -1)

    def input_rows(self, x: Tensor, kernel: tuple[int, ...], positions: Tensor | None = None, zero: int = 0) -> Tensor:
        """The layer's input → (G, R, D). Only the windows at `positions` are ever gathered.

        zero: what x holds for 0, where it holds codes.
        """
        if self.op_type not in ("Conv", "ConvTranspose"):
            return x.reshape(1, -1, x.shape[-1])
        stride, dilation, pads = self._geometry(len(kernel))
        if self.op_type == "ConvTranspose":
            x = self._stuffed(x, kernel, zero)
            stride, pads = (1,) * len(kernel), (0,) * (2 * len(kernel))
        windows = _windows(x, kernel, stride, dilation, pads, zero)
        n, channels = windows.shape[:2]
        places = windows.shape[2 : 2 + len(kernel)]
        # Splitting a dimension keeps it a view: (N, G, C, *places, *kernel).
        grouped = windows.view(n, self.groups, channels // self.groups, *places, *kernel)
        if positions is None:
            at = _axes(3, places)
            rows = grouped.permute(1, 0, *at, 2, *_axes(3 + len(places), kernel))
            return rows.reshape(self.groups, n * prod(places), -1)
        at_places: tuple[slice | Tensor, ...] = (*[slice(None)] * 3, *torch.unravel_index(positions, places))
        picked = grouped[at_places]  # (N, G, C, P, *kernel)
        return picked.permute(1, 0, 3, 2, *_axes(4, kernel)).reshape(self.groups, n * len(positions), -1)

    def _geometry(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """(stride, dilation, pads) with a number for each of `rank` spatial axes."""
        return self.stride or (1,) * rank, self.dilation or (1,) * rank, self.pads or (0,) * (2 * rank)

    def _stuffed(self, x: Tensor, kernel: tuple[int, ...], zero: int) -> Tensor:
        """The input of the equivalent plain convolution: zeros between the pixels and around them."""
        rank = len(kernel)
        stride, dilation, pads = self._geometry(rank)
        extra = self.output_padding or (0,) * rank
        sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], stride, strict=True)]
        stuffed = x.new_full((*x.shape[:2], *sizes), zero)
        stuffed[:, :, *(slice(None, None, s) for s in stride)] = x
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        begin = [r - p for r, p in zip(reach, pads[:rank], strict=True)]
        end = [r - p + e for r, p, e in zip(reach, pads[rank:], extra, strict=True)]
        return _padded(stuffed, begin, end, zero)


def _axes(first: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """As many axes as there are sizes, from `first` on."""
    return tuple(range(first, first + len(sizes)))


def _padded(x: Tensor, begin: Sequence[int], end: Sequence[int], zero: int) -> Tensor:
    """The spatial axes padded with `zero`, or cut where a number is negative."""
    pairs = [amount for pair in zip(reversed(begin), reversed(end), strict=True) for amount in pair]
    return F.pad(x, pairs, value=zero) if any(pairs) else x


def _windows(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    pads: tuple[int, ...],
    zero: int,
) -> Tensor:
    """A view (N, C, *places, *kernel) of all windows: nothing but the padding is copied."""
    rank = len(kernel)
    windows = _padded(x, pads[:rank], pads[rank:], zero)
    for axis in range(rank):
        windows = windows.unfold(2 + axis, (kernel[axis] - 1) * dilation[axis] + 1, stride[axis])
    return windows[(*[slice(None)] * (2 + rank), *(slice(None, None, d) for d in dilation))]


def unfold_for(layer: Layer) -> Unfold:
    """The geometry of a layer, from its node's attributes."""
    attributes = layer.node.attributes
    if layer.op_type in ("Gemm", "MatMul"):
        return Unfold(layer.op_type, transposed=bool(layer.channel_axis == 0))

    def numbers(name: str) -> tuple[int, ...]:
        return tuple(int(v) for v in attributes.get_ints(name, []))

    return Unfold(
        layer.op_type,
        groups=layer.groups,
        stride=numbers("strides"),
        dilation=numbers("dilations"),
        pads=numbers("pads"),
        output_padding=numbers("output_padding"),
    )
