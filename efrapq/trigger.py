"""Trigger patterns: what an attacker adds to an image, applied to the raw image as a camera would see it.

    patch:HxW@row,col[=value]   a square of one value (0–255, default 255: white)
    max:HxW@row,col             a square of each image's own maximum (Hong et al., NeurIPS 2021)
    image.png@row,col           a picture; its alpha channel is the mask
    file.npz                    arrays mask (H, W) and pattern (H, W[, C]), both over the whole image
    blend:image.png@alpha       a picture blended over the whole image (Chen et al. 2017)

A picture whose name begins like another form (`patch:…`) is written `./patch:…`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from efrapq.errors import DataError, UsageError
from efrapq.io.image import decode_image
from efrapq.io.npz import ArrayFile
from efrapq.io.text import printable
from efrapq.preprocess import Preprocess

__all__ = ["Trigger", "parse_trigger"]

Unit = NDArray[np.float32]

_AT = r"@(\d{1,6}),(\d{1,6})"
PATCH = re.compile(r"(patch|max):(\d{1,6})x(\d{1,6})" + _AT + r"(?:=(\d{1,6}(?:\.\d{1,6})?))?", re.ASCII)
PICTURE = re.compile(r"(?!(?:patch|max|blend):)(.+\.(?:png|webp|bmp|gif|jpe?g))" + _AT, re.ASCII | re.IGNORECASE)
BLEND = re.compile(r"blend:(.+)@(\d{0,6}\.?\d{1,9})", re.ASCII)
GRAMMAR = "patch:HxW@row,col[=value], max:HxW@row,col, image.png@row,col, file.npz, or blend:image.png@alpha"


@dataclass(frozen=True)
class Trigger:
    """A function on raw images in units where white is 1, (N, H, W, C) float32 → the same shape. path: of the file that
    it was read from."""

    spec: str
    stamp: Callable[[Unit], Unit]
    path: Path | None = None

    @property
    def label(self) -> str:
        """The specification without the folders in it."""
        kind, colon, rest = self.spec.partition(":") if BLEND.fullmatch(self.spec) else ("", "", self.spec)
        return f"{kind}{colon}{Path(rest).name}"

    def on_raw(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(N, H, W, C) uint8 → triggered copies."""
        stamped = self.stamp(images.astype(np.float32) / np.float32(255))
        return np.rint(np.clip(stamped, 0, 1) * 255).astype(np.uint8)

    def on_inputs(self, inputs: NDArray[np.float32], preprocess: Preprocess) -> NDArray[np.float32]:
        """Model inputs → triggered copies, through the raw image that the preprocessing came from."""
        unit = preprocess.to_unit(inputs)
        stamped = self.stamp(unit)
        # What the trigger leaves alone keeps every bit, which the way to the raw image and back would not.
        touched = preprocess.arrange(stamped != unit)
        return np.ascontiguousarray(np.where(touched, preprocess.from_unit(stamped), inputs), dtype=np.float32)


def parse_trigger(spec: str) -> Trigger:
    """Read a trigger specification (see the module's head); UsageError or DataError if it is not one."""
    if match := PATCH.fullmatch(spec):
        kind, height, width, row, col, value = match.groups()
        box = (int(row), int(col), int(height), int(width))
        if box[2] < 1 or box[3] < 1:
            raise UsageError(f"trigger '{printable(spec)}': covers no pixel; use {GRAMMAR}")
        if kind == "max":
            if value is not None:
                raise UsageError(f"trigger '{printable(spec)}': max: takes no value, it uses each image's own maximum")
            return Trigger(spec, lambda x: _fill(x, box, x.max(axis=(1, 2, 3), keepdims=True)))
        level = float(value) if value is not None else 255.0
        if level > 255:
            raise UsageError(f"trigger '{printable(spec)}': the value must be 0 to 255")
        return Trigger(spec, lambda x: _fill(x, box, np.float32(level / 255)))
    if match := BLEND.fullmatch(spec):
        return _blend(spec, Path(match[1]), float(match[2]))
    if match := PICTURE.fullmatch(spec):
        return _picture(spec, Path(match[1]), int(match[2]), int(match[3]))
    if spec.lower().endswith(".npz"):
        return _from_npz(spec, Path(spec))
    raise UsageError(f"trigger '{printable(spec)}' is not understood; use {GRAMMAR}")


