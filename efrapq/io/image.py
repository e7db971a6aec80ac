"""Image files of unknown origin."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from efrapq.errors import DataError, EfrapqError, LimitError
from efrapq.io.text import printable

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IMAGE_SUFFIXES", "decode_image"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
# What Pillow may decode, whatever a file is called. Its reader of EPS, for one, runs Ghostscript.
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 80_000_000


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
