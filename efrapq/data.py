"""Datasets: the images that calibrate, test and train.

Data is one of: an `.npz` file, a folder of class folders of images, or a flat folder of images (unlabelled). An
`.npz` may hold several splits (`train_x`, `test_x`, …): name the one wanted after a colon, `data.npz:train`.

Class folders are numbered in the order of their names, as torchvision's ImageFolder and Keras number them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from efrapq.errors import DataError, UsageError
from efrapq.io.image import IMAGE_SUFFIXES, decode_image
from efrapq.io.npz import ArrayFile
from efrapq.io.text import listing, printable
from efrapq.preprocess import Preprocess, check_size, layout_of

__all__ = ["Dataset", "files_behind", "load_dataset", "require_there"]

# (images, labels) as people name them; {} is the split.
ARRAY_NAMES = (("images", "labels"), ("x", "y"))
SPLIT_ARRAY_NAMES = (("{}_images", "{}_labels"), ("{}_x", "{}_y"), ("x_{}", "y_{}"))
SPLITS = ("train", "test", "val", "valid")
NPZ_SPLIT = re.compile(r"(.+\.npz):([^:/\\]*)", re.IGNORECASE | re.DOTALL)


def files_behind(data: str | Path) -> list[Path]:
    """The files that a data argument may name, `file` or `file:split`: an output must replace none of them."""
    text = str(data)
    return [Path(text), Path(text.rsplit(":", 1)[0])]


def require_there(data: object) -> None:
    """DataError for a path to data where there is nothing, before work is done that would be lost."""
    if isinstance(data, str | Path) and not any(os.path.exists(path) for path in files_behind(data)):
        raise DataError(f"{printable(data)}: no such file or folder")


class Dataset:
    """Images with or without labels, read lazily.

    Raw images are (N, H, W, C) uint8, or, when `is_input` is true, (N, C, H, W) float32 that already are model
    inputs; those of a model with its channels last may have theirs last too. labels: (N,) int64 or None.
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
        """The model inputs at these positions, n of them in the model's layout, float32."""
        raw = self.raw(indices)
        if not self.is_input:
            return preprocess.normalize(raw.astype(np.uint8, copy=False))
        inputs = np.ascontiguousarray(raw, dtype=np.float32)
        if preprocess.layout == "NHWC" and layout_of(inputs.shape) == "NCHW":
            return np.ascontiguousarray(inputs.transpose(0, 2, 3, 1))
        return inputs

    def batches(self, size: int) -> Iterator[range]:
        """Consecutive index ranges of at most `size`."""
        if size < 1:
            raise UsageError(f"a batch of {size} images makes no sense: use at least 1")
        for start in range(0, len(self), size):
            yield range(start, min(start + size, len(self)))

    def subset(self, count: int, seed: int) -> Dataset:
        """At most `count` images, drawn without replacement and kept in their order."""
        if count < 1:
            raise UsageError(f"cannot draw {count} images: ask for at least 1")
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
            raise DataError(
                f"{self.name}: has no labels; accuracy needs an .npz with labels or a folder of class folders"
            )
        if num_classes is not None and len(self.labels) and self.labels.max() >= num_classes:
            at = int(self.labels.argmax())
            raise DataError(
                f"{self.name}: label {int(self.labels[at])} at position {at}, "
                f"but the model has only {num_classes} classes"
            )
        return self.labels

    @classmethod
    def from_arrays(
        cls, images: NDArray[np.generic], labels: NDArray[np.generic] | None, name: str = "array"
    ) -> Dataset:
        """uint8 (N, H, W[, C]) or float32 images that are model inputs, and integer labels (N,); DataError if they are
        not.
        """
        images, is_input = _check_images(images, name)
        checked = None if labels is None else _check_labels(labels, len(images), name)
        return cls(name, len(images), lambda indices: images[np.asarray(indices, np.intp)], checked, is_input=is_input)


def _check_images(images: NDArray[Any], name: str) -> tuple[NDArray[np.generic], bool]:
    is_input = images.dtype in (np.float32, np.float64, np.float16)
    if not is_input and images.dtype != np.uint8:
        raise DataError(f"{name}: images have dtype {images.dtype}; use uint8 (N, H, W, C) or float32 (N, C, H, W)")
    if is_input and images.ndim != 4:
        raise DataError(f"{name}: float images must be model inputs (N, C, H, W), not {images.shape}")
    if not is_input and images.ndim == 3:
        if images.shape[2] in (3, 4):
            raise DataError(f"{name}: {images.shape} looks like a single image; add an axis for (N, H, W, C)")
        images = images[..., None]
    if not is_input and (images.ndim != 4 or images.shape[3] not in (1, 3, 4)):
        raise DataError(f"{name}: uint8 images must be (N, H, W, C) with 1, 3 or 4 channels, not {images.shape}")
    if images.size == 0:
        raise DataError(f"{name}: holds no images, its shape is {images.shape}")
    if is_input:
        # The extremes of an array with NaN in it are NaN.
        low, high = float(images.min()), float(images.max())
        if not math.isfinite(low) or not math.isfinite(high):
            raise DataError(f"{name}: the images hold NaN or infinity")
        if max(-low, high) > 100:
            raise DataError(
                f"{name}: float images are taken as normalized model inputs, but these reach "
                f"{max(-low, high):.4g}; store 0–255 pixels as uint8 (N, H, W, C)"
            )
        images = images.astype(np.float32, copy=False)
    return images, is_input


