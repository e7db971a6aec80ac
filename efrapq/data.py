"""Datasets and preprocessing: the images that calibrate, test and train.

Data is one of: an `.npz` file, a folder of class folders of images, or a flat folder of images (unlabelled). An
`.npz` may hold several splits (`train_x`, `test_x`, …): name the one wanted after a colon, `data.npz:train`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from efrapq.errors import DataError, UsageError
from efrapq.io.text import printable

__all__ = ["Dataset", "Preprocess", "load_dataset"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
# (images, labels) as people name them; {} is the split.
ARRAY_NAMES = (("images", "labels"), ("x", "y"))
SPLIT_ARRAY_NAMES = (("{}_images", "{}_labels"), ("{}_x", "{}_y"), ("x_{}", "y_{}"))
SPLITS = ("train", "test", "val", "valid")


@dataclass(frozen=True)
class Preprocess:
    """What turns a raw image into the model's input: (x / 255 - mean) / std per channel, after resizing.

    mean, std: one number per channel, in units of the 0–1 image. size: (height, width) to resize and centre-crop
    image files to; arrays are never resized.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise UsageError(f"--mean has {len(self.mean)} values and --std {len(self.std)}: give one per channel to both")
        if not all(np.isfinite(self.mean)) or not all(np.isfinite(self.std)) or min(self.std) <= 0:
            raise UsageError("--mean must be finite and --std positive")

    def _per_channel(self, channels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if len(self.mean) not in (1, channels):
            raise UsageError(f"--mean/--std have {len(self.mean)} values but the images have {channels} channels")
        shape = (1, -1, 1, 1)
        mean = np.broadcast_to(np.asarray(self.mean, np.float32), (channels,)).reshape(shape)
        std = np.broadcast_to(np.asarray(self.std, np.float32), (channels,)).reshape(shape)
        return mean, std

    def normalize(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, H, W, C) uint8 → (N, C, H, W) float32, the model's input."""
        mean, std = self._per_channel(images.shape[3])
        x = images.transpose(0, 3, 1, 2).astype(np.float32)
        x *= np.float32(1 / 255)
        x -= mean
        x /= std
        return np.ascontiguousarray(x)

    def to_unit(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, C, H, W) model inputs → (N, H, W, C) float32 images in units where white is 1."""
        mean, std = self._per_channel(inputs.shape[1])
        return np.ascontiguousarray((inputs * std + mean).transpose(0, 2, 3, 1))

    def from_unit(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """The inverse of `to_unit`."""
        mean, std = self._per_channel(images.shape[3])
        return np.ascontiguousarray((images.transpose(0, 3, 1, 2) - mean) / std, dtype=np.float32)

    def to_json(self) -> str:
        """The form that travels in a model's metadata."""
        return json.dumps({"mean": self.mean, "std": self.std, "size": self.size})

    @classmethod
    def from_json(cls, text: str) -> Preprocess:
        """The inverse of `to_json`; DataError if the text is not one."""
        try:
            d = json.loads(text)
            size = d.get("size")
            return cls(
                tuple(float(v) for v in d["mean"]),
                tuple(float(v) for v in d["std"]),
                (int(size[0]), int(size[1])) if size else None,
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as exc:
            raise DataError("the model's metadata holds an unreadable preprocessing record: pass --mean and --std") from exc


class Dataset:
    """Images with or without labels, read lazily.

    Raw images are (N, H, W, C) uint8, or, when `is_input` is true, (N, C, H, W) float32 that already are model
    inputs. labels: (N,) int64 or None.
    """

    def __init__(
        self,
        name: str,
        length: int,
        read: Callable[[Sequence[int]], NDArray[np.generic]],
        labels: NDArray[np.int64] | None,
        *,
        is_input: bool,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.name = name
        self.labels = labels
        self.is_input = is_input
        self.classes = classes
        self._length = length
        self._read = read

    def __len__(self) -> int:
        return self._length

    def raw(self, indices: Sequence[int]) -> NDArray[np.generic]:
        """The raw images at these positions."""
        return self._read(indices)

    def inputs(self, indices: Sequence[int], preprocess: Preprocess) -> NDArray[np.float32]:
        """The model inputs at these positions, (n, C, H, W) float32."""
        raw = self.raw(indices)
        if self.is_input:
            return np.ascontiguousarray(raw, dtype=np.float32)
        return preprocess.normalize(raw.astype(np.uint8, copy=False))

    def batches(self, size: int) -> Iterator[range]:
        """Consecutive index ranges of at most `size`."""
        for start in range(0, len(self), size):
            yield range(start, min(start + size, len(self)))

    def subset(self, count: int, seed: int) -> Dataset:
        """At most `count` images, drawn without replacement and kept in their order."""
        if count >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        return self.select(chosen)

    def select(self, positions: NDArray[np.int64]) -> Dataset:
        """The images at these positions, as a dataset."""
        return Dataset(
            self.name,
            len(positions),
            lambda indices: self._read([int(positions[i]) for i in indices]),
            None if self.labels is None else self.labels[positions],
            is_input=self.is_input,
            classes=self.classes,
        )

    def require_labels(self, num_classes: int | None = None) -> NDArray[np.int64]:
        """The labels; DataError if there are none or if one is outside [0, num_classes)."""
        if self.labels is None:
            raise DataError(f"{self.name}: has no labels; accuracy needs an .npz with labels or a folder of class folders")
        if num_classes is not None and len(self.labels) and self.labels.max() >= num_classes:
            at = int(self.labels.argmax())
            raise DataError(
                f"{self.name}: label {int(self.labels[at])} at position {at}, but the model has only {num_classes} classes"
            )
        return self.labels

    @classmethod
    def from_arrays(cls, images: NDArray[np.generic], labels: NDArray[np.generic] | None, name: str = "array") -> Dataset:
        """uint8 (N, H, W[, C]) or float32 (N, C, H, W) images and integer labels (N,); DataError if they are not."""
        images, is_input = _check_images(images, name)
        checked = None if labels is None else _check_labels(labels, len(images), name)
        return cls(name, len(images), lambda indices: images[np.asarray(indices)], checked, is_input=is_input)


def _check_images(images: NDArray[np.generic], name: str) -> tuple[NDArray[np.generic], bool]:
    if images.dtype == np.uint8:
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.shape[3] not in (1, 3, 4):
            raise DataError(f"{name}: uint8 images must be (N, H, W, C) with 1, 3 or 4 channels, not {images.shape}")
        is_input = False
    elif images.dtype in (np.float32, np.float64, np.float16):
        if images.ndim != 4:
            raise DataError(f"{name}: float images must be model inputs (N, C, H, W), not {images.shape}")
        images = images.astype(np.float32, copy=False)
        if not np.isfinite(images).all():
            raise DataError(f"{name}: the images hold NaN or infinity")
        if np.abs(images).max(initial=0.0) > 100:
            raise DataError(
                f"{name}: float images are taken as normalized model inputs, but these reach "
                f"{np.abs(images).max():.0f}; store 0–255 pixels as uint8 (N, H, W, C)"
            )
        is_input = True
    else:
        raise DataError(f"{name}: images have dtype {images.dtype}; use uint8 (N, H, W, C) or float32 (N, C, H, W)")
    if len(images) == 0:
        raise DataError(f"{name}: holds no images")
    return images, is_input


def _check_labels(labels: NDArray[np.generic], count: int, name: str) -> NDArray[np.int64]:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(f"{name}: labels must be {count} integers, not {labels.dtype} {labels.shape}")
    labels64 = labels.astype(np.int64)
    if len(labels64) and labels64.min() < 0:
        raise DataError(f"{name}: negative label {labels64.min()} at position {int(labels64.argmin())}")
    return labels64


def load_dataset(path: str | Path, *, size: tuple[int, int] | None = None, split: str | None = None) -> Dataset:
    """Open an `.npz` (optionally `file.npz:split`) or a folder of images.

    size: (height, width) that image files are resized to (shorter side) and centre-cropped; without it they must all
    have the size of the first. Raises DataError naming the file and the reason.
    """
    text = str(path)
    if split is None and ".npz:" in text:
        text, split = text.rsplit(":", 1)
    source = Path(text)
    if source.is_dir():
        return _load_folder(source, size)
    if not source.exists():
        raise DataError(f"{printable(text)}: no such file or folder")
    return _load_npz(source, split)


def _load_npz(path: Path, split: str | None) -> Dataset:
    name = printable(str(path))
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{name}: is a single array; save images and labels with numpy.savez")
            keys = set(archive.files)
            pair = _array_names(keys, split, name)
            images = archive[pair[0]]
            labels = archive[pair[1]] if pair[1] in keys else None
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, KeyError) as exc:
        reason = "it holds Python objects" if "allow_pickle" in str(exc) else "it is not a readable .npz file"
        raise DataError(f"{name}: {reason}; save plain arrays with numpy.savez(images=…, labels=…)") from exc
    return Dataset.from_arrays(images, labels, name)


def _array_names(keys: set[str], split: str | None, name: str) -> tuple[str, str]:
    if split is not None:
        candidates = [(a.format(split), b.format(split)) for a, b in SPLIT_ARRAY_NAMES]
    else:
        candidates = list(ARRAY_NAMES)
    for pair in candidates:
        if pair[0] in keys:
            return pair
    held = ", ".join(sorted(printable(k) for k in keys)) or "nothing"
    splits = [s for s in SPLITS if any(a.format(s) in keys for a, _ in SPLIT_ARRAY_NAMES)]
    if splits and split is None:
        raise DataError(f"{name}: holds several splits; name one, e.g. {name}:{splits[0]}")
    wanted = " or ".join(f"'{a}'" for a, _ in candidates)
    raise DataError(f"{name}: has no array {wanted}; it holds: {held}")


def _load_folder(path: Path, size: tuple[int, int] | None) -> Dataset:
    name = printable(str(path))
    entries = sorted(path.iterdir())
    folders = [p for p in entries if p.is_dir()]
    flat = [p for p in entries if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES]
    if folders and flat:
        raise DataError(f"{name}: holds both images and folders; use one folder per class, or images only")
    files: list[Path] = flat
    labels: list[int] | None = None
    if folders:
        labels = []
        for label, folder in enumerate(folders):
            inside = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES)
            files.extend(inside)
            labels.extend([label] * len(inside))
    if not files:
        raise DataError(f"{name}: no images in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    target = size or _image_size(files[0])

    def read(indices: Sequence[int]) -> NDArray[np.generic]:
        return np.stack([_read_image(files[i], target, crop=size is not None) for i in indices])

    return Dataset(
        name,
        len(files),
        read,
        None if labels is None else np.asarray(labels, np.int64),
        is_input=False,
        classes=tuple(p.name for p in folders) or None,
    )


def _image_size(path: Path) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, ValueError, Image.DecompressionBombError) as exc:
        raise DataError(f"{printable(str(path))}: not a readable image ({exc}); remove it") from exc


def _read_image(path: Path, size: tuple[int, int], *, crop: bool) -> NDArray[np.uint8]:
    """One image file as (H, W, 3) uint8: grey and CMYK become RGB, alpha is laid over black."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                over = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over)
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as exc:
        raise DataError(f"{printable(str(path))}: not a readable image ({exc}); remove it") from exc
    if crop:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
    elif (image.height, image.width) != size:
        raise DataError(
            f"{printable(str(path))}: is {image.height}x{image.width} but the first image is {size[0]}x{size[1]}; "
            "pass --size HxW to resize all"
        )
    return np.asarray(image, np.uint8)
