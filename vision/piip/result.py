"""What the pipelines of pyramids return: features of a picture, and a class for every pixel."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmkit.errors import InputError
from mmkit.results import Result, json_text, png

COLORS = (
    (0, 0, 0), (230, 75, 53), (0, 160, 135), (243, 155, 22), (60, 84, 180), (145, 91, 178), (126, 97, 72), (77, 187, 213),
)  # fmt: skip
"""Color of each class, background first; further classes start again after the background."""

HEADS = (
    (0, 200, 180),
    (245, 158, 11),
    (167, 139, 250),
    (244, 114, 182),
    (96, 165, 250),
    (163, 230, 53),
    (248, 113, 113),
    (250, 204, 21),
)
"""Color of each attention head; further ones start again."""


@dataclass
class DenseFeatures(Result):
    """Features of one picture at every place.

    Attributes:
        features: float32 arrays (H, W, C) by name: "branch1" (largest model, coarsest grid), ..., and "merged" where the model
            merges its branches. Cell (i, j) covers the pixels from (i, j) * stride on of the picture as the branch saw it.
        picture: the picture as given.
        seen: (height, width) in pixels at which the last branch saw it.
    """

    features: dict[str, np.ndarray]
    picture: Image.Image
    seen: tuple[int, int]

    @property
    def best(self) -> str:
        """The map that says most: the merged one, else that of the finest branch."""
        return "merged" if "merged" in self.features else max(self.features)

    def pca(self, name: str | None = None) -> Image.Image:
        """The three strongest directions of the features as red, green and blue, in the picture's size.

        Args:
            name: a key of `features`; default: `best`.

        Raises `InputError` for an unknown name.
        """
        name = self.best if name is None else name
        if name not in self.features:
            raise InputError(f"There are features {list(self.features)}, no {name!r}.")
        return pca_picture(self.features[name]).resize(self.picture.size, Image.Resampling.BICUBIC)

    def plot(self) -> Image.Image:
        """The picture and beside it the features of `best`."""
        canvas = Image.new("RGB", (2 * self.picture.width, self.picture.height))
        canvas.paste(self.picture, (0, 0))
        canvas.paste(self.pca(), (self.picture.width, 0))
        return canvas

    def formats(self) -> dict[str, Callable[[], bytes]]:
        """`.npz`: all arrays by name; `.png`: the picture of `pca()`; `.json`: shapes and the size seen."""
        shapes = {name: list(array.shape) for name, array in self.features.items()}
        return {
            ".npz": self._npz,
            ".png": lambda: png(self.pca()),
            ".json": lambda: json_text({"seen": list(self.seen), "features": shapes}),
        }

    def _npz(self) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **self.features)  # type: ignore[arg-type]
        return buffer.getvalue()


def pca_picture(features: np.ndarray) -> Image.Image:
    """(H, W, C) features -> an RGB picture of H x W: the three strongest directions, each stretched over its middle 96 %."""
    height, width, channels = features.shape
    rows = features.reshape(-1, channels).astype(np.float64)
    rows = rows - rows.mean(0)
    _, vectors = np.linalg.eigh(rows.T @ rows)
    count = min(3, channels)
    parts = rows @ vectors[:, ::-1][:, :count]
    parts = parts * np.where(
        parts[np.abs(parts).argmax(0), range(count)] < 0, -1, 1
    )  # the sign is free: strongest upwards
    low, high = np.percentile(parts, (2, 98), axis=0)
    parts = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)
    parts = np.pad(parts, ((0, 0), (0, 3 - count)), mode="edge")
    return Image.fromarray((parts.reshape(height, width, 3) * 255 + 0.5).astype(np.uint8))


@dataclass
class Reads:
    """Where the queries of one branch look in the map of another.

    Attributes:
        query_grid, feature_grid: (H, W) of the two maps.
        places: (N, heads, points, 2) as (x, y), 0..1 over the feature map; N = H * W of the query grid.
        weights: (N, heads, points), one per head together.
    """

    query_grid: tuple[int, int]
    feature_grid: tuple[int, int]
    places: np.ndarray
    weights: np.ndarray


@dataclass
class PyramidView(Result):
    """What happened in a pyramid at one interaction.

    Attributes:
        picture: as given.
        seen: (height, width) in pixels at which the last branch saw it.
        filled: how much higher and wider the picture was made to get whole patches, 1 for not at all.
        before, after: features (H, W, C) of every branch, branch 1 first.
        reads: where a pair of branches looks in each other: "larger reads smaller", "smaller reads larger"; empty without
            deformable attention.
        costs: multiply-adds and parameters by name, see `mmkit.vision.piip.compare`.
    """

    picture: Image.Image
    seen: tuple[int, int]
    filled: tuple[float, float]
    before: list[np.ndarray]
    after: list[np.ndarray]
    reads: dict[str, Reads]
    costs: dict[str, tuple[float, int]]

    def features_image(self, branch: int, *, after: bool = True, width: int = 320) -> Image.Image:
        """Features of a branch (from 1) as colors; before and after share the directions, so that they can be compared."""
        both = np.concatenate([self.before[branch - 1], self.after[branch - 1]])
        rows = self.before[branch - 1].shape[0]
        colors = pca_picture(both)
        box = (0, rows if after else 0, colors.width, 2 * rows if after else rows)
        return self._cut(colors.crop(box), width)

    def change_image(self, branch: int, width: int = 320) -> Image.Image:
        """How much the interaction changed each cell of a branch (from 1): bright is much, black nothing."""
        change = np.linalg.norm(self.after[branch - 1] - self.before[branch - 1], axis=-1)
        change = np.clip(change / max(float(np.percentile(change, 99)), 1e-12), 0, 1)
        colors = np.stack([change, change**1.6 * 0.8, change**4 * 0.6], -1)
        return self._cut(Image.fromarray((colors * 255 + 0.5).astype(np.uint8)), width)

    def changed(self, branch: int) -> float:
        """Length of the change over the length of the features, over the whole map."""
        base = self.before[branch - 1]
        return float(np.linalg.norm(self.after[branch - 1] - base) / max(float(np.linalg.norm(base)), 1e-12))

    def _cut(self, cells: Image.Image, width: int) -> Image.Image:
        """A map enlarged to the picture's shape, without what was filled up."""
        height = max(round(width * self.picture.height / self.picture.width), 1)
        box = (0, 0, cells.width / self.filled[1], cells.height / self.filled[0])
        return cells.resize((width, height), Image.Resampling.BICUBIC, box=box)

    def reads_image(self, which: str, place: tuple[float, float] = (0.5, 0.5), width: int = 640) -> Image.Image:
        """The picture with one cell of a branch framed, and the places that it reads in the other branch: the larger a dot, the
        more it counts; one color per head.

        Args:
            which: a key of `reads`.
            place: (x, y), 0..1 over the picture: the cell there is framed.
            width: of the result.

        Raises `InputError` for an unknown key or a place outside.
        """
        if which not in self.reads:
            raise InputError(f"There are {list(self.reads)}, no {which!r}.")
        if not all(0 <= v <= 1 for v in place):
            raise InputError(f"place must be two numbers from 0 to 1, not {place!r}.")
        reads, (rows, columns) = self.reads[which], self.reads[which].query_grid
        height = max(round(width * self.picture.height / self.picture.width), 1)
        scale = np.array([width * self.filled[1], height * self.filled[0]])  # places span the filled picture
        column = min(int(place[0] / self.filled[1] * columns), columns - 1)
        row = min(int(place[1] / self.filled[0] * rows), rows - 1)
        image = self.picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        image = Image.blend(image, Image.new("RGB", image.size, (24, 24, 27)), 0.35)
        pen = ImageDraw.Draw(image, "RGBA")
        cell = scale / (columns, rows)
        corner = np.array([column, row]) * cell
        pen.rectangle([*corner, *(corner + cell)], outline=(255, 255, 255, 255), width=2)
        places, weights = reads.places[row * columns + column] * scale, reads.weights[row * columns + column]
        for head, (points, shares) in enumerate(zip(places, weights, strict=True)):
            color = (*HEADS[head % len(HEADS)], 230)
            for (x, y), share in zip(points, shares, strict=True):
                radius = 1.5 + 6 * float(share) ** 0.5
                pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color, outline=(0, 0, 0, 160))
        return image

    def plot(self) -> Image.Image:
        """A row per branch: its features before and after the interaction, and the change."""
        rows = [
            [self.features_image(b, after=False), self.features_image(b), self.change_image(b)]
            for b in range(1, len(self.before) + 1)
        ]
        (width, height) = rows[0][0].size
        canvas = Image.new("RGB", (3 * width, len(rows) * height))
        for i, row in enumerate(rows):
            for j, image in enumerate(row):
                canvas.paste(image, (j * width, i * height))
        return canvas

    def formats(self) -> dict[str, Callable[[], bytes]]:
        """`.png`: `plot()`; `.json`: costs, grids and how much each branch changed."""
        facts = {
            "seen": list(self.seen),
            "grids": [list(f.shape[:2]) for f in self.after],
            "changed": [round(self.changed(b), 6) for b in range(1, len(self.after) + 1)],
            "costs": {name: {"macs": macs, "params": params} for name, (macs, params) in self.costs.items()},
        }
        return {".png": lambda: png(self.plot()), ".json": lambda: json_text(facts)}


