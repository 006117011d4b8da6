"""The result of text-to-image: pictures with their prompts and seeds."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmkit.diffusion.pictures import picture_tensor
from mmkit.results import Result, json_text, png


@dataclass
class TextToImage(Result):
    """Pictures that a model made.

    Attributes:
        images: RGB pictures.
        prompts, seeds: what each was made from; the same prompt, seed and settings give the same picture.
        settings: steps, guidance and strengths of the adapters.
        seconds: time for all of them.
    """

    images: list[Image.Image]
    prompts: list[str]
    seeds: list[int]
    settings: dict[str, Any]
    seconds: float

    def tensor(self) -> Tensor:
        """All pictures as (N, 3, H, W) in 0..1."""
        return torch.stack([picture_tensor(image) for image in self.images]) / 2 + 0.5

    def plot(self, columns: int | None = None) -> Image.Image:
        """All pictures side by side; small ones are enlarged without smoothing."""
        columns = columns or min(len(self.images), max(4, math.ceil(math.sqrt(len(self.images)))))
        width, height = self.images[0].size
        factor = max(1, 128 // max(width, height))
        width, height = width * factor, height * factor
        sheet = Image.new(
            "RGB", (columns * (width + 4) - 4, math.ceil(len(self.images) / columns) * (height + 4) - 4), "white"
        )
        for i, image in enumerate(self.images):
            place = (i % columns * (width + 4), i // columns * (height + 4))
            sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), place)
        return sheet

    def records(self) -> list[dict[str, Any]]:
        """Prompt and seed of each picture."""
        return [
            {"file_name": f"{i:03d}.png", "text": p, "seed": s}
            for i, (p, s) in enumerate(zip(self.prompts, self.seeds, strict=True))
        ]

    def formats(self) -> dict[str, Callable[[], bytes]]:
        return {
            ".png": lambda: png(self.plot()),
            ".zip": self._zip,
            ".json": lambda: json_text([self.settings, self.records()]),
        }

    def _zip(self) -> bytes:
        """Every picture, and their prompts in the layout of a captioned folder."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for image, row in zip(self.images, self.records(), strict=True):
                archive.writestr(row["file_name"], png(image))
            archive.writestr("metadata.jsonl", "".join(json.dumps(row) + "\n" for row in self.records()))
        return buffer.getvalue()
