"""The result: a mask of one object, as picture, cut-out, polygons or COCO run lengths."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

from mmkit.errors import InputError
from mmkit.results import Result, json_text, png
from mmkit.vision.clicks.prompts import numbers

THRESHOLD = 0.0
"""Logits above this are inside."""


@dataclass
class Mask(Result):
    """A predicted mask of one object.

    Attributes:
        logits: float32 `(H, W)`, positive inside.
        iou: its IoU with what is meant, as the model estimates it; NaN if it makes no estimate. With the bundled weights it is the mean
            IoU of such masks on held-out objects, see `Rating`; other models' estimates are their own and not bounded to 0..1.
        image: the picture it belongs to.
    """

    logits: np.ndarray
    iou: float
    image: Image.Image = field(repr=False)

    @property
    def binary(self) -> np.ndarray:
        """bool `(H, W)`."""
        return self.logits > THRESHOLD

    def resized(self, image: Image.Image) -> Mask:
        """The same mask for a larger or smaller copy of its picture."""
        size = (image.height, image.width)
        logits = F.interpolate(torch.from_numpy(self.logits)[None, None], size, mode="bilinear")[0, 0]
        return Mask(logits.numpy(), self.iou, image)

    def cutout(self, soft: bool = True) -> Image.Image:
        """The picture as RGBA, transparent and black outside the mask (nothing hidden is kept); `soft` smooths the edge."""
        alpha = self.binary.astype(np.float32)
        if soft:
            alpha = F.avg_pool2d(torch.from_numpy(alpha)[None], 3, 1, 1, count_include_pad=False)[0].numpy()
        opacity = (alpha * 255 + 0.5).astype(np.uint8)
        pixels = np.asarray(self.image.convert("RGB")) * (opacity > 0)[..., None]
        return Image.fromarray(np.dstack([pixels, opacity]))

    def overlay(self, color: tuple[int, int, int] = (30, 144, 255), opacity: float = 0.5) -> Image.Image:
        """The picture with the mask tinted and outlined."""
        inside = self.binary.astype(np.uint8)
        line = 2 * max(1, max(inside.shape) // 400) + 1
        edge = inside - ndimage.minimum_filter(inside, line, mode="nearest")
        solid = Image.new("RGB", self.image.size, color)
        tinted = Image.composite(Image.blend(self.image, solid, opacity), self.image, Image.fromarray(inside * 255))
        return Image.composite(solid, tinted, Image.fromarray(edge * 255))

    def plot(self) -> Image.Image:
        """What a person wants to see: `overlay()`."""
        return self.overlay()

    def polygons(self, min_points: int = 3) -> list[list[tuple[float, float]]]:
        """Outlines of the mask as closed polygons of (x, y) in pixels, sub-pixel accurate; holes are separate outlines."""
        from contourpy import contour_generator

        padded = np.pad(self.logits - THRESHOLD, 1, constant_values=-1.0)
        lines: Any = contour_generator(z=padded).lines(0.0)
        return [[(float(x) - 1, float(y) - 1) for x, y in line] for line in lines if len(line) > min_points]

    def rle(self) -> dict[str, Any]:
        """COCO run-length encoding: {"size": [H, W], "counts": [...]}, column by column, starting with background."""
        return mask_to_rle(self.binary)

    def record(self) -> dict[str, Any]:
        """What a JSON file holds: {"segmentation": COCO RLE, "polygons": [...], "predicted_iou": number or None}."""
        estimate = self.iou if np.isfinite(self.iou) else None
        return {"segmentation": self.rle(), "polygons": self.polygons(), "predicted_iou": estimate}

    def formats(self) -> dict[str, Callable[[], bytes]]:
        """`.png`: a cut-out (RGBA); `.json`: the COCO RLE with polygons; `.npy`: the bool array."""
        return {".png": lambda: png(self.cutout()), ".json": lambda: json_text(self.record()), ".npy": self._npy}

    def _npy(self) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, self.binary)
        return buffer.getvalue()


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """A bool mask `(H, W)` as uncompressed COCO RLE."""
    flat = np.concatenate([[False], np.asarray(mask, bool).ravel(order="F")])
    edges = np.flatnonzero(np.diff(flat.astype(np.int8)))
    counts = np.diff(np.concatenate([[0], edges, [flat.size - 1]]))
    return {"size": [int(s) for s in mask.shape], "counts": [int(c) for c in counts]}


def rle_to_mask(rle: dict[str, Any]) -> np.ndarray:
    """The inverse of `mask_to_rle`. Raises `InputError` when the counts do not fill the picture."""
    try:
        height, width = (int(v) for v in rle["size"])
        counts = numbers(rle["counts"], (), "RLE counts must be numbers").astype(np.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            'An RLE must be {"size": [H, W], "counts": [...]}, uncompressed; pycocotools decodes compressed ones.'
        ) from error
    if (counts < 0).any() or counts.sum() != height * width:
        raise InputError(f"RLE counts sum to {counts.sum()}, expected {height}x{width} = {height * width}.")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(height, width, order="F")
