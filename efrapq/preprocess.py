"""What turns raw images into a model's input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from efrapq.errors import DataError, UsageError
from efrapq.io.text import printable

__all__ = ["Layout", "Preprocess", "PreprocessOverride", "check_size", "layout_of"]

# The order of axes in which a model takes a batch of images.
Layout = Literal["NCHW", "NHWC"]
Scalar = TypeVar("Scalar", bound=np.generic)

MAX_SIDE = 8192


def layout_of(dims: Sequence[object]) -> Layout:
    """The layout of a batch of images with these dimensions, which need not all be numbers.

    NHWC if the last of four axes holds colour channels, 1 or 3, and the second one, their place in NCHW, does not.
    """
    return "NHWC" if len(dims) == 4 and dims[3] in (1, 3) and dims[1] not in (1, 3) else "NCHW"


@dataclass(frozen=True)
class Preprocess:
    """What turns a raw image into the model's input: (x / 255 - mean) / std per channel, after resizing.

    mean, std: one number per channel, or one for all, in units of the 0–1 image. size: (height, width) to resize and
    centre-crop image files to; arrays are never resized. layout: of the model's input. Raises UsageError for numbers
    that make no sense.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: tuple[int, int] | None = None
    layout: Layout = "NCHW"

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise UsageError(
                f"--mean has {len(self.mean)} values and --std {len(self.std)}: give one per channel to both"
            )
        if not self.mean:
            raise UsageError("--mean and --std are empty: give one number per channel")
        if not all(np.isfinite(self.mean)) or not all(np.isfinite(self.std)) or min(self.std) <= 0:
            raise UsageError("--mean must be finite and --std positive")
        if max(abs(m) for m in self.mean) > 10:
            raise UsageError("--mean and --std count in units of the 0–1 image: divide both by 255")
        if not all(1e-6 <= s <= 1e6 for s in self.std):
            raise UsageError("--std must lie between 1e-6 and 1e6")
        if self.size is not None:
            check_size(self.size)
        if self.layout not in ("NCHW", "NHWC"):
            raise UsageError(f"the layout must be NCHW or NHWC, not {printable(self.layout, 40)}")

    def in_layout(self, layout: Layout) -> Preprocess:
        """The same for a model that takes its images so."""
        return replace(self, layout=layout)

    def _per_channel(self, channels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """mean and std, (channels,) each: they broadcast over images with their channels last."""
        if len(self.mean) not in (1, channels):
            raise UsageError(f"--mean/--std have {len(self.mean)} values but the images have {channels} channels")
        mean = np.broadcast_to(np.asarray(self.mean, np.float32), (channels,))
        return mean, np.broadcast_to(np.asarray(self.std, np.float32), (channels,))

    def arrange(self, images: NDArray[Scalar]) -> NDArray[Scalar]:
        """(N, H, W, C) → the model's layout, contiguous."""
        return np.ascontiguousarray(images if self.layout == "NHWC" else images.transpose(0, 3, 1, 2))

    def normalize(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, H, W, C) uint8 → float32 in the model's layout: its input."""
        mean, std = self._per_channel(images.shape[3])
        # What becomes of each of the 256 values, (256, C): looked up faster than computed for every pixel.
        table = (np.arange(256, dtype=np.float32)[:, None] * np.float32(1 / 255) - mean) / std
        channels = [table[:, c][images[..., c]] for c in range(images.shape[3])]
        return np.stack(channels, axis=3 if self.layout == "NHWC" else 1)

    def to_unit(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Model inputs → (N, H, W, C) float32 images in units where white is 1."""
        images = inputs if self.layout == "NHWC" else inputs.transpose(0, 2, 3, 1)
        mean, std = self._per_channel(images.shape[3])
        return np.ascontiguousarray(images * std + mean)

    def from_unit(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """The inverse of `to_unit`."""
        mean, std = self._per_channel(images.shape[3])
        return self.arrange(((images - mean) / std).astype(np.float32, copy=False))

    def to_json(self) -> str:
        """The form that travels in a model's metadata. A layout is named where it is not NCHW."""
        layout = {} if self.layout == "NCHW" else {"layout": self.layout}
        return json.dumps({"mean": self.mean, "std": self.std, "size": self.size} | layout)

    @classmethod
    def from_json(cls, text: str) -> Preprocess:
        """The inverse of `to_json`; DataError if the text is not one."""
        try:
            record = json.loads(text)
            mean, std, size = record["mean"], record["std"], record.get("size")
            if not isinstance(mean, list) or not isinstance(std, list):
                raise TypeError("mean and std must be lists")
            if size is not None:
                height, width = size
                size = (int(height), int(width))
            layout = record.get("layout", "NCHW")
            return cls(tuple(float(v) for v in mean), tuple(float(v) for v in std), size, layout)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, UsageError) as exc:
            raise DataError(
                "the model's metadata holds an unreadable preprocessing record: pass --mean and --std"
            ) from exc


def check_size(size: tuple[int, int]) -> None:
    """UsageError unless it is a (height, width) to resize images to."""
    if len(size) != 2 or not all(1 <= side <= MAX_SIDE for side in size):
        raise UsageError(f"--size must be HxW, each side from 1 to {MAX_SIDE}")


@dataclass(frozen=True)
class PreprocessOverride:
    """What a user says about preprocessing where the model's own record says something or nothing: None keeps it."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None

    def over(self, recorded: Preprocess | None) -> Preprocess:
        """The recorded preprocessing with the given parts replaced."""
        base = recorded or Preprocess()
        return Preprocess(self.mean or base.mean, self.std or base.std, self.size or base.size, base.layout)

    @property
    def says_colours(self) -> bool:
        """Whether mean and std are given."""
        return self.mean is not None
