"""Reading label maps: class numbers, object numbers, or the colored and noisy pictures that other programs make of them."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from mmkit.data.images import open_image
from mmkit.errors import InputError
from mmkit.vision.medical.volumes import is_volume, load_volume

IGNORED = -1
"""The label of pixels that count neither in the loss nor in any measure, whatever number the file has for them."""
_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF")


def load_labels(source: str | os.PathLike[str] | np.ndarray, num_classes: int, ignore: int | None = None) -> np.ndarray:
    """A label map (H, W) or (X, Y, Z) as uint8, as int16 where some of it is ignored: a NIfTI file, a picture of numbers, or an array.

    Args:
        source: what is read.
        num_classes: background included, 2 to 256.
        ignore: the number, not that of a class, that becomes `IGNORED` (-1); None: no number does.

    With two classes every value above zero is foreground, so that object numbers can be used; so is every color but black, and
    the brighter half of a black and white picture with grey borders. Values within 0.001 of a whole number are that number.

    Raises:
        InputError: unreadable, values that are no class, or a picture that can be read in more than one way: colors or lossy
            compression with more than two classes, colors without black.
    """
    if isinstance(source, np.ndarray):
        name, labels = "the label map", source
    elif is_volume(source):
        name, labels = str(source), load_volume(source).data
    else:
        name, picture = str(source), open_image(source)
        labels = _foreground(picture, name) if num_classes == 2 and ignore is None else _numbers(picture, name)
    if ignore is None or not (left := np.abs(labels - float(ignore)) <= 1e-3).any():
        return _classes(labels, num_classes, name)
    found = _classes(np.where(left, 0, labels), num_classes, name).astype(np.int16)
    found[left] = IGNORED
    return found


def label_values(source: str | os.PathLike[str]) -> list[int]:
    """The distinct numbers in a file of a label map, ascending. Raises `InputError` for what `load_labels` refuses with many classes."""
    labels = load_volume(source).data if is_volume(source) else _numbers(open_image(source), str(source))
    _classes(labels, 1 << 16, str(source))
    return [int(v) for v in np.unique(np.round(labels))]


def _classes(labels: np.ndarray, num_classes: int, name: str) -> np.ndarray:
    if labels.dtype.kind not in "buif" or labels.size == 0:
        raise InputError(f"{name} holds {labels.size} {labels.dtype} values; labels are whole numbers.")
    with np.errstate(invalid="ignore"):
        whole = np.round(labels)
        wrong = ~(np.abs(labels - whole) <= 1e-3) if labels.dtype.kind == "f" else np.zeros(labels.shape, bool)
        wrong |= (whole < 0) | ((whole >= num_classes) & (num_classes != 2))
    if wrong.any():
        shown = ", ".join(f"{v:.9g}" for v in np.unique(labels[wrong])[:5])
        allowed = "0 (background) and above" if num_classes == 2 else f"0..{num_classes - 1}"
        raise InputError(f"{name}: labels must be whole numbers {allowed}; {int(wrong.sum())} values are not: {shown}.")
    return (whole > 0).astype(np.uint8) if num_classes == 2 else whole.astype(np.uint8)


def _numbers(picture: Image.Image, name: str) -> np.ndarray:
    """Class numbers (H, W) of a grey or palette picture."""
    if picture.format in _LOSSY:
        raise InputError(f"{name}: {picture.format} may change the numbers of a label map; save it as PNG or TIFF.")
    if len(picture.getbands()) == 1:
        return np.asarray(picture)
    values = np.asarray(picture.convert("RGB"))
    if (values != values[..., :1]).any():
        count = len(np.unique(values.reshape(-1, 3), axis=0))
        raise InputError(f"{name} holds {count} colors; save the class numbers as a grey or palette PNG instead.")
    return values[..., 0]


def _foreground(picture: Image.Image, name: str) -> np.ndarray:
    """Foreground (H, W) of a picture with two classes."""
    if picture.mode == "P" or len(picture.getbands()) > 1:
        colors = np.asarray(_on_black(picture))
        values = colors.max(-1)
        if (colors != colors[..., :1]).any() and values.min() > (127 if picture.format in _LOSSY else 0):
            if picture.mode != "P":
                raise InputError(
                    f"{name} has no black background, so that its foreground is unclear; save 0 and 1 as grey PNG."
                )
            values = np.minimum(np.asarray(picture), 1)  # no black in the palette: its numbers are the labels
    else:
        values = np.asarray(picture)
    if picture.format in _LOSSY:
        if values.max() < 128:
            raise InputError(f"{name}: {picture.format} may blur small numbers; save the label map as PNG or TIFF.")
        return values >= 128
    return values >= 128 if _is_blurred(values) else values


def _is_blurred(values: np.ndarray) -> bool:
    """Whether this is black and white with grey borders, and not object numbers: white leads among many levels."""
    if values.dtype != np.uint8:
        return False
    counts = np.bincount(values.ravel(), minlength=256)[1:]
    return bool(counts.argmax() == 254 and (counts > 0).sum() >= 8)


def _on_black(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
