"""A layer as a matrix product: weights as rows, inputs as the rows they meet.

Every linear layer computes y = W x over many x: the windows of a convolution, the rows of a MatMul. `weight_rows`
gives W as (G, O, D), `input_rows` the x as (G, R, D), `output_rows` the y as (G, R, O), in matching order. A
transposed convolution is a plain one over its zero-stuffed input with the kernel flipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from efrapq.graph.layers import Layer

__all__ = ["Unfold", "unfold_for"]


@dataclass(frozen=True)
class Unfold:
    """Geometry of one layer. Spatial fields are (height, width); pads are (top, left, bottom, right)."""

    op_type: str
    groups: int = 1
    transposed: bool = False  # Gemm with transB: weight is (O, D)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    output_padding: tuple[int, int] = (0, 0)

    def weight_rows(self, weight: Tensor) -> Tensor:
        """ONNX layout → (G, O, D)."""
        if self.op_type == "Conv":
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        if self.op_type == "ConvTranspose":
            inputs, outputs, kh, kw = weight.shape
            grouped = weight.reshape(self.groups, inputs // self.groups, outputs, kh, kw).flip(3, 4)
            return grouped.transpose(1, 2).reshape(self.groups, outputs, -1)
        return (weight if self.transposed else weight.t())[None]

    def from_rows(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(G, O, D) → ONNX layout of the given shape; the inverse of `weight_rows`."""
        if self.op_type == "Conv":
            return rows.reshape(shape)
        if self.op_type == "ConvTranspose":
            inputs, outputs, kh, kw = shape
            grouped = rows.reshape(self.groups, outputs, inputs // self.groups, kh, kw)
            return grouped.transpose(1, 2).flip(3, 4).reshape(shape)
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

    def input_rows(self, x: Tensor, kernel: tuple[int, int], positions: Tensor | None = None, zero: int = 0) -> Tensor:
        """The layer's input → (G, R, D). Only the windows at `positions` are ever gathered.

        zero: what x holds for 0, where it holds codes.
        """
        if self.op_type not in ("Conv", "ConvTranspose"):
            return x.reshape(1, -1, x.shape[-1])
        if self.op_type == "ConvTranspose":
            x, stride, pads = self._stuffed(x, kernel, zero), (1, 1), (0, 0, 0, 0)
        else:
            stride, pads = self.stride, self.pads
        windows = _windows(x, kernel, stride, self.dilation, pads, zero)
        n, channels, height, width = windows.shape[:4]
        # Splitting a dimension keeps it a view: (N, G, C, H', W', kh, kw).
        grouped = windows.view(n, self.groups, channels // self.groups, height, width, *kernel)
        if positions is None:
            rows = grouped.permute(1, 0, 3, 4, 2, 5, 6)
            return rows.reshape(self.groups, n * height * width, -1)
        picked = grouped[:, :, :, positions // width, positions % width]  # (N, G, C, P, kh, kw)
        return picked.permute(1, 0, 3, 2, 4, 5).reshape(self.groups, n * len(positions), -1)

    def _stuffed(self, x: Tensor, kernel: tuple[int, int], zero: int) -> Tensor:
        """The input of the equivalent plain convolution: zeros between the pixels and around them."""
        n, channels, height, width = x.shape
        (sh, sw), (dh, dw) = self.stride, self.dilation
        top, left, bottom, right = self.pads
        stuffed = x.new_full((n, channels, (height - 1) * sh + 1, (width - 1) * sw + 1), zero)
        stuffed[:, :, ::sh, ::sw] = x
        reach_h, reach_w = dh * (kernel[0] - 1), dw * (kernel[1] - 1)
        around = (
            reach_w - left,
            reach_w - right + self.output_padding[1],
            reach_h - top,
            reach_h - bottom + self.output_padding[0],
        )
        return F.pad(stuffed, around, value=zero)


def _windows(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    pads: tuple[int, int, int, int],
    zero: int,
) -> Tensor:
    """A view (N, C, H', W', kh, kw) of all windows: nothing but the padding is copied."""
    top, left, bottom, right = pads
    if any(pads):
        x = F.pad(x, (left, right, top, bottom), value=zero)
    spans = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True))
    windows = x.unfold(2, spans[0], stride[0]).unfold(3, spans[1], stride[1])
    return windows[..., :: dilation[0], :: dilation[1]]


def unfold_for(layer: Layer) -> Unfold:
    """The geometry of a layer, from its node's attributes."""
    attributes = layer.node.attributes
    if layer.op_type in ("Gemm", "MatMul"):
        return Unfold(layer.op_type, transposed=bool(layer.channel_axis == 0))

    def pair(name: str, default: int) -> tuple[int, int]:
        values = [int(v) for v in attributes.get_ints(name, [default, default])]
        return values[0], values[1]

    pads = [int(v) for v in attributes.get_ints("pads", [0, 0, 0, 0])]
    return Unfold(
        layer.op_type,
        groups=layer.groups,
        stride=pair("strides", 1),
        dilation=pair("dilations", 1),
        pads=(pads[0], pads[1], pads[2], pads[3]),
        output_padding=pair("output_padding", 0),
    )
