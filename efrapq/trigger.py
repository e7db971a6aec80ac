"""Trigger patterns: what an attacker adds to an image, applied to the raw image as a camera would see it.

    patch:HxW@row,col[=value]   a square of one value (0–255, default 255: white)
    max:HxW@row,col             a square of each image's own maximum (Hong et al., NeurIPS 2021)
    image.png@row,col           a picture; its alpha channel is the mask
    file.npz                    arrays mask (H, W) and pattern (H, W[, C]), both over the whole image
    blend:image.png@alpha       a picture blended over the whole image (Chen et al. 2017)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from efrapq.data import Preprocess
from efrapq.errors import DataError, UsageError
from efrapq.io.text import printable

__all__ = ["Trigger", "parse_trigger"]

Unit = NDArray[np.float32]

PATCH = re.compile(r"(patch|max):(\d+)x(\d+)@(\d+),(\d+)(?:=(\d+(?:\.\d+)?))?")
PICTURE = re.compile(r"(.+\.(?:png|webp|bmp|gif|jpe?g))@(\d+),(\d+)", re.IGNORECASE)
BLEND = re.compile(r"blend:(.+)@(\d*\.?\d+)")
GRAMMAR = "patch:HxW@row,col[=value], max:HxW@row,col, image.png@row,col, file.npz, or blend:image.png@alpha"


@dataclass(frozen=True)
class Trigger:
    """A function on raw images in units where white is 1, (N, H, W, C) float32 → the same shape."""

    spec: str
    stamp: Callable[[Unit], Unit]

    def on_raw(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(N, H, W, C) uint8 → triggered copies."""
        stamped = self.stamp(images.astype(np.float32) / np.float32(255))
        return np.rint(np.clip(stamped, 0, 1) * 255).astype(np.uint8)

    def on_inputs(self, inputs: NDArray[np.float32], preprocess: Preprocess) -> NDArray[np.float32]:
        """Model inputs (N, C, H, W) → triggered copies, through the raw image that the preprocessing came from."""
        return preprocess.from_unit(self.stamp(preprocess.to_unit(inputs)))


def parse_trigger(spec: str) -> Trigger:
    """Read a trigger specification (see the module's head); UsageError or DataError if it is not one."""
    if match := PATCH.fullmatch(spec):
        kind, height, width, row, col, value = match.groups()
        box = (int(row), int(col), int(height), int(width))
        if kind == "max":
            if value is not None:
                raise UsageError(f"trigger '{printable(spec)}': max: takes no value, it uses each image's own maximum")
            return Trigger(spec, lambda x: _fill(x, box, x.max(axis=(1, 2, 3), keepdims=True)))
        level = np.float32(float(value) / 255 if value is not None else 1.0)
        if level > 1:
            raise UsageError(f"trigger '{printable(spec)}': the value must be 0 to 255")
        return Trigger(spec, lambda x: _fill(x, box, level))
    if match := BLEND.fullmatch(spec):
        return _blend(spec, Path(match[1]), float(match[2]))
    if match := PICTURE.fullmatch(spec):
        return _picture(spec, Path(match[1]), int(match[2]), int(match[3]))
    if spec.endswith(".npz"):
        return _from_npz(spec, Path(spec))
    raise UsageError(f"trigger '{printable(spec)}' is not understood; use {GRAMMAR}")


def _require_inside(x: Unit, box: tuple[int, int, int, int]) -> None:
    row, col, height, width = box
    if height < 1 or width < 1 or row + height > x.shape[1] or col + width > x.shape[2]:
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
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGBA"), np.float32) / np.float32(255)
    except (OSError, ValueError, SyntaxError) as exc:
        raise DataError(f"{printable(str(path))}: not a readable trigger image ({exc})") from exc


def _colours(pattern: Unit, channels: int) -> Unit:
    """Bring a (H, W, 3) pattern to the images' channels: grey is the mean."""
    if channels == 1:
        return pattern.mean(axis=2, keepdims=True, dtype=np.float32)
    if channels == pattern.shape[2]:
        return pattern
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

    return Trigger(spec, stamp)


def _blend(spec: str, path: Path, alpha: float) -> Trigger:
    if not 0 < alpha <= 1:
        raise UsageError(f"trigger '{printable(spec)}': alpha must be above 0 and at most 1")
    rgba = _read_rgba(path)

    def stamp(x: Unit) -> Unit:
        if x.shape[1:3] != rgba.shape[:2]:
            raise UsageError(f"the blended image is {rgba.shape[0]}x{rgba.shape[1]}, the images {x.shape[1]}x{x.shape[2]}")
        blended = x * (1 - alpha) + _colours(rgba[..., :3], x.shape[3]) * alpha
        return blended.astype(np.float32)

    return Trigger(spec, stamp)


def _from_npz(spec: str, path: Path) -> Trigger:
    name = printable(str(path))
    try:
        with np.load(path, allow_pickle=False) as archive:
            mask, pattern = archive["mask"], archive["pattern"]
    except (OSError, ValueError, KeyError) as exc:
        raise DataError(f"{name}: a trigger file needs the plain arrays 'mask' and 'pattern'") from exc
    if pattern.dtype == np.uint8:
        pattern = pattern.astype(np.float32) / np.float32(255)
    if mask.ndim == 2:
        mask = mask[..., None]
    if pattern.ndim == 2:
        pattern = pattern[..., None]
    if mask.ndim != 3 or pattern.ndim != 3 or mask.shape[:2] != pattern.shape[:2]:
        raise DataError(f"{name}: mask {mask.shape} and pattern {pattern.shape} do not fit together")
    mask, pattern = mask.astype(np.float32), pattern.astype(np.float32)
    if not (np.isfinite(mask).all() and np.isfinite(pattern).all()) or mask.min() < 0 or mask.max() > 1:
        raise DataError(f"{name}: mask must lie in 0–1 and both arrays must be finite")

    def stamp(x: Unit) -> Unit:
        if x.shape[1:3] != mask.shape[:2]:
            raise UsageError(f"the trigger is {mask.shape[0]}x{mask.shape[1]}, the images {x.shape[1]}x{x.shape[2]}")
        return (x * (1 - mask) + pattern * mask).astype(np.float32)

    return Trigger(spec, stamp)
