"""Cut the embedded sample data out of a full dataset.

    python -m efrapq.models.subjects.samples fashion_mnist.npz fashion_samples.npz

Calibration images are drawn from the training split without labels; test images are the first of the test split.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from efrapq.data import load_dataset

__all__ = ["cut_samples"]

CALIBRATION, TEST, SEED = 512, 1500, 0


def cut_samples(source: Path, output: Path) -> None:
    """Write `calib_images`, `test_images` and `test_labels`, uint8, compressed."""
    calibration = load_dataset(source, split="train").subset(CALIBRATION, SEED)
    test = load_dataset(source, split="test")
    labels = test.require_labels()[:TEST]
    np.savez_compressed(
        output,
        calib_images=calibration.raw(range(len(calibration))),
        test_images=test.raw(range(TEST)),
        test_labels=labels.astype(np.uint8),
    )


if __name__ == "__main__":
    cut_samples(Path(sys.argv[1]), Path(sys.argv[2]))
