"""ResNet-18 (He et al. 2015, arXiv 1512.03385, table 1) with the stem that 32×32 images call for.

The stem is one 3×3 convolution of stride 1 and no max pool, so that the four stages run at 32, 16, 8 and 4 pixels.
Where the shape changes the shortcut is the paper's option B, a 1×1 convolution. Parameters carry torchvision's names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efrapq.models.zoo._layers import he_initialize

__all__ = ["ALIASES", "ResNetCifarStem"]

ALIASES = ((r"^linear\.", "fc."), (r"\.shortcut\.", ".downsample."))
"""The other usual names of the same tensors, as (pattern, replacement): `layer2.0.shortcut.0`, `linear`."""


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn plus a shortcut; a 1×1 convolution where the shape changes."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_planes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNetCifarStem(nn.Module):
    """Input (N, in_channels, 32, 32) float32; output (N, num_classes) logits.

    `blocks` are the residual blocks of each stage; `width` is the number of channels of the first one.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (2, 2, 2, 2),
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks[0], 1)
        self.layer2 = _stage(width, 2 * width, blocks[1], 2)
        self.layer3 = _stage(2 * width, 4 * width, blocks[2], 2)
        self.layer4 = _stage(4 * width, 8 * width, blocks[3], 2)
        self.fc = nn.Linear(8 * width, num_classes)
        he_initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))
