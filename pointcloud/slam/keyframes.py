"""Keyframes: pictures that mapping goes back to, chosen by how much of the present picture they see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkit.pointcloud.slam.frames import RGBDFrame, points_of_depth, to_world

SAMPLES, BORDER = 1600, 20


@dataclass
class Keyframe:
    """A frame (at the map's resolution, labels as class numbers) with its number and its world-to-camera pose."""

    index: int
    frame: RGBDFrame
    view: Tensor


def border_of(width: int, height: int) -> float:
    """The margin inside which points count as seen: 20 pixels, less in pictures below 160 pixels, where the official 20 leave nothing."""
    return min(BORDER, min(width, height) / 8)


def sampled_points(depth: Tensor, K: Tensor, view: Tensor, chosen: Tensor, *, offset: float = 0.5) -> Tensor:
    """World points of chosen pixels: numbers among those with depth, in reading order.

    Points at the world's origin are dropped, and those chosen twice with all their copies, as in the official code.
    """
    points = points_of_depth(depth, K, offset=offset)[depth > 0][chosen]
    world = to_world(points, view)
    rounded = torch.cat([(world * 1e4).round().abs(), torch.zeros(1, 3)])
    _, which, counts = rounded.unique(dim=0, return_inverse=True, return_counts=True)
    return world[counts[which[:-1]] == 1]


def share_inside(points: Tensor, K: Tensor, view: Tensor, width: int, height: int, border: float) -> float:
    """The part of world points (P, 3) that a camera sees inside its border."""
    if not len(points):
        return 0.0
    local = points @ view[:3, :3].T + view[:3, 3]
    z = local[:, 2] + 1e-5
    x, y = (K[0, 0] * local[:, 0] + K[0, 2] * local[:, 2]) / z, (K[1, 1] * local[:, 1] + K[1, 2] * local[:, 2]) / z
    inside = (x > border) & (x < width - border) & (y > border) & (y < height - border) & (local[:, 2] > 0)
    return float(inside.float().mean())


class KeyframeSelector:
    """Chooses the frames of a mapping round: keyframes that see the same place, at random among them, then the last one.

    The official code sorts by overlap first; as a random subset follows, the order is of no consequence.
    """

    def __init__(self, window: int, generator: torch.Generator):
        self.window, self.generator = window, generator

    def overlap(self, frame: RGBDFrame, view: Tensor, keyframes: list[Keyframe]) -> list[float]:
        """How much of the frame each keyframe sees, 0..1."""
        valid = int((frame.depth > 0).sum())
        if not valid or not keyframes:
            return [0.0] * len(keyframes)
        chosen = torch.randint(valid, (SAMPLES,), generator=self.generator)
        points = sampled_points(frame.depth, frame.K, view, chosen)
        border = border_of(frame.width, frame.height)
        return [share_inside(points, k.frame.K, k.view, k.frame.width, k.frame.height, border) for k in keyframes]

    def choose(self, frame: RGBDFrame, view: Tensor, keyframes: list[Keyframe]) -> list[int]:
        """Numbers in `keyframes`: up to window - 2 that overlap, then the last one; the present frame is the caller's."""
        if not keyframes:
            return []
        seen = [i for i, part in enumerate(self.overlap(frame, view, keyframes[:-1])) if part > 0]
        order = torch.randperm(len(seen), generator=self.generator).tolist()
        return [seen[i] for i in order[: max(self.window - 2, 0)]] + [len(keyframes) - 1]
