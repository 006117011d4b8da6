"""Depths from another source than a depth camera, brought to the map's scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from mmkit.errors import InputError
from mmkit.pointcloud.slam.frames import RGBDFrame
from mmkit.pointcloud.slam.poses import inverse
from mmkit.pointcloud.slam.state import SlamState


def scale_and_shift(depth: Tensor, reference: Tensor, known: Tensor, rounds: int = 4) -> tuple[float, float]:
    """The a, b for which a * depth + b is nearest to a reference where `known`, without the pixels that fit worst.

    Returns (1, 0) where less than 64 pixels are known, and a scale alone where depths hardly differ.
    """
    x, y = depth[known].double(), reference[known].double()
    if len(x) < 64:
        return 1.0, 0.0
    a, b = float((x * y).sum() / (x * x).sum().clamp_min(1e-12)), 0.0
    for _ in range(rounds):
        error = (a * x + b - y).abs()
        kept = error <= 2.5 * error.median() + 1e-9
        u, v = x[kept], y[kept]
        spread = float(u.var()) if len(u) > 1 else 0.0
        if spread < 1e-4 * float(u.mean()) ** 2:
            a, b = float((u * v).sum() / (u * u).sum().clamp_min(1e-12)), 0.0
        else:
            a = float(((u - u.mean()) * (v - v.mean())).mean()) / float(((u - u.mean()) ** 2).mean())
            b = float(v.mean()) - a * float(u.mean())
    return (a, b) if a > 0 else (1.0, 0.0)


@torch.no_grad()
def aligned_depth(
    frame: RGBDFrame, source: Callable[[Tensor, Tensor], Tensor], slam: SlamState, guess: Tensor
) -> RGBDFrame:
    """The frame with depths of a source, scaled and shifted to what the map shows at a guessed pose where it is solid (alpha 0.99)."""
    depth = torch.as_tensor(source(frame.color, frame.K)).float()
    if tuple(depth.shape) != tuple(frame.color.shape[:2]):
        raise InputError(
            f"The depth source must return {tuple(frame.color.shape[:2])}; it returned {tuple(depth.shape)}."
        )
    depth = torch.where(depth.isfinite() & (depth > 0), depth, 0.0)
    if len(slam.map):
        small = dataclasses.replace(frame, depth=depth, labels=None).resized(slam.config.resolution)
        seen = slam.map.render(
            inverse(guess).float(), small.K, small.width, small.height, codes=False, backend=slam.backend
        )
        a, b = scale_and_shift(small.depth, seen.depth, (seen.alpha > 0.99) & (small.depth > 0))
        depth = torch.where(depth > 0, (a * depth + b).clamp_min(0), 0.0)
    return dataclasses.replace(frame, depth=depth)
