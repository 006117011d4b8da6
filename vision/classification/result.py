"""The result: class names with probabilities, written or drawn beside the picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from mmkit.results import Result, json_text, png


@dataclass
class ImageClassification(Result):
    """Result of classifying one picture.

    Attributes:
        labels: class names, most probable first.
        scores: their probabilities, 0..1.
        image: the picture as it was read.
    """

    labels: list[str]
    scores: list[float]
    image: Image.Image

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.labels[0]

    def formats(self) -> dict[str, Callable[[], bytes]]:
        """`.json`: labels and scores; `.png`: the picture with its bars."""
        return {
            ".json": lambda: json_text({"labels": self.labels, "scores": self.scores}),
            ".png": lambda: png(self.plot()),
        }

    def plot(self, height: int = 240) -> Image.Image:
        """The picture beside one bar per class."""
        width = round(self.image.width * height / self.image.height)
        picture = self.image.resize((min(max(width, 1), 4 * height), height))  # a strip must not become enormous
        canvas = Image.new("RGB", (picture.width + 320, height), "white")
        canvas.paste(picture, (0, 0))
        pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
        step = height / max(len(self.labels), 1)
        for i, (label, score) in enumerate(zip(self.labels, self.scores, strict=True)):
            x, y = picture.width + 12, round(i * step + step / 2)
            pen.rectangle((x, y - 9, x + 296 * score, y + 9), fill="#c7d7f5")
            pen.text((x + 4, y), f"{label}  {100 * score:.1f} %", fill="#1b2a41", font=font, anchor="lm")
        return canvas
