"""What the pipelines return: the class of a cloud, or the part of every point; drawn and saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmkit.pointcloud.io import PointCloud, write_point_cloud
from mmkit.results import Result, chart_text, figure_image, json_text, png


def palette(labels: np.ndarray) -> np.ndarray:
    """(N,) numbers -> (N, 3) uint8 colors, far apart for neighbouring numbers; 0 is grey."""
    from matplotlib import colormaps

    hue = (labels * 0.61803398875) % 1.0
    colors = (np.asarray(colormaps["hsv"](hue))[:, :3] * 205 + 25).astype(np.uint8)
    colors[labels == 0] = 150
    return colors


def _scatter(axes: Any, xyz: np.ndarray, colors: np.ndarray) -> None:
    axes.scatter(xyz[:, 0], -xyz[:, 2], xyz[:, 1], c=colors / 255, s=6, depthshade=True)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.view_init(18, -60)


def _ply(xyz: np.ndarray, colors: np.ndarray, labels: np.ndarray | None = None) -> bytes:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        return write_point_cloud(PointCloud(xyz, colors, labels=labels), Path(folder) / "cloud.ply").read_bytes()


@dataclass
class CloudClassification(Result):
    """The class of a cloud.

    Attributes:
        class_names: of all classes. probabilities: (C,) float32.
        points: (N, 3) the points the model saw, in the unit sphere.
        groups: (N,) the group whose centre is nearest to each point, from 1.
        attention: (G,) how much the class token looks at each group in the last block, summing to 1.
        retrieved: (index, weight) of the memory bank's entries that made the prompts; empty without a bank.
    """

    class_names: tuple[str, ...]
    probabilities: np.ndarray
    points: np.ndarray
    groups: np.ndarray
    attention: np.ndarray
    retrieved: tuple[tuple[int, float], ...] = ()

    @property
    def label(self) -> str:
        """The most likely class."""
        return self.class_names[int(self.probabilities.argmax())]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The k most likely classes with their probabilities."""
        order = self.probabilities.argsort()[::-1][:k]
        return [(self.class_names[i], float(self.probabilities[i])) for i in order]

    def colors(self) -> np.ndarray:
        """(N, 3) uint8: each group in a color of its own."""
        return palette(self.groups)

    def plot(self) -> Image.Image:
        """The cloud with its groups in color, beside bars of the most likely classes."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4))
        _scatter(figure.add_subplot(1, 2, 1, projection="3d"), self.points, self.colors())
        axes = figure.add_subplot(1, 2, 2)
        names, values = zip(*self.top()[::-1], strict=True)
        axes.barh(range(len(names)), values, color="#0d9488", tick_label=[chart_text(name) for name in names])
        axes.set_xlim(0, 1)
        figure.tight_layout()
        return figure_image(figure)

    def formats(self) -> dict[str, Callable[[], bytes]]:
        """`.json`: the classes; `.png`: the plot; `.ply`: the points in the colors of their groups."""
        return {
            ".json": lambda: json_text({"label": self.label, "classes": dict(self.top(len(self.class_names)))}),
            ".png": lambda: png(self.plot()),
            ".ply": lambda: _ply(self.points, self.colors(), self.groups),
        }


@dataclass
class CloudSegmentation(Result):
    """The part that each point belongs to.

    Attributes:
        class_names: of all parts. points: (N, 3) as given. labels: (N,) indices into `class_names`.
        probability: (N,) of the chosen part.
    """

    class_names: tuple[str, ...]
    points: np.ndarray
    labels: np.ndarray
    probability: np.ndarray

    def measures(self) -> list[dict[str, Any]]:
        """Each part that was found: points, share, mean probability; the largest first."""
        count = np.bincount(self.labels, minlength=len(self.class_names))
        return [
            {
                "part": self.class_names[i],
                "points": int(count[i]),
                "percent": round(100 * int(count[i]) / len(self.labels), 2),
                "mean_probability": round(float(self.probability[self.labels == i].mean()), 4),
            }
            for i in count.argsort()[::-1]
            if count[i]
        ]

    def colors(self) -> np.ndarray:
        """(N, 3) uint8: each part in a color of its own."""
        return palette(self.labels)

    def plot(self) -> Image.Image:
        """The cloud with its parts in color."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 5))
        axes = figure.add_subplot(projection="3d")
        shown = np.random.default_rng(0).permutation(len(self.points))[:5000]
        _scatter(axes, self.points[shown], self.colors()[shown])
        for row in self.measures()[:8]:
            index = self.class_names.index(row["part"])
            axes.scatter([], [], [], color=palette(np.array([index]))[0] / 255, label=chart_text(row["part"]))
        axes.legend(loc="lower left", fontsize=8)
        return figure_image(figure)

    def formats(self) -> dict[str, Callable[[], bytes]]:
        """`.json`: the measures; `.png`: the plot; `.ply`: points with part colors and labels."""
        return {
            ".json": lambda: json_text({"parts": self.measures()}),
            ".png": lambda: png(self.plot()),
            ".ply": lambda: _ply(self.points.astype(np.float32), self.colors(), self.labels),
        }