def _check_labels(labels: NDArray[Any], count: int, name: str) -> NDArray[np.int64]:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(f"{name}: labels must be {count} integers, not {labels.dtype} {labels.shape}")
    for extreme, at in ((int(labels.min()), labels.argmin()), (int(labels.max()), labels.argmax())):
        if not 0 <= extreme < 1 << 31:
            raise DataError(f"{name}: label {extreme} at position {int(at)} is no class; labels count from 0")
    return labels.astype(np.int64)


def load_dataset(
    path: str | Path, *, size: tuple[int, int] | None = None, split: str | None = None, channels: Literal[1, 3] = 3
) -> Dataset:
    """Open an `.npz` (optionally `file.npz:split`) or a folder of images.

    size: (height, width) that image files are resized to (shorter side) and centre-cropped; without it they must all
    have the size of the first. channels: 3 reads image files as RGB, 1 as grey; arrays keep theirs. Raises DataError
    naming the file and the reason, CorruptFileError and UnsafeFileError for a bad archive, LimitError for one that
    would unpack to more than the limits allow.
    """
    text = str(path)
    if size is not None:
        check_size(size)
    try:
        if split is None and (match := NPZ_SPLIT.fullmatch(text)) and not Path(text).exists():
            text, split = match.groups()
        source = Path(text)
        is_folder, exists = source.is_dir(), source.exists()
    except OSError as exc:
        raise DataError(f"{printable(text)}: cannot be opened ({printable(exc.strerror)}); check the path") from exc
    if not exists:
        raise DataError(f"{printable(text)}: no such file or folder")
    if split == "" or (split is not None and is_folder):
        raise UsageError(f"{printable(path)}: a split is one of the sets in an .npz file, e.g. data.npz:{SPLITS[0]}")
    return _load_folder(source, size, channels) if is_folder else _load_npz(source, split)


def _load_npz(path: Path, split: str | None) -> Dataset:
    file = ArrayFile(path)
    images, labels = _array_names(file.keys, split, file.name)
    return Dataset.from_arrays(file[images], file[labels] if labels in file.keys else None, file.name)


def _array_names(keys: set[str], split: str | None, name: str) -> tuple[str, str]:
    if split is not None:
        candidates = [(a.format(split), b.format(split)) for a, b in SPLIT_ARRAY_NAMES]
    else:
        candidates = list(ARRAY_NAMES)
    for pair in candidates:
        if pair[0] in keys:
            return pair
    held = listing(sorted(keys), 10) or "nothing"
    splits = [s for s in SPLITS if any(a.format(s) in keys for a, _ in SPLIT_ARRAY_NAMES)]
    if splits and split is None:
        raise DataError(f"{name}: holds several splits; name one, e.g. {name}:{splits[0]}")
    wanted = " or ".join(f"'{printable(a, 40)}'" for a, _ in candidates)
    raise DataError(f"{name}: has no array {wanted}; it holds: {held}")


def _load_folder(path: Path, size: tuple[int, int] | None, channels: Literal[1, 3]) -> Dataset:
    name = printable(path)
    mode: Literal["L", "RGB"] = "L" if channels == 1 else "RGB"
    try:
        # What starts with a dot is the file manager's or the editor's, and must not shift the classes.
        entries = sorted((p for p in path.iterdir() if not p.name.startswith((".", "__MACOSX"))), key=lambda p: p.name)
        folders = [p for p in entries if p.is_dir()]
        files = [p for p in entries if _is_image(p)]
        if folders and files:
            raise DataError(f"{name}: holds both images and folders; use one folder per class, or images only")
        labels: list[int] | None = [] if folders else None
        for label, folder in enumerate(folders):
            inside = sorted(p for p in folder.rglob("*") if _is_image(p))
            files.extend(inside)
            if labels is not None:
                labels.extend([label] * len(inside))
    except OSError as exc:
        raise DataError(f"{name}: cannot be listed ({printable(exc.strerror)}); check the permissions") from exc
    if not files:
        raise DataError(f"{name}: no images in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    target = size or decode_image(files[0], mode).size[::-1]

    def read(indices: Sequence[int]) -> NDArray[np.generic]:
        out = np.empty((len(indices), *target, channels), np.uint8)
        for k, i in enumerate(indices):
            out[k] = _read_image(files[i], target, mode, crop=size is not None).reshape(*target, channels)
        return out

    return Dataset(
        name,
        len(files),
        read,
        None if labels is None else np.asarray(labels, np.int64),
        is_input=False,
        classes=tuple(p.name for p in folders) or None,
    )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _read_image(path: Path, size: tuple[int, int], mode: Literal["L", "RGB"], *, crop: bool) -> NDArray[np.uint8]:
    """One image file as (H, W) or (H, W, 3) uint8, resized and centre-cropped if `crop`."""
    from PIL import Image, ImageOps

    image = decode_image(path, mode)
    if crop:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
    elif (image.height, image.width) != size:
        raise DataError(
            f"{printable(path)}: is {image.height}x{image.width} but the first image is {size[0]}x{size[1]}; "
            "pass --size HxW to resize all"
        )
    return np.asarray(image, np.uint8)
