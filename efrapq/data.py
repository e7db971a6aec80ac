"""Datasets and preprocessing: the images that calibrate, test and train.

Data is one of: an `.npz` file, a folder of class folders of images, or a flat folder of images (unlabelled). An
`.npz` may hold several splits (`train_x`, `test_x`, …): name the one wanted after a colon, `data.npz:train`.

Class folders are numbered in the order of their names, as torchvision's ImageFolder and Keras number them.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from efrapq.errors import CorruptFileError, DataError, EfrapqError, LimitError, UnsafeFileError, UsageError
from efrapq.io.limits import Limits
from efrapq.io.source import read_fd
from efrapq.io.text import listing, printable
from efrapq.io.zipcheck import zip_members

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "ArrayFile",
    "Dataset",
    "Layout",
    "Preprocess",
    "PreprocessOverride",
    "decode_image",
    "files_behind",
    "layout_of",
    "load_dataset",
]

# The order of axes in which a model takes a batch of images.
Layout = Literal["NCHW", "NHWC"]
Scalar = TypeVar("Scalar", bound=np.generic)

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
# (images, labels) as people name them; {} is the split.
ARRAY_NAMES = (("images", "labels"), ("x", "y"))
SPLIT_ARRAY_NAMES = (("{}_images", "{}_labels"), ("{}_x", "{}_y"), ("x_{}", "y_{}"))
SPLITS = ("train", "test", "val", "valid")
NPZ_SPLIT = re.compile(r"(.+\.npz):([^:/\\]*)", re.IGNORECASE | re.DOTALL)

# What Pillow may decode, whatever a file is called. Its reader of EPS, for one, runs Ghostscript.
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 80_000_000
MAX_SIDE = 8192

NPZ_LIMITS = Limits(max_zip_members=1000)
MAX_ARRAY_BYTES = 4 << 30
# Pictures do not shrink 64-fold; below the free size nobody cares.
MAX_ARRAY_RATIO = 64
FREE_ARRAY_BYTES = 256 << 20
_ADVICE = "save plain arrays with numpy.savez(images=…, labels=…)"


def files_behind(data: str | Path) -> list[Path]:
    """The files that a data argument may name, `file` or `file:split`: an output must replace none of them."""
    text = str(data)
    return [Path(text), Path(text.rsplit(":", 1)[0])]


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
            _check_size(self.size)
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


def _check_size(size: tuple[int, int]) -> None:
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
        _check_size(size)
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


class ArrayFile:
    """The arrays of an `.npz` file; none gets memory before its own header and the archive agree on its size."""

    def __init__(self, path: Path) -> None:
        """Read the file, once. Raises DataError, CorruptFileError, UnsafeFileError or LimitError."""
        self.name = printable(path)
        self._data = _read_file(path, self.name)
        if not self._data.startswith(b"PK"):
            kind = "is a single array" if self._data.startswith(b"\x93NUMPY") else "is not an .npz file"
            raise DataError(f"{self.name}: {kind}; {_ADVICE}")
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in zip_members(self._data, self.name, NPZ_LIMITS):
            key = member.filename.removesuffix(".npy")
            if key in self._members:
                raise CorruptFileError(f"{self.name}: holds the array '{printable(key)}' twice; {_ADVICE}")
            self._members[key] = member

    @property
    def keys(self) -> set[str]:
        return set(self._members)

    def __getitem__(self, key: str) -> NDArray[Any]:
        """Unpack one array. Raises what the constructor raises; KeyError if there is none of that name."""
        member = self._members[key]
        where = f"{self.name}: array '{printable(key)}'"
        if member.flag_bits & 0x1:
            raise UnsafeFileError(f"{where} is encrypted; {_ADVICE}")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CorruptFileError(f"{where} is packed by a method that NumPy does not use; {_ADVICE}")
        if member.file_size > MAX_ARRAY_BYTES:
            raise LimitError(f"{where} has {member.file_size:,} bytes, over the limit of {MAX_ARRAY_BYTES:,}")
        if member.file_size > FREE_ARRAY_BYTES and member.file_size > MAX_ARRAY_RATIO * member.compress_size:
            raise LimitError(f"{where} would unpack from {member.compress_size:,} bytes to {member.file_size:,}")
        try:
            with zipfile.ZipFile(BytesIO(self._data)) as archive:
                with archive.open(member) as stream:
                    _check_header(stream, member.file_size, where)
                with archive.open(member) as stream:
                    return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
        except MemoryError:
            raise LimitError(f"{where} does not fit in memory; use fewer images") from None
        except (
            *(zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError),
            *(ValueError, TypeError, SyntaxError, RecursionError, tokenize.TokenError),
        ) as exc:
            raise CorruptFileError(f"{where} is damaged ({printable(exc, 80)}); copy or download it again") from exc


def _read_file(path: Path, name: str) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{name}: is not a regular file; {_ADVICE}")
        if status.st_size > NPZ_LIMITS.max_file_bytes:
            raise LimitError(
                f"{name}: {status.st_size:,} bytes, over the limit of {NPZ_LIMITS.max_file_bytes:,}; "
                "use fewer images, or a folder of image files"
            )
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except (OSError, ValueError) as exc:
        raise DataError(f"{name}: cannot be opened ({printable(getattr(exc, 'strerror', None) or exc)})") from exc
    return read_fd(fd, name, NPZ_LIMITS.max_file_bytes)


def _check_header(stream: BinaryIO | Any, size: int, where: str) -> None:
    """Refuse an array that is not plain numbers, or whose header promises other than the `size` bytes there are."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    reader = readers.get(np.lib.format.read_magic(stream))
    if reader is None:
        raise DataError(f"{where} is of a version for structured arrays; {_ADVICE}")
    try:
        shape, _, dtype = reader(stream)
    except MemoryError:  # Python's parser says so of expressions that are nested too deep
        raise CorruptFileError(f"{where} has an unreadable header; copy or download it again") from None
    if dtype.hasobject:
        raise DataError(f"{where} holds Python objects; {_ADVICE}")
    if dtype.kind not in "biufc":
        raise DataError(f"{where} holds {printable(dtype, 40)}, not numbers; {_ADVICE}")
    promised = stream.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or promised != size:
        raise CorruptFileError(
            f"{where} says that it is {printable(dtype)} {printable(shape, 80)}, "
            f"but the archive holds {size:,} bytes of it"
        )


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


