"""Drawn clips of one moving object: training data of the bundled default, a toy for the app, input for tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MOTIONS = ("moves left", "moves right", "moves up", "moves down", "stands still")
"""The classes of `drawn_motion`."""

BACKWARDS = (1, 0, 3, 2, 4)
"""Class of a clip played backwards."""

WHOLE = "the whole picture moves"
"""The sixth class of `any_motion`."""


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


def any_motion(
    batch: int, generator: torch.Generator, grounds: Tensor | None = None, *, size: int = 32, num_frames: int = 8
) -> tuple[Tensor, Tensor]:
    """Clips `(batch, frames, 3, size, size)` with values in 0..1, and their classes: indices into `(*MOTIONS, WHOLE)`.

    One object of any color and texture, round, square or ragged, 6 to 20 px wide, goes 0.7 to 7 px a frame (for 48 px and 8 frames),
    faster or slower towards the end, over a ground that is plain, smooth, rough or a photograph, bright or dark. It stands out by its
    mean brightness or color. In the sixth class, twice as often drawn as any other, everything moves together, with an object or without
    one, and the ground is never plain or smooth: there it could not be told from an object that moves.

    Args:
        batch: number of clips.
        generator: source of every random draw.
        grounds: (N, 3, H, W) in 0..1, square photographs to move over and to cut textures from; without them there are none.
        size, num_frames: side in pixels and clip length.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    def some(share: float) -> Tensor:
        return torch.rand(batch, generator=generator) < share

    def wide(values: Tensor) -> Tensor:
        return values[:, None, None, None]

    labels = torch.randint(len(MOTIONS) + 2, (batch,), generator=generator).clamp(max=len(MOTIONS))
    whole = labels == len(MOTIONS)
    time = torch.linspace(-1, 1, num_frames)
    way = 3.5 * (time + uniform(-0.25, 0.25, batch)[:, None] * (1 - time.square()))  # steady, or faster at one end
    speed = 0.7 * (7 / 0.7) ** uniform(0, 1, batch)
    across = speed * uniform(-0.25, 0.25, batch)
    angle = uniform(0, 2 * torch.pi, batch)
    sideways = labels <= 1
    along = torch.where(labels % 2 == 0, -speed, speed)
    still = labels == 4
    dx = torch.where(whole, speed * angle.cos(), torch.where(sideways, along, across)).masked_fill(still, 0)
    dy = torch.where(whole, speed * angle.sin(), torch.where(sideways, across, along)).masked_fill(still, 0)
    dx, dy = (d[:, None] * way / 24 for d in (dx, dy))  # in halves of the picture's side

    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    shift = [torch.where(whole[:, None], d, torch.zeros(())) for d in (dx, dy)]
    places = torch.stack([x - shift[0][..., None, None], y - shift[1][..., None, None]], -1)  # (B, T, H, W, 2)
    ground = _sample(_surfaces(batch, generator, grounds, whole), 0.5 * places)
    start = [uniform(-0.5, 0.5, batch)[:, None] for _ in range(2)]
    u, v = x - (start[0] + dx)[..., None, None], y - (start[1] + dy)[..., None, None]
    turn = wide(uniform(0, torch.pi, batch))
    radius = uniform(0.13, 0.4, 2, batch)[..., None, None, None]
    u, v = (u * turn.cos() + v * turn.sin()) / radius[0], (v * turn.cos() - u * turn.sin()) / radius[1]
    polar, lobes = torch.atan2(v, u), wide(torch.randint(2, 7, (batch,), generator=generator))
    ragged = 1 + wide(some(0.5) * uniform(0.1, 0.35, batch)) * (lobes * polar).sin()
    distance = torch.where(wide(some(0.4)), torch.maximum(u.abs(), v.abs()), u.hypot(v) / ragged)
    mask = ((1 - distance) * radius.amin(0) * size / 2 + 0.5).clamp(0, 1).unsqueeze(2)  # an edge one pixel wide
    mask = mask * wide(~(whole & some(0.5))).unsqueeze(-1)
    thing = _sample(_surfaces(batch, generator, grounds), 0.4 * torch.stack([u, v], -1).clamp(-2, 2))
    inside, around = ((part * mask).sum((1, 3, 4)) / mask.sum((1, 3, 4)).clamp(min=1) for part in (thing, ground))
    darker = around.mean(1, keepdim=True) > uniform(0.25, 0.75, batch, 1)
    wanted = around + torch.where(darker, -1.0, 1.0) * uniform(0.15, 0.6, batch, 3)
    thing = thing + (wanted - inside)[:, None, :, None, None]
    clips = ground * (1 - mask) + thing.clamp(0, 1) * mask
    flicker = 1 + 0.04 * wide(some(0.3)).unsqueeze(-1) * torch.randn(batch, num_frames, 1, 1, 1, generator=generator)
    noise = wide(uniform(0, 0.04, batch)).unsqueeze(-1) * torch.randn(clips.shape, generator=generator)
    return (clips * flicker + noise).clamp(0, 1), labels


def _surfaces(
    batch: int, generator: torch.Generator, photos: Tensor | None, detailed: Tensor | None = None, side: int = 64
) -> Tensor:
    """Pictures (batch, 3, side, side) to paint with: plain, smooth, rough, or a photograph; not plain where `detailed`."""
    smooth, rough = (
        F.interpolate(
            torch.rand(batch, 3, n, n, generator=generator), (side, side), mode="bicubic", align_corners=False
        )
        for n in (6, 28)
    )
    grey = torch.rand(batch, 1, 1, 1, generator=generator) < 0.3
    strength = torch.rand(2, batch, 1, 1, 1, generator=generator)
    if detailed is not None:
        strength[1] = torch.where(detailed[:, None, None, None], 0.6 + 0.4 * strength[1], strength[1])
    surface = torch.rand(batch, 3, 1, 1, generator=generator).expand_as(smooth)
    surface = surface + strength[0] * (smooth - 0.5) + 0.8 * strength[1].square() * (rough - 0.5)
    surface = torch.where(grey, surface.mean(1, keepdim=True), surface)
    if photos is not None:
        chosen = photos[torch.randint(len(photos), (batch,), generator=generator)]
        chosen = F.interpolate(chosen, (side, side), mode="bilinear", antialias=True)
        gain = 0.5 + torch.rand(batch, 1, 1, 1, generator=generator)
        surface = torch.where(torch.rand(batch, 1, 1, 1, generator=generator) < 0.55, chosen * gain, surface)
    return surface.clamp(0, 1)


def _sample(pictures: Tensor, places: Tensor) -> Tensor:
    """Colors (B, T, 3, H, W) of pictures (B, 3, h, w) at places (B, T, H, W, 2) in -1..1, mirrored beyond."""
    frames = places.shape[1]
    flat = F.grid_sample(
        pictures, places.flatten(1, 2), mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return flat.unflatten(2, (frames, places.shape[2])).transpose(1, 2)


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
