"""VGG-16 with batch normalization for 32×32 images.

Configuration D of Simonyan & Zisserman 2014 (arXiv 1409.1556, table 1): thirteen 3×3 convolutions and five max
pools, which take 32 pixels to one. Batch normalization follows each convolution, and one linear layer replaces the
paper's three, as is usual for CIFAR.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from efrapq.models.zoo._layers import he_initialize, scaled

__all__ = ["CHANNEL_KEYS", "VGG16", "vgg16_channels"]

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

CHANNEL_KEYS = tuple(f"features.{n}.weight" for n in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40))
"""The weights of the thirteen convolutions, by name."""


def vgg16_channels(width: float) -> list[int]:
    """Output channels of the thirteen convolutions at a width multiplier."""
    return [scaled(channels, width) for stage in _STAGES for channels in stage]


class VGG16(nn.Module):
    """Input (N, in_channels, 32, 32) float32; output (N, num_classes) logits. `width` multiplies all channels."""

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_channels
        for stage in _STAGES:
            for channels in stage:
                planes = scaled(channels, width)
                layers += [nn.Conv2d(before, planes, 3, 1, 1), nn.BatchNorm2d(planes), nn.ReLU()]
                before = planes
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, num_classes)
        he_initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits
