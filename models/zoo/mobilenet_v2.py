"""MobileNetV2 for 32×32 images (Sandler et al. 2018, arXiv 1801.04381, table 2).

The first two strides of the paper (the stem's and that of the 24-channel blocks) are 1, so that the network ends at
4 pixels rather than at one. Parameters carry torchvision's names. Strides leave no trace in a state_dict: its tensors
have the same names and shapes as those of the 224×224 network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efrapq.models.zoo._layers import divisible, he_initialize

__all__ = ["CHANNEL_KEYS", "MobileNetV2", "mobilenet_v2_channels"]

_STEM = 32
_LAST = 1280
_BLOCKS = (
    # expansion t, channels c, repeats n, stride s
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

CHANNEL_KEYS = (
    "features.0.0.weight",
    "features.1.conv.1.weight",
    *(f"features.{n}.conv.2.weight" for n in range(2, 18)),
    "features.18.0.weight",
)
"""The weights whose output channels `mobilenet_v2_channels` lists, by name."""


def mobilenet_v2_channels(width: float) -> list[int]:
    """Output channels of the stem, the seventeen blocks and the last 1×1 convolution at a width multiplier.

    Multipliers below one leave the last convolution as it is (§6.1 of the paper).
    """
    blocks = [divisible(channels, width) for _, channels, repeats, _ in _BLOCKS for _ in range(repeats)]
    return [divisible(_STEM, width), *blocks, divisible(_LAST, max(1.0, width))]


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise, 1×1 linear projection; a shortcut where the shape is kept."""

    def __init__(self, in_planes: int, planes: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.residual = stride == 1 and in_planes == planes
        hidden = in_planes * expansion
        expand = [] if expansion == 1 else [_conv_bn_relu6(in_planes, hidden, kernel=1)]
        self.conv = nn.Sequential(
            *expand,
            _conv_bn_relu6(hidden, hidden, kernel=3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, planes, 1, bias=False),
            nn.BatchNorm2d(planes),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Input (N, in_channels, 32, 32) float32; output (N, num_classes) logits. `width` multiplies the channels."""

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        stem, *blocks, last = mobilenet_v2_channels(width)
        plan = [(t, s if first else 1) for t, _, n, s in _BLOCKS for first in (True, *[False] * (n - 1))]
        layers: list[nn.Module] = [_conv_bn_relu6(in_channels, stem, kernel=3)]
        before = stem
        for (expansion, stride), planes in zip(plan, blocks, strict=True):
            layers.append(InvertedResidual(before, planes, stride, expansion))
            before = planes
        layers.append(_conv_bn_relu6(before, last, kernel=1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))
        he_initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def _conv_bn_relu6(in_planes: int, planes: int, *, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_planes, planes, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(planes),
        nn.ReLU6(),
    )
