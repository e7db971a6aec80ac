"""ResNet-20, -32, -44, -56 and -110 for 32×32 images (He et al. 2015, arXiv 1512.03385, §4.2).

Three stages of n residual blocks, depth 6n + 2, widths 16, 32, 64. Where the shape changes the shortcut is the
paper's option A: every second pixel, and zeros for the channels that are not there. It has no weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efrapq.models.zoo._layers import he_initialize

__all__ = ["DEPTHS", "ResNetCifar"]

DEPTHS = (20, 32, 44, 56, 110)


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn plus a shortcut without weights."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.zeros_before = (planes - in_planes) // 2
        self.zeros_after = planes - in_planes - self.zeros_before
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.zeros_before or self.zeros_after:
            x = F.pad(x, (0, 0, 0, 0, self.zeros_before, self.zeros_after))
        return F.relu(y + x)


class ResNetCifar(nn.Module):
    """Input (N, in_channels, 32, 32) float32; output (N, num_classes) logits.

    `depth` is 6n + 2; `width` is the number of channels of the first stage.
    """

    def __init__(self, depth: int, *, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        blocks, remainder = divmod(depth - 2, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 with n at least 1, not {depth}")
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, 1)
        self.layer2 = _stage(width, 2 * width, blocks, 2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, num_classes)
        he_initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))
