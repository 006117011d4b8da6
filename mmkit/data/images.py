"""Reading pictures that people have: any mode, any EXIF orientation, from a path, bytes, PIL or numpy."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmkit.errors import InputError

ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray"

MAX_PIXELS = 64_000_000
"""Largest picture that is decoded, in pixels: a small file can otherwise claim gigabytes of memory."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


def load_image(source: ImageLike, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture as 8-bit RGB, upright, transparency blended onto white, 16-bit scaled to 8.

    Args:
        source: a path, the bytes of a file, a PIL image, or an array `(H, W)`, `(H, W, 1|3|4)`: uint8, uint16, or
            float in 0..1.
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        InputError: unreadable, truncated, too large, empty, or non-finite.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        _check_size(source.size, "the picture", max_pixels)
        return _to_rgb(source)
    if isinstance(source, bytes):
        name, file = "the given bytes", io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        name, file = str(source), Path(source).expanduser()  # type: ignore[assignment]
    else:
        raise InputError(f"An image must be a path, bytes, PIL image or numpy array, not {type(source).__name__}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is stricter and clearer
            with Image.open(file) as image:
                _check_size(image.size, name, max_pixels)
                return _to_rgb(image)
    except FileNotFoundError:
        raise InputError(f"{name} does not exist.") from None
    except Image.DecompressionBombError as error:  # Pillow refuses on its own far above our limit
        limit = f"the limit is {max_pixels / 1e6:.0f} million pixels"
        raise InputError(f"{name} is too large ({error}); {limit}. Resize it first.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} cannot be read as a picture: {error}") from error


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f"{name} is empty ({width}x{height}).")
    if width * height > max_pixels:
        raise InputError(
            f"{name} is {width}x{height} = {width * height / 1e6:.0f} million pixels; the limit is "
            f"{max_pixels / 1e6:.0f} million. Resize it first."
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        return _from_array(np.asarray(image), MAX_PIXELS)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray[Any, Any], max_pixels: int) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise InputError(f"An image array must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), not {array.shape}.")
    _check_size((array.shape[1], array.shape[0]), "the array", max_pixels)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise InputError("The image array holds NaN or infinite values.")
        if array.min() < -1e-3 or array.max() > 1 + 1e-3:
            if array.max() <= 255 and array.min() >= 0:
                array = array / 255.0
            else:
                raise InputError(f"Float images must lie in 0..1, found {array.min():.3g}..{array.max():.3g}.")
        array = (np.clip(array, 0, 1) * 255 + 0.5).astype(np.uint8)
    elif array.dtype != np.uint8:  # 16- and 32-bit integers: 16-bit range unless the values need more
        if array.min() < 0:
            raise InputError(f"Integer images must not be negative, found {array.min()}.")
        top = 65535 if array.max() <= 65535 else int(array.max())
        array = (array.astype(np.float64) / top * 255 + 0.5).astype(np.uint8)
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)))