@dataclass
class SegmentedPicture(Result):
    """A class for every pixel.

    Attributes:
        mask: uint8 (H, W), the class per pixel.
        probability: float32 (H, W), probability of that class.
        picture: as given.
        class_names: background first.
    """

    mask: np.ndarray
    probability: np.ndarray
    picture: Image.Image
    class_names: tuple[str, ...]

    def measures(self) -> list[dict[str, Any]]:
        """Per class but the background: pixels, share of the picture in percent, separate objects, mean probability."""
        from scipy.ndimage import label

        rows = []
        for number, name in enumerate(self.class_names[1:], 1):
            where = self.mask == number
            count = int(where.sum())
            rows.append({
                "class": name,
                "pixels": count,
                "percent": round(100 * count / where.size, 3),
                "objects": int(label(where)[1]),
                "mean_probability": round(float(self.probability[where].mean()), 4) if count else None,
            })  # fmt: skip
        return rows

    def overlay(self, opacity: float = 0.5) -> Image.Image:
        """The picture with the classes in color."""
        colors = np.array([_color(i) for i in range(len(self.class_names))], np.float32)[self.mask]
        alpha = np.where(self.mask[..., None] > 0, float(opacity), 0.0)
        mixed = np.asarray(self.picture, np.float32) * (1 - alpha) + colors * alpha
        return Image.fromarray((mixed + 0.5).astype(np.uint8))

    def plot(self) -> Image.Image:
        """The overlay at half opacity."""
        return self.overlay()

    def formats(self) -> dict[str, Callable[[], bytes]]:
        """`.png`: class numbers as a palette picture; `.json`: the measures."""
        return {".png": lambda: png(self._palette()), ".json": lambda: json_text({"classes": self.measures()})}

    def _palette(self) -> Image.Image:
        picture = Image.fromarray(self.mask)
        picture.putpalette([v for i in range(len(self.class_names)) for v in _color(i)])
        return picture


def _color(label: int) -> tuple[int, int, int]:
    return COLORS[0] if label == 0 else COLORS[1 + (label - 1) % (len(COLORS) - 1)]
