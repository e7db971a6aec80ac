"""The zoo's ResNet-20 with its published weights keeps its accuracy in ONNX Runtime. Needs CIFAR-10: see conftest."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import efrapq
from efrapq.data import Dataset
from efrapq.preprocess import Preprocess

IMAGENET = Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def strips(folder: Path, split: str) -> Dataset:
    """Images from lossless strips of 100 a row."""
    labels = np.load(folder / f"{split}_labels.npy")
    parts = []
    for path in sorted(folder.glob(f"{split}_*.webp"))[: 1 if split == "train" else None]:
        grid = np.asarray(Image.open(path).convert("RGB"))
        rows = grid.shape[0] // 32
        parts.append(grid.reshape(rows, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3))
    images = np.concatenate(parts)
    return Dataset.from_arrays(images, labels[: len(images)], f"cifar10 {split}")


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("bits", "within"), [(4, 1.0), (8, 0.3)])
def test_accuracy_kernels_time_and_size(shared: Path, tmp_path: Path, bits: int, within: float) -> None:
    path = tmp_path / "resnet20.onnx"
    started = time.perf_counter()
    made = efrapq.defend(
        shared / "models" / "cifar10_resnet20_state_dict.pt",
        path,
        bits=bits,
        calib=strips(shared / "cifar10", "train"),
        preprocess=IMAGENET,
        target="ort-x86",
    )
    assert time.perf_counter() - started < 120
    found = efrapq.verify(path, data=strips(shared / "cifar10", "test")).document
    assert found["cda"]["float"] == pytest.approx(91.73, abs=0.01)
    assert found["cda"]["defended"] >= 91.73 - within
    assert (found["kernels"]["integer"], found["kernels"]["float"]) == (20, 0)
    assert len(made.data) < (190 if bits == 4 else 330) * 1024