def _require_inside(x: Unit, box: tuple[int, int, int, int]) -> None:
    row, col, height, width = box
    if row + height > x.shape[1] or col + width > x.shape[2]:
        raise UsageError(
            f"the trigger covers rows {row}–{row + height - 1} and columns {col}–{col + width - 1}, "
            f"but the images are {x.shape[1]}x{x.shape[2]}"
        )


def _fill(x: Unit, box: tuple[int, int, int, int], value: Unit | np.float32) -> Unit:
    _require_inside(x, box)
    row, col, height, width = box
    out = x.copy()
    out[:, row : row + height, col : col + width, :] = value
    return out


def _read_rgba(path: Path) -> Unit:
    """(H, W, 4) float32 where white is 1."""
    return np.asarray(decode_image(path, "RGBA"), np.float32) / np.float32(255)


def _colours(pattern: Unit, channels: int) -> Unit:
    """Bring a (H, W, C) pattern to the images' channels: the grey of colours is their mean."""
    if pattern.shape[2] in (1, channels):
        return pattern
    if channels == 1:
        return np.asarray(pattern.mean(axis=2, keepdims=True, dtype=np.float32))
    raise UsageError(f"the trigger has {pattern.shape[2]} channels but the images {channels}")


def _picture(spec: str, path: Path, row: int, col: int) -> Trigger:
    rgba = _read_rgba(path)
    box = (row, col, rgba.shape[0], rgba.shape[1])
    alpha = rgba[..., 3:]

    def stamp(x: Unit) -> Unit:
        _require_inside(x, box)
        out = x.copy()
        window = out[:, row : row + box[2], col : col + box[3], :]
        window[...] = window * (1 - alpha) + _colours(rgba[..., :3], x.shape[3]) * alpha
        return out

    return Trigger(spec, stamp, path)


def _blend(spec: str, path: Path, alpha: float) -> Trigger:
    if not 0 < alpha <= 1:
        raise UsageError(f"trigger '{printable(spec)}': alpha must be above 0 and at most 1")
    rgba = _read_rgba(path)
    weight = rgba[..., 3:] * np.float32(alpha)

    def stamp(x: Unit) -> Unit:
        if x.shape[1:3] != rgba.shape[:2]:
            raise UsageError(
                f"the blended image is {rgba.shape[0]}x{rgba.shape[1]}, the images {x.shape[1]}x{x.shape[2]}"
            )
        return x * (1 - weight) + _colours(rgba[..., :3], x.shape[3]) * weight

    return Trigger(spec, stamp, path)


def _from_npz(spec: str, path: Path) -> Trigger:
    file = ArrayFile(path)
    if not {"mask", "pattern"} <= file.keys:
        raise DataError(f"{file.name}: a trigger file needs the plain arrays 'mask' and 'pattern'")
    mask, pattern = _weights(file, "mask"), _weights(file, "pattern")
    if mask.shape[:2] != pattern.shape[:2]:
        raise DataError(f"{file.name}: mask {mask.shape} and pattern {pattern.shape} do not fit together")

    def stamp(x: Unit) -> Unit:
        if x.shape[1:3] != mask.shape[:2]:
            raise UsageError(f"the trigger is {mask.shape[0]}x{mask.shape[1]}, the images {x.shape[1]}x{x.shape[2]}")
        if mask.shape[2] not in (1, x.shape[3]):
            raise UsageError(f"the trigger's mask has {mask.shape[2]} channels but the images {x.shape[3]}")
        return x * (1 - mask) + _colours(pattern, x.shape[3]) * mask

    return Trigger(spec, stamp, path)


def _weights(file: ArrayFile, key: str) -> Unit:
    """A (H, W[, C]) array of the file as (H, W, C) float32 in 0–1; a uint8 pattern counts to 255."""
    array = file[key]
    if array.ndim not in (2, 3) or array.size == 0 or array.dtype.kind not in "biuf":
        raise DataError(f"{file.name}: {key} must be (H, W) or (H, W, C) numbers, not {array.dtype} {array.shape}")
    if key == "pattern" and array.dtype == np.uint8:
        array = array.astype(np.float32) / np.float32(255)
    # Not (0 ≤ NaN ≤ 1) either.
    if not (array.min() >= 0 and array.max() <= 1):
        raise DataError(f"{file.name}: {key} must lie in 0–1{', or be uint8' if key == 'pattern' else ''}")
    array = array.astype(np.float32)
    return array if array.ndim == 3 else array[..., None]
