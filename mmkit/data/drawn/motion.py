"""Drawn clips of one moving object: training data of the bundled default, a toy for the app, input for tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MOTIONS = ("moves left", "moves right", "moves up", "moves down", "stands still")
"""The classes of `drawn_motion`."""

BACKWARDS = (1, 0, 3, 2, 4)
"""Class of a clip played backwards."""


def drawn_motion(
    batch: int,
    generator: torch.Generator | None = None,
    *,
    size: int = 48,
    num_frames: int = 8,
    label: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Clips `(batch, frames, 3, size, size)` with values in 0..1, and their classes (indices into `MOTIONS`).

    A bright ellipse or box of 8 to 16 px moves 1.5 to 4 px a frame (for 48 px and 8 frames; other sizes and lengths show the
    same scenes), or stands still, over a darker, smooth, random background. A single frame does not tell the class.

    Args:
        batch: number of clips.
        generator: source of every random draw.
        size, num_frames: side in pixels and clip length.
        label: draw this class only.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    labels = torch.randint(len(MOTIONS), (batch,), generator=generator)
    if label is not None:
        labels = torch.full_like(labels, label)
    t = torch.linspace(-3.5, 3.5, num_frames) if num_frames > 1 else torch.zeros(1)
    speed = uniform(1.5, 4.0, batch)
    dx = torch.where(labels == 0, -speed, torch.where(labels == 1, speed, uniform(-0.15, 0.15, batch)))
    dy = torch.where(labels == 2, -speed, torch.where(labels == 3, speed, uniform(-0.15, 0.15, batch)))
    x = uniform(14, 34, batch)[:, None] + dx[:, None] * t
    y = uniform(14, 34, batch)[:, None] + dy[:, None] * t
    rx, ry = uniform(4, 8, batch), uniform(4, 8, batch)
    axis = (torch.arange(size) + 0.5) * (48 / size)
    u = ((axis - x[..., None]) / rx[:, None, None])[:, :, None, :]  # (batch, T, 1, W)
    v = ((axis - y[..., None]) / ry[:, None, None])[:, :, :, None]
    box = (torch.rand(batch, generator=generator) < 0.5)[:, None, None, None]
    distance = torch.where(box, torch.maximum(u.abs(), v.abs()), (u.square() + v.square()).sqrt())
    mask = ((1 - distance) * 5).clamp(0, 1).unsqueeze(2)  # soft edge
    ground = F.interpolate(uniform(0, 1, batch, 3, 5, 5), (size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    ground = ground * uniform(0.1, 0.5, batch)[:, None, None, None]
    color = uniform(0.6, 1, batch, 3)
    clips = ground[:, None] * (1 - mask) + color[:, None, :, None, None] * mask
    clips = clips * uniform(0.8, 1.1, batch)[:, None, None, None, None]
    return (clips + 0.02 * torch.randn(clips.shape, generator=generator)).clamp(0, 1), labels


def moving_squares(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips `(n, 8, 3, 32, 32)` of a bright square that moves to the right (1) or to the left (0) by 3 px a frame."""
    label = torch.randint(2, (n,), generator=generator)
    y = torch.randint(0, 26, (n,), generator=generator)
    start = torch.randint(0, 6, (n,), generator=generator)
    t = torch.arange(8)
    x = torch.where(label[:, None] == 1, start[:, None] + 3 * t, start[:, None] + 3 * (7 - t))  # (n, 8)
    axis = torch.arange(32)
    columns = (axis >= x[..., None]) & (axis < x[..., None] + 6)
    rows = (axis >= y[:, None]) & (axis < y[:, None] + 6)
    square = (rows[:, None, :, None] & columns[:, :, None, :]).float()
    clips = square.unsqueeze(2).expand(-1, -1, 3, -1, -1) + 0.02 * torch.randn(n, 8, 3, 32, 32, generator=generator)
    return clips, label
