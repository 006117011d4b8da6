"""Tracking by geometry: the scan of a frame against a model of all scans, with `small_gicp`."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkit.errors import BackendUnavailableError
from mmkit.pointcloud.slam.frames import RGBDFrame
from mmkit.pointcloud.slam.poses import rigid

NEIGHBOURS, LEAST = 10, 50


def gicp_available() -> bool:
    """Whether `small_gicp` is installed."""
    return importlib.util.find_spec("small_gicp") is not None


def library() -> ModuleType:
    """`small_gicp`, or an error that names the command."""
    if not gicp_available():
        raise BackendUnavailableError('The tracker "gicp" needs small_gicp: pip install "mmkit[slam]"')
    import small_gicp

    return small_gicp


def scan(frame: RGBDFrame, depth_max: float, most: int = 20_000) -> np.ndarray:
    """Points (P, 3) float64 in the camera, from every n-th pixel so that at most `most` are left."""
    step = max(1, int(np.ceil(np.sqrt(frame.depth.numel() / most))))
    depth = frame.depth[step // 2 :: step, step // 2 :: step].double().numpy()
    K = frame.K.double().numpy()
    rows, columns = np.nonzero((depth > 0) & (depth <= depth_max))
    z = depth[rows, columns]
    x = (columns * step + step // 2 + 0.5 - K[0, 2]) * z / K[0, 0]
    y = (rows * step + step // 2 + 0.5 - K[1, 2]) * z / K[1, 1]
    return np.stack([x, y, z], 1)


class ScanModel:
    """Scans and their poses, and small_gicp's grid of Gaussians that is made of them.

    The scans are the whole state: the grid is filled again from them after loading, or when a loop was closed.

    Args:
        voxel: metres, to which a scan is thinned; cells of the grid are 5/3 of it.
        reach: metres within which points are paired.
        depth_max: metres beyond which depths are not used.
        most_scans: the oldest scan but the first is dropped beyond this number.
    """

    def __init__(self, voxel: float, reach: float, depth_max: float = 10.0, most_scans: int = 400):
        self.voxel, self.reach, self.depth_max, self.most_scans = voxel, reach, depth_max, most_scans
        self.scans: list[tuple[int, np.ndarray, Tensor]] = []
        self._grid: Any = None

    def __len__(self) -> int:
        return len(self.scans)

    def bytes(self) -> int:
        """Of the scans that are kept."""
        return sum(points.nbytes for _, points, _ in self.scans)

    def thin(self, frame: RGBDFrame) -> np.ndarray:
        """The frame's points in its camera, one a voxel, (P, 3) float32."""
        points = scan(frame, self.depth_max)
        if len(points) < LEAST:
            return np.zeros((0, 3), np.float32)
        return library().voxelgrid_sampling(points, self.voxel, num_threads=1).points()[:, :3].astype(np.float32)

    def align(self, points: np.ndarray, guess: Tensor, reach: float | None = None) -> tuple[Tensor, float]:
        """Camera to world (4, 4) float64 of a thinned scan, from a guess, and the share of its points that found a partner."""
        if len(points) < LEAST or self._grid is None:
            return guess, 0.0
        return _registered(self._grid, _cloud(points), guess, reach or self.reach)

    def insert(self, index: int, points: np.ndarray, pose: Tensor) -> None:
        """Add the scan of a frame at camera-to-world `pose`."""
        if len(points) < LEAST:
            return
        self.scans.append((index, points, pose.clone()))
        if len(self.scans) > self.most_scans:
            del self.scans[1]
            self.rebuild()
        else:
            self._add(points, pose)

    def rebuild(self) -> None:
        """Fill the grid from the scans."""
        self._grid = None
        for _, points, pose in self.scans:
            self._add(points, pose)

    def _add(self, points: np.ndarray, pose: Tensor) -> None:
        if self._grid is None:
            self._grid = library().GaussianVoxelMap(self.voxel * 5 / 3)
            self._grid.set_lru(horizon=1 << 30, clear_cycle=1 << 30)  # forgetting would depend on what was looked up
        self._grid.insert(_cloud(points), pose.numpy())

    def tensors(self) -> dict[str, Tensor]:
        """The state."""
        counts = [len(points) for _, points, _ in self.scans]
        return {
            "index": torch.tensor([i for i, _, _ in self.scans], dtype=torch.int64), "counts": torch.tensor(counts, dtype=torch.int64),
            "points": torch.from_numpy(np.concatenate([np.zeros((0, 3), np.float32), *(p for _, p, _ in self.scans)])),
            "poses": torch.stack([pose for _, _, pose in self.scans]) if counts else torch.zeros(0, 4, 4, dtype=torch.float64),
        }  # fmt: skip

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `tensors`."""
        parts = state["points"].split(state["counts"].tolist())
        self.scans = [
            (int(i), points.numpy().copy(), pose)
            for i, points, pose in zip(state["index"], parts, state["poses"], strict=True)
        ]
        self.rebuild()


def between(source: np.ndarray, target: np.ndarray, guess: Tensor, voxel: float, reach: float) -> tuple[Tensor, float]:
    """The transform (4, 4) from one thinned scan's camera to another's, and the share of points that found a partner."""
    if min(len(source), len(target)) < LEAST:
        return guess, 0.0
    grid = library().GaussianVoxelMap(voxel * 5 / 3)
    grid.insert(_cloud(target), np.eye(4))
    return _registered(grid, _cloud(source), guess, reach)


def _cloud(points: np.ndarray) -> Any:
    gicp = library()
    cloud = gicp.PointCloud(points.astype(np.float64))
    gicp.estimate_covariances(cloud, gicp.KdTree(cloud, num_threads=1), num_neighbors=NEIGHBOURS, num_threads=1)
    return cloud


def _registered(grid: Any, cloud: Any, guess: Tensor, reach: float) -> tuple[Tensor, float]:
    out = library().align(
        grid, cloud, guess.numpy(), max_correspondence_distance=reach, num_threads=1, max_iterations=30
    )
    pose = torch.from_numpy(np.array(out.T_target_source))
    if not pose.isfinite().all():
        return guess, 0.0
    return rigid(pose), out.num_inliers / max(
        cloud.size(), 1
    )  # made exact, or extrapolating would double what rounding leaves
