"""Real sample data that needs no download: scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from mmkit.data.folder import ImageDataset
from mmkit.errors import InputError


@dataclass
class ArrayDataset(ImageDataset):
    """An `ImageDataset` whose pictures are in memory: `images` (N, H, W, 3) uint8; `paths` are only names for messages."""

    images: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros((0, 1, 1, 3), np.uint8))

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index])
        return (image if self.transform is None else self.transform(image)), self.labels[index]

    def subset(self, indices: Iterable[int]) -> Self:
        """A copy with only these examples, in this order; the classes stay."""
        indices = list(indices)
        other = super().subset(indices)
        other.images = self.images[indices]
        return other


def array_dataset(
    images: np.ndarray[Any, Any], labels: Sequence[int], class_names: Sequence[str], *, name: str = "image"
) -> ArrayDataset:
    """Wrap uint8 arrays (N, H, W) or (N, H, W, 3) with class indices; raises `InputError` when they do not fit."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise InputError(f"images must be uint8 (N, H, W) or (N, H, W, 3), not {images.dtype} {images.shape}.")
    if len(images) != len(labels) or (len(labels) and not 0 <= min(labels) <= max(labels) < len(class_names)):
        raise InputError(
            f"{len(images)} images, {len(labels)} labels and {len(class_names)} classes do not fit together."
        )
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    names = [Path(f"{name}/{i:05d}") for i in range(len(images))]
    return ArrayDataset(names, [int(v) for v in labels], list(class_names), images=np.ascontiguousarray(images))


def load_digits(digits: Sequence[int] = tuple(range(10)), *, size: int = 32) -> ArrayDataset:
    """1797 real handwritten digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0), white on black.

    They are 8x8 pictures with 17 grey levels that come with scikit-learn; here they are enlarged to `size` pixels.

    Args:
        digits: which classes to keep; the labels count from 0 in this order.
        size: side in pixels.

    Raises:
        InputError: not a digit, or twice the same.
    """
    if len(set(digits)) != len(digits) or not all(0 <= d <= 9 for d in digits):
        raise InputError(f"digits must be different numbers from 0 to 9, not {list(digits)}.")
    # Its file alone: the library would take 50 MB of memory and a second.
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(file), delimiter=",")
    target = table[:, 64].astype(int)
    number = {d: i for i, d in enumerate(digits)}
    chosen = [i for i, d in enumerate(target) if int(d) in number]
    small = np.clip(table[chosen, :64].reshape(-1, 8, 8) * (255 / 16), 0, 255).round().astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC)) for p in small])
    return array_dataset(large, [number[int(target[i])] for i in chosen], [str(d) for d in digits], name="digits")
