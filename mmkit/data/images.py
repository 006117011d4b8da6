"""Reading pictures that people have: any mode, any EXIF orientation, from a path, bytes, PIL or numpy."""

from __future__ import annotations

import functools
import io
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from mmkit.errors import InputError
from mmkit.storage.files import expanded

ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray"

MAX_PIXELS = 64_000_000
"""Largest picture that is decoded or resized to, in pixels: a small file can otherwise claim gigabytes of memory."""

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".avif", ".heic", ".heif", ".tif", ".tiff", ".bmp", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip

# Only decoders of pictures: Pillow would also run Ghostscript on a PostScript file that calls itself .png.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "GIF", "PPM")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")


def load_image(source: ImageLike, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture as 8-bit RGB, upright, transparency blended onto white, 16-bit scaled to 8.

    Args:
        source: a path, the bytes of a file, a PIL image, or an array `(H, W)`, `(H, W, 1|3|4)`: bool, integers in 0..255
            (8-bit) or up to 65535 (16-bit), or floats in 0..1 or 0..255. Arrays whose range fits neither are refused:
            integers that stop between 256 and 4095 (10 or 12 bit?) and floats that stop between 1 and 16.
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        InputError: unreadable, truncated, too large, empty, non-finite, or of unclear range.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        check_size(source.size, "the picture", max_pixels)
        return _attempt(lambda: _to_rgb(_upright(source.copy()), max_pixels), "the picture")
    image, name = open_image(source, max_pixels=max_pixels), _name(source)
    return _attempt(lambda: _to_rgb(image, max_pixels), name)


def open_image(source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture from a path or the bytes of a file, decoded and upright, with the mode and values of the file.

    Raises:
        InputError: missing, unreadable, truncated, too large or empty.
    """
    name = _name(source)
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else expanded(source)
    if not isinstance(source, bytes) and os.path.exists(file) and not os.path.isfile(file):
        raise InputError(f"{name} is a folder or a device, not a picture.")  # a pipe would be waited for
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is stricter and clearer
            image = Image.open(file, formats=_formats())
    except FileNotFoundError:
        raise InputError(f"{name} does not exist.") from None
    except Image.DecompressionBombError as error:  # Pillow refuses on its own far above our limit
        limit = f"the limit is {max_pixels / 1e6:.0f} million pixels"
        raise InputError(f"{name} is too large ({error}); {limit}. Resize it first.") from None
    except Exception as error:  # damaged headers make decoders fail in every way there is
        raise InputError(f"{name} cannot be read as a picture: {_why(source, error)}") from error
    with image:
        check_size(image.size, name, max_pixels)
        return _attempt(lambda: _upright(image), name)


def _name(source: Any) -> str:
    if isinstance(source, bytes):
        return "the given bytes"
    if isinstance(source, (str, os.PathLike)):
        return str(source)
    raise InputError(f"An image must be a path, bytes, PIL image or numpy array, not {type(source).__name__}.")


def check_size(size: tuple[int, int], name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raise `InputError` unless a picture of `size` (width, height) is between one and `max_pixels` pixels large."""
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f"{name} is empty ({width}x{height}).")
    if width * height > max_pixels:
        raise InputError(
            f"{name} is {width}x{height} = {width * height / 1e6:.0f} million pixels; the limit is "
            f"{max_pixels / 1e6:.0f} million. Resize it first."
        )


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that can be decoded here: HEIC with one of two packages that are no dependency."""
    Image.init()
    known = tuple(name for name in _FORMATS if name in Image.OPEN)
    for package in ("pi_heif", "pillow_heif"):
        try:
            __import__(package).register_heif_opener()
            return (*known, "HEIF")
        except ImportError:
            continue
    return known


def _why(source: Any, error: Exception) -> str:
    """What to say about a file that no decoder takes."""
    try:
        with open(expanded(source), "rb") if not isinstance(source, bytes) else io.BytesIO(source) as file:
            head = file.read(12)
    except (OSError, ValueError):  # a name that no file can have
        return str(error)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS and "HEIF" not in _formats():
        return "it is a HEIC picture. Install a decoder (pip install pi-heif) or convert it to JPEG."
    return f"{error}" or type(error).__name__


def _attempt(decode: Callable[[], Image.Image], name: str) -> Image.Image:
    try:
        return decode()
    except InputError:
        raise
    except Exception as error:  # damaged data makes decoders fail in every way there is
        raise InputError(f"{name} cannot be read as a picture: {error or type(error).__name__}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Decoded, and turned as EXIF says; a damaged EXIF block says nothing."""
    image.load()
    try:
        turned = image.getexif().get(0x0112, 1) != 1
    except Exception:
        turned = False
    if turned:
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        return _from_array(np.asarray(image), max_pixels)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_array(array: np.ndarray[Any, Any], max_pixels: int) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise InputError(f"An image array must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), not {array.shape}.")
    check_size((array.shape[1], array.shape[0]), "the array", max_pixels)
    if array.dtype.kind not in "buif":
        raise InputError(f"An image array must hold numbers (bool, integers or floats), not {array.dtype}.")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        array = np.clip(array.astype(np.float32) * (255 / _top(array)) + 0.5, 0, 255).astype(np.uint8)
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), max_pixels)


def _top(array: np.ndarray[Any, Any]) -> int:
    """Which value of the array is white: 1, 255 or 65535; doubt is an error, never a black or white picture."""
    low, high = array.min(), array.max()
    if array.dtype.kind == "f":
        if not (np.isfinite(low) and np.isfinite(high)):
            raise InputError("The image array holds NaN or infinite values.")
        if low >= -1e-3 and high <= 1 + 1e-3:
            return 1
        if low >= 0 and 16 <= high <= 255:
            return 255
        raise InputError(f"Float images must lie in 0..1 or 0..255, found {low:.3g}..{high:.3g}. Scale them first.")
    if low < 0:
        raise InputError(f"Integer images must not be negative, found {low}..{high}. Scale them to 0..255 first.")
    if high <= 255:
        return 255
    if 4096 <= high <= 65535:
        return 65535
    raise InputError(
        f"The picture holds whole numbers in {low}..{high}, which is neither 8-bit (0..255) nor 16-bit (up to 65535); "
        "scale them to 0..255 first."
    )


def check_channels(channels: int) -> None:
    """Raise `InputError` for a network that takes other pictures than grey and RGB ones."""
    if channels not in (1, 3):
        raise InputError(f"The network takes {channels} channels; pictures have 1 (grey) or 3 (RGB).")


def check_mask_classes(count: int) -> None:
    """Raise `InputError` for more classes, background included, than the 8 bits of a mask can tell apart."""
    if count > 256:
        raise InputError(
            f"The network has {count} classes; a mask of 8 bits numbers 256. Call the network itself, or give it fewer classes."
        )
