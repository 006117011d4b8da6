"""What is done to clouds before a model sees them: normalising, choosing points, augmenting each sample by itself."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from mmkit.errors import InputError
from mmkit.ops.points import farthest_point_sample

logger = logging.getLogger("mmkit.pointcloud")

MAX_POINTS = 1 << 20
"""Larger clouds are thinned by chance to this many before farthest points are sought."""


def unit_sphere(xyz: np.ndarray) -> np.ndarray:
    """Points (N, 3) moved to their centroid and scaled so that the farthest lies at distance 1."""
    xyz = xyz - xyz.mean(0, dtype=np.float64)
    return (xyz / max(float(np.linalg.norm(xyz, axis=1).max()), 1e-12)).astype(np.float32)


def choose_points(xyz: np.ndarray, num_points: int, seed: int = 0) -> np.ndarray:
    """Indices (num_points,) of well spread points of (N, 3): farthest points, in that order.

    More than a million points are first thinned by chance, with a notice in the log; where there are too few, some are repeated.
    """
    rng = np.random.default_rng(seed)
    kept = np.arange(len(xyz))
    if len(xyz) > MAX_POINTS:
        logger.warning("%d points are thinned to %d before farthest points are chosen", len(xyz), MAX_POINTS)
        kept = np.sort(rng.choice(len(xyz), MAX_POINTS, replace=False, shuffle=False))
    if len(kept) <= num_points:
        return np.concatenate([kept, rng.choice(kept, num_points - len(kept))])
    cloud = torch.from_numpy(np.ascontiguousarray(xyz[kept], np.float32))
    return kept[farthest_point_sample(cloud[None], num_points)[0].numpy()]


def rotations(batch: int, axis: str, generator: torch.Generator | None = None) -> Tensor:
    """Random rotation matrices (B, 3, 3): about "y", or any ("so3", uniformly)."""
    if axis == "y":
        angle = 2 * torch.pi * torch.rand(batch, generator=generator)
        c, s, o = angle.cos(), angle.sin(), torch.zeros(batch)
        return torch.stack([c, o, s, o, o + 1, o, -s, o, c], -1).view(-1, 3, 3)
    q, r = torch.linalg.qr(torch.randn(batch, 3, 3, generator=generator))
    q = q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    return q * torch.linalg.det(q)[:, None, None]


class Augment:
    """Changes every cloud of a batch (B, N, 3) by chance, each by its own draw.

    Args:
        rotate: "y" (about the upright axis), "so3" (anyhow) or None.
        scale: range of one factor per axis (`per_axis=True`) or per cloud.
        shift: largest move along each axis. jitter: standard deviation of noise on every point.
        dropout: largest share of points that are replaced by the cloud's first.

    Raises `InputError` for settings out of range.
    """

    def __init__(
        self,
        rotate: str | None = None,
        scale: tuple[float, float] = (1.0, 1.0),
        shift: float = 0.0,
        jitter: float = 0.0,
        dropout: float = 0.0,
        per_axis: bool = True,
    ):
        if (
            rotate not in (None, "y", "so3")
            or not 0 < scale[0] <= scale[1]
            or min(shift, jitter) < 0
            or not 0 <= dropout < 1
        ):
            raise InputError(
                "Augment: rotate is None, 'y' or 'so3'; 0 < scale[0] <= scale[1]; shift, jitter >= 0; 0 <= dropout < 1."
            )
        self.rotate, self.scale, self.shift = rotate, scale, shift
        self.jitter, self.dropout, self.per_axis = jitter, dropout, per_axis

    def __call__(self, points: Tensor, generator: torch.Generator | None = None) -> Tensor:
        batch, n = points.shape[:2]

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator).to(points)

        low, high = self.scale
        if self.scale != (1.0, 1.0):
            points = points * (low + (high - low) * uniform(batch, 1, 3 if self.per_axis else 1))
        if self.rotate:
            points = points @ rotations(batch, self.rotate, generator).to(points).transpose(1, 2)
        if self.shift:
            points = points + self.shift * (2 * uniform(batch, 1, 3) - 1)
        if self.jitter:
            points = points + self.jitter * torch.randn(points.shape, generator=generator).to(points)
        if self.dropout:
            gone = uniform(batch, n, 1) < self.dropout * uniform(batch, 1, 1)
            points = torch.where(gone, points[:, :1], points)
        return points
