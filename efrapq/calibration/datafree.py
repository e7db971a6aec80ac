"""Calibration inputs from the model alone: images whose BatchNorm statistics are those of the training set.

BatchNorm keeps the mean and variance of each of its channels over the training data. Inputs whose activations have
the same statistics stand in for real ones (Yin et al., DeepInversion, CVPR 2020; Cai et al., ZeroQ, CVPR 2020):
start from smoothed noise and descend on the distance of the statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from efrapq.device import exact_convolutions
from efrapq.errors import DataError
from efrapq.graph import constants as const
from efrapq.graph.executor import Executor
from efrapq.preprocess import Layout
from efrapq.progress import Reporter

__all__ = ["DataFree", "synthesize"]

# The axes of (N, C, H, W) in the order of a layout.
ORDERS: dict[Layout, tuple[int, ...]] = {"NCHW": (0, 1, 2, 3), "NHWC": (0, 2, 3, 1)}


@dataclass(frozen=True)
class DataFree:
    """Settings: how many images, in what batches, for how many steps of Adam at what rate."""

    images: int = 128
    batch: int = 64
    steps: int = 30
    learning_rate: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class _Statistics:
    value: str
    mean: Tensor
    deviation: Tensor


def synthesize(
    model: ir.Model,
    image: tuple[int, int, int],
    settings: DataFree,
    device: str,
    reporter: Reporter,
    layout: Layout = "NCHW",
) -> Tensor:
    """Make calibration inputs, float32 on the CPU, images in the model's layout.

    model: the simplified graph with BatchNorm still in it. image: (C, H, W). Raises DataError if there is no BatchNorm.
    """
    executor = Executor(model, device=device)
    targets = _statistics(model.graph, torch.device(device))
    if not targets:
        raise DataError(
            "the model has no BatchNorm to make calibration inputs from: pass --calib with images such as it will see"
        )
    if executor.fallback_nodes:
        raise DataError("the model has operators without a gradient, so no inputs can be made from it: pass --calib")
    with exact_convolutions():
        name = str(model.graph.inputs[0].name)
        made = _descend(executor, name, targets, image, settings, device, reporter, ORDERS[layout])
    return made.permute(ORDERS[layout]).contiguous()


def _descend(
    executor: Executor,
    name: str,
    targets: list[_Statistics],
    image: tuple[int, int, int],
    settings: DataFree,
    device: str,
    reporter: Reporter,
    order: tuple[int, ...],
) -> Tensor:
    """(images, C, H, W). order: of these axes as the model takes them."""
    generator = torch.Generator().manual_seed(settings.seed)
    batches = -(-settings.images // settings.batch)
    made: list[Tensor] = []
    with reporter.task("making calibration inputs from BatchNorm statistics", batches * settings.steps) as task:
        for _ in range(batches):
            x = _smooth_noise((settings.batch, *image), generator).to(device).requires_grad_(True)
            optimizer = torch.optim.Adam([x], settings.learning_rate)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
            for _ in range(settings.steps):
                loss = _distance(executor.run({name: x.permute(order)}, [t.value for t in targets]), targets)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                task.advance(f"distance {loss.item():.3f}")
            made.append(x.detach().cpu())
    return torch.cat(made)[: settings.images]


def _statistics(graph: ir.Graph, device: torch.device) -> list[_Statistics]:
    found = []
    for node in graph:
        if node.op_type != "BatchNormalization" or node.inputs[0] is None:
            continue
        mean, variance = (const.array_or_none(v) for v in node.inputs[3:5])
        if mean is None or variance is None:
            continue
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        found.append(
            _Statistics(
                str(node.inputs[0].name),
                torch.from_numpy(mean.astype(np.float32)).to(device),
                torch.from_numpy(np.sqrt(variance.astype(np.float32) + np.float32(epsilon))).to(device),
            )
        )
    return found


def _smooth_noise(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Gaussian noise with most of its energy in low frequencies, as images have; unit variance per image."""
    noise = torch.zeros(shape)
    for scale in (1, 2, 4, 8):
        size = (max(shape[2] // scale, 1), max(shape[3] // scale, 1))
        layer = torch.randn(shape[0], shape[1], *size, generator=generator)
        noise += F.interpolate(layer, shape[2:], mode="bilinear", align_corners=False) * scale
    return noise / noise.std(dim=(1, 2, 3), keepdim=True)


def _distance(values: dict[str, Tensor], targets: list[_Statistics]) -> Tensor:
    """Mean over layers of the squared distance of means and deviations, in units of the stored deviation."""
    total = torch.zeros((), device=targets[0].mean.device)
    for t in targets:
        x = values[t.value]
        axes = [d for d in range(x.ndim) if d != 1]
        mean = x.mean(axes)
        deviation = (x.var(axes, unbiased=False) + 1e-8).sqrt()
        total = total + ((mean - t.mean) / t.deviation).square().mean()
        total = total + ((deviation - t.deviation) / t.deviation).square().mean()
    return total / len(targets)
