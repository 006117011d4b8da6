"""The result: one head's mask and attention at one patch, drawn over the picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmkit.results import Result, figure_image, json_text, png


@dataclass
class MaskView(Result):
    """What one head does at one patch. Arrays `(rows, columns)` lie on the patch grid.

    Attributes:
        picture: the input as the model sees it, `(H, W)` pixels.
        patch: (row, column) of the patch that looks around.
        mask, trained_mask: the mask of the head seen from `patch`, edited and as trained.
        attention, plain_attention: attention weights of `patch` with the (edited) mask and without any mask; each sums
        to 1. distances, profile, trained_profile: the mask as a function of the distance in patches, `(U,)` each.
        predictions: "trained", "edited" and "no mask" -> class name -> probability.
    """

    picture: Image.Image
    patch: tuple[int, int]
    mask: np.ndarray[Any, Any]
    trained_mask: np.ndarray[Any, Any]
    attention: np.ndarray[Any, Any]
    plain_attention: np.ndarray[Any, Any]
    distances: np.ndarray[Any, Any]
    profile: np.ndarray[Any, Any]
    trained_profile: np.ndarray[Any, Any]
    predictions: dict[str, dict[str, float]]

    def mask_image(self, size: int = 384) -> Image.Image:
        """The mask over the picture: red scales the logits up, blue turns attraction into repulsion, clear is near 0."""
        limit = max(1e-6, float(np.abs(self.trained_mask).max()), float(np.abs(self.mask).max()))
        return self._overlay(self.mask / limit, "RdBu_r", size)

    def attention_image(self, masked: bool = True, size: int = 384) -> Image.Image:
        """The attention weights over the picture; both pictures share one scale."""
        limit = max(float(self.attention.max()), float(self.plain_attention.max()))
        return self._overlay((self.attention if masked else self.plain_attention) / limit, "plasma", size)

    def profile_image(self) -> Image.Image:
        """The mask against the distance, as trained and edited, as a diagram."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color="0.8", linewidth=1)
        axes.plot(self.distances, self.trained_profile, color="0.45", linestyle="--", label="as trained")
        axes.plot(self.distances, self.profile, color="teal", linewidth=2, label="edited")
        axes.set_xlabel("distance in patches")
        axes.set_ylabel("factor on the attention logit")
        axes.legend(frameon=False)
        return figure_image(figure)

    def plot(self) -> Image.Image:
        """Mask, attention with the mask, attention without it, and the mask against the distance, side by side."""
        maps = [self.mask_image(), self.attention_image(), self.attention_image(masked=False)]
        height = maps[0].height
        profile = self.profile_image()
        parts = [*maps, profile.resize((round(profile.width * height / profile.height), height))]
        canvas = Image.new("RGB", (sum(p.width for p in parts), height), "white")
        for i, part in enumerate(parts):
            canvas.paste(part, (sum(p.width for p in parts[:i]), 0))
        return canvas

    def formats(self) -> dict[str, Callable[[], bytes]]:
        """`.png`: the picture `plot` draws; `.json`: patch, predictions, and the numbers behind the pictures."""
        arrays = ("mask", "trained_mask", "attention", "plain_attention", "distances", "profile", "trained_profile")
        record = {"patch": list(self.patch), "predictions": self.predictions}
        record |= {name: getattr(self, name).tolist() for name in arrays}
        return {".png": lambda: png(self.plot()), ".json": lambda: json_text(record)}

    def _overlay(self, values: np.ndarray[Any, Any], colors: str, size: int) -> Image.Image:
        from matplotlib import colormaps

        place = values / 2 + 0.5 if colors == "RdBu_r" else values
        rgb = Image.fromarray((colormaps[colors](place)[..., :3] * 255).astype(np.uint8))
        opacity = np.clip(0.1 + 0.6 * np.abs(values), 0, 0.7)
        width, height = self.picture.size
        shape = (size, round(size * height / width))
        base = self.picture.convert("L").convert("RGB").resize(shape, Image.Resampling.BICUBIC)
        blend = Image.fromarray((opacity * 255).astype(np.uint8)).resize(shape, Image.Resampling.NEAREST)
        out = Image.composite(rgb.resize(shape, Image.Resampling.NEAREST), base, blend)
        return frame_patch(out, self.patch, values.shape)


def frame_patch(image: Image.Image, patch: tuple[int, int], grid: tuple[int, ...]) -> Image.Image:
    """A copy of `image` with a white frame around one patch of the grid."""
    out = image.copy()
    height, width = out.height / grid[0], out.width / grid[1]
    corner = (round(patch[1] * width), round(patch[0] * height))
    box = (*corner, round(corner[0] + width) - 1, round(corner[1] + height) - 1)
    pen = ImageDraw.Draw(out)
    pen.rectangle(box, outline="black", width=5)
    pen.rectangle(box, outline="white", width=3)
    return out