def decode_image(path: Path, mode: Literal["L", "RGB", "RGBA"]) -> Image.Image:
    """One image file, turned upright, as 8-bit grey, RGB or RGBA.

    16-bit grey keeps its high byte; without A in `mode`, transparency is laid over black. Raises DataError naming the
    file and the reason, LimitError for more than `MAX_PIXELS`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = printable(path)
    try:
        with warnings.catch_warnings():
            # What Pillow finds odd is either an error below or of no concern.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=IMAGE_FORMATS) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise LimitError(f"{name}: {opened.width}x{opened.height} pixels; the limit is {MAX_PIXELS:,}")
                image = _eight_bit(ImageOps.exif_transpose(opened), opened.format, name)
            if mode != "RGBA" and image.has_transparency_data:
                over = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over)
            return image.convert(mode)
    except EfrapqError:
        raise
    except Image.DecompressionBombError as exc:
        raise LimitError(f"{name}: more pixels than the limit of {MAX_PIXELS:,}; remove it") from exc
    except UnidentifiedImageError as exc:
        raise DataError(f"{name}: not an image of a known type ({', '.join(IMAGE_FORMATS)}); remove it") from exc
    except Exception as exc:  # on damaged files Pillow's decoders raise whatever they run into
        reason = printable(getattr(exc, "strerror", None) or exc) or type(exc).__name__
        raise DataError(f"{name}: not a readable image ({reason}); remove it") from exc


def _eight_bit(image: Image.Image, file_format: str | None, name: str) -> Image.Image:
    """Pillow's own conversion from 16 bits saturates: everything above 255 would become white."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(f"{name}: 32-bit pixels, which have no agreed range; save it with 8 bits per channel")
    return image
