"""What a run leaves: a path, a map that can be taken home, and figures."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmkit.pointcloud.gaussians import GaussianModel
from mmkit.pointcloud.slam.tree import SemanticTree
from mmkit.pointcloud.splat_files import write_ply
from mmkit.results import Result, figure_image, json_text, png


@dataclass
class SlamResult(Result):
    """A run's outcome.

    Attributes:
        poses: (F, 4, 4) camera to world, in the first camera's frame.
        tracked: (F,) whether each can be trusted.
        splats: the map.
        labels: (N,) the tree's id of every Gaussian, or `None`.
        truth: (F, 4, 4) true poses, NaN where unknown, or `None`.
        report: figures by name: errors in metres, degrees and dB, storage, times.
        slam: the system, to render, save or go on with; `None` after loading.
    """

    poses: np.ndarray
    tracked: np.ndarray
    splats: GaussianModel
    labels: np.ndarray | None = None
    truth: np.ndarray | None = None
    report: dict[str, Any] = field(default_factory=dict)
    slam: Any = None

    def plot(self) -> Image.Image:
        """The path from above, on the map's points; the true path, aligned, beside it where known."""
        return trajectory_image(self.poses, self.tracked, self.truth, self.splats)

    def formats(self) -> dict[str, Callable[[], bytes]]:
        """The plot, the report with all poses, or the map."""
        return {
            ".png": lambda: png(self.plot()),
            ".json": self._json,
            ".ply": lambda: write_ply(self.splats, self.labels),
        }

    def _json(self) -> bytes:
        poses = [[[float(x) for x in row] for row in pose] for pose in self.poses]
        return json_text({"report": self.report, "tracked": [bool(t) for t in self.tracked], "camera_to_world": poses})


def trajectory_image(
    poses: np.ndarray, tracked: np.ndarray, truth: np.ndarray | None = None, splats: GaussianModel | None = None, *, dark: bool = False
) -> Image.Image:  # fmt: skip
    """A path (F, 4, 4) seen from above (x to the right, z upwards)."""
    from matplotlib.figure import Figure

    from mmkit.pointcloud.slam.metrics import align

    ink, ground = ("#e6e6e6", "#18181b") if dark else ("#27272a", "#ffffff")
    figure = Figure(figsize=(5.6, 4.6), dpi=100, facecolor=ground)
    axes = figure.add_subplot(facecolor=ground)
    if splats is not None and len(splats):
        chosen = torch.linspace(0, len(splats) - 1, min(len(splats), 6000)).long()
        points = splats.means.detach()[chosen].numpy()
        colors = (0.5 + 0.28209479 * splats.sh0.detach()[chosen, 0].numpy()).clip(0, 1)
        axes.scatter(points[:, 0], points[:, 2], s=1.5, c=colors, alpha=0.5, linewidths=0)
    if truth is not None:
        known = np.isfinite(truth).all((1, 2))
        if known.sum() > 2:
            onto = align(torch.from_numpy(truth[known, :3, 3]), torch.from_numpy(poses[known, :3, 3]))
            there = onto(torch.from_numpy(truth[known, :3, 3])).numpy()
            axes.plot(there[:, 0], there[:, 2], color="#16a34a", linewidth=2.5, label="truth")
    places = poses[:, :3, 3]
    axes.plot(places[:, 0], places[:, 2], color="#ea580c", linewidth=1.5, label="estimate")
    lost = ~np.asarray(tracked, bool)
    if lost.any():
        axes.plot(places[lost, 0], places[lost, 2], "x", color="#dc2626", label="lost")
    axes.set_xlabel("x (m)", color=ink)
    axes.set_ylabel("z (m)", color=ink)
    axes.set_aspect("equal", adjustable="datalim")
    axes.tick_params(colors=ink)
    for side in axes.spines.values():
        side.set_color(ink)
    axes.legend(facecolor=ground, labelcolor=ink, edgecolor=ink, loc="best")
    figure.tight_layout()
    return figure_image(figure)


def palette(tree: SemanticTree, level: int | None = None) -> np.ndarray:
    """Colours (K, 3) in 0..1: one a class, or one a group of a level; relatives have neighbouring hues."""
    level = tree.levels - 1 if level is None else level
    groups = tree.groups(level).numpy()
    count = int(groups.max()) + 1
    order = [colorsys.hls_to_rgb(i / count, (0.42, 0.62, 0.52)[i % 3], (0.85, 0.7)[i % 2]) for i in range(count)]
    return np.array(order)[groups]


def label_image(labels: np.ndarray, colors: np.ndarray) -> Image.Image:
    """Class numbers (H, W) as a picture; -1 is dark grey."""
    table = np.concatenate([colors, [[0.15, 0.15, 0.15]]])
    return Image.fromarray(np.rint(255 * table[labels]).astype(np.uint8))
