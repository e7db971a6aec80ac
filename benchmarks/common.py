"""What the benchmarks share: data, networks, the machine's description, and tables."""

from __future__ import annotations

import json
import os
import platform
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from efrapq.cpu import describe_cpu
from efrapq.data import Dataset, load_dataset
from efrapq.exporters import native_target
from efrapq.io import write_atomic
from efrapq.preprocess import Preprocess

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).resolve().parents[1] / "docs"
IMAGENET = Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def shared_folder() -> Path | None:
    """The development data (EFRAPQ_SHARED, or beside the checkout): CIFAR-10, ImageNet samples, published weights."""
    folder = Path(os.environ.get("EFRAPQ_SHARED", Path(__file__).resolve().parents[2] / "shared" / "data"))
    return folder if folder.is_dir() else None


def strips(folder: Path, name: str, split: str, count: int | None = None) -> Dataset:
    """cifar10 or gtsrb from lossless image strips, 100 images a row, 10,000 of CIFAR-10's a strip."""
    Image.MAX_IMAGE_PIXELS = None
    labels = np.load(folder / name / f"{split}_labels.npy")
    parts = []
    for path in sorted((folder / name).glob(f"{split}_*.webp"))[:count]:
        grid = np.asarray(Image.open(path).convert("RGB"))
        parts.append(grid.reshape(-1, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3))
    images = np.concatenate(parts)[: len(labels)]
    return Dataset.from_arrays(images, labels[: len(images)], f"{name} {split}")


def cifar10(folder: Path, split: str, count: int | None = None) -> Dataset:
    """CIFAR-10, or its first `count` strips."""
    return strips(folder, "cifar10", split, count)


@dataclass(frozen=True)
class Network:
    """A model to benchmark with the images it takes. origin: where its weights come from, in words."""

    name: str
    model: Path | nn.Module
    data: Dataset
    preprocess: Preprocess
    input_shape: tuple[int, int, int]
    origin: str


def resnet20(folder: Path) -> Network:
    """ResNet-20 with its published weights."""
    path = folder / "models" / "cifar10_resnet20_state_dict.pt"
    return Network("ResNet-20", path, cifar10(folder, "train", 1), IMAGENET, (3, 32, 32), "published weights, 91.73 %")


def imagenet_mobilenet(folder: Path) -> Network:
    """MobileNetV2 at 224 with its published weights."""
    data = load_dataset(folder / "imagenette", size=(224, 224))
    path = folder / "models" / "imagenet_mobilenet_v2.onnx"
    return Network("MobileNetV2, ImageNet", path, data, IMAGENET, (3, 224, 224), "published weights")


def untrained(name: str, title: str, data: Dataset, *, width: float | None = None, seed: int = 0) -> Network:
    """A zoo network with seeded weights and BatchNorm statistics of the data: it costs what a trained one costs."""
    from efrapq.models import zoo

    sample = data.raw([0]).shape[1:]
    model = zoo.build(name, num_classes=10, in_channels=sample[2], width=width, seed=seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average
            module.reset_running_stats()
    model.train()
    with torch.no_grad():
        for indices in data.subset(256, 0).batches(64):
            model(torch.from_numpy(data.subset(256, 0).inputs(indices, IMAGENET)))
    model.eval()
    shape = (sample[2], sample[0], sample[1])
    return Network(title, model, data, IMAGENET, shape, "seeded weights, BatchNorm statistics of the data")


def machine() -> dict[str, Any]:
    """Where the figures were taken."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    return {
        "cpu": model or platform.processor(),
        "architecture": platform.machine(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def native() -> str:
    """The target of this CPU, whose sums are exact on it: without VNNI those of `ort-x86` would saturate."""
    return native_target(platform.machine(), describe_cpu()[1])


def peak_memory() -> int:
    """The largest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def save(name: str, document: dict[str, Any]) -> None:
    """Write results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    write_atomic(RESULTS / f"{name}.json", (json.dumps(document, indent=1) + "\n").encode())


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table in Markdown, which a terminal shows well enough and the documentation takes as it is."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n### {title}\n")
    for number, row in enumerate(cells):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    print(flush=True)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a page: no padding."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def write_page(name: str, parts: Mapping[str, str]) -> None:
    """docs/NAME.md: NAME.template.md, which lies here, with each `{{part}}` filled in."""
    text = (RESULTS.parent / f"{name}.template.md").read_text()
    for part, content in parts.items():
        text = text.replace("{{" + part + "}}", content)
    if "{{" in text:
        raise ValueError(f"{name}.template.md: {text[text.index('{{') :][:40]} was not filled in")
    write_atomic(DOCS / f"{name}.md", text.encode())


def fitted_exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The slope of log time against log size."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
