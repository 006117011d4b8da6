"""A drawn still life seen from all sides: banded balls on a patterned disc, ray-traced, with exact cameras and depths."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_BALLS = (  # centre x, y (down), z, radius, colours of the bands
    ((0.0, -0.52, 0.0), 0.52, ((0.85, 0.30, 0.22), (0.98, 0.80, 0.45))),
    ((0.85, -0.30, 0.25), 0.30, ((0.20, 0.45, 0.80), (0.70, 0.88, 0.95))),
    ((-0.75, -0.35, 0.45), 0.35, ((0.25, 0.60, 0.35), (0.85, 0.92, 0.55))),
    ((-0.35, -0.25, -0.80), 0.25, ((0.55, 0.30, 0.65), (0.95, 0.75, 0.90))),
    ((0.55, -0.22, -0.70), 0.22, ((0.90, 0.60, 0.15), (0.35, 0.25, 0.20))),
)
_DISC = 1.5
_LIGHT = np.array([0.4, -0.8, -0.45]) / np.linalg.norm([0.4, -0.8, -0.45])


def drawn_views(
    views: int = 24, size: int = 128, *, seed: int | None = None, between: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pictures of a still life from `views` places around it, at changing heights.

    Args:
        seed: of another still life; `None` is the one above.
        between: look from places halfway between these, in height too: views that nothing was fitted to.

    Returns:
        Pictures (V, size, size, 3) uint8 on black, depths along z (V, size, size) with 0 for nothing, world-to-camera matrices
        (V, 4, 4) with y down in the world too, and the intrinsics (3, 3).
    """
    focal = 1.15 * size
    K = np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]], np.float32)
    heights = (29, 51, 40) if between else (18, 40, 62)
    turns = [2 * math.pi * (i + 0.5 * between) / views for i in range(views)]
    matrices = np.stack([_camera(turn, math.radians(heights[i % 3])) for i, turn in enumerate(turns)])
    balls = _BALLS if seed is None else _other_balls(seed)
    rendered = [_render(m, focal, size, balls) for m in matrices]
    images = np.stack([np.rint(255 * color).astype(np.uint8) for color, _ in rendered])
    return images, np.stack([depth for _, depth in rendered]), matrices.astype(np.float32), K


def _other_balls(seed: int) -> tuple[tuple[Any, ...], ...]:
    """Six balls on the disc that do not touch."""
    rng = np.random.default_rng(seed)
    balls: list[tuple[Any, ...]] = []
    while len(balls) < 6:
        x, z, r = *rng.uniform(-1.1, 1.1, 2), rng.uniform(0.2, 0.45)
        if all(math.dist((x, -r, z), other) > r + radius for other, radius, _ in balls):
            balls.append(((x, -r, z), r, tuple(map(tuple, rng.uniform(0.1, 0.95, (2, 3))))))
    return tuple(balls)


def _camera(azimuth: float, elevation: float, distance: float = 3.6) -> np.ndarray:
    ring = math.cos(elevation) * distance
    position = np.array([ring * math.cos(azimuth), -math.sin(elevation) * distance - 0.2, ring * math.sin(azimuth)])
    forward = np.array([0, -0.2, 0]) - position
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0, -1.0, 0])
    right /= np.linalg.norm(right)
    out = np.eye(4)
    out[:3, :3] = np.stack([right, np.cross(forward, right), forward])
    out[:3, 3] = -out[:3, :3] @ position
    return out


def _render(
    matrix: np.ndarray, focal: float, size: int, balls: tuple[tuple[Any, ...], ...], samples: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Colours, the mean of `samples`^2 rays per pixel, and the least of their depths."""
    fine = (np.arange(size * samples) + 0.5) / samples - size / 2
    x, y = np.meshgrid(fine / focal, fine / focal)
    rays = np.stack([x, y, np.ones_like(x)], -1) @ matrix[:3, :3]
    origin = -matrix[:3, :3].T @ matrix[:3, 3]
    depth = np.full(x.shape, np.inf)
    color = np.zeros((*x.shape, 3))
    hit = -origin[1] / np.where(np.abs(rays[..., 1]) < 1e-9, 1e-9, rays[..., 1])  # the disc lies at y = 0
    place = origin + hit[..., None] * rays
    radius = np.hypot(place[..., 0], place[..., 2])
    on = (hit > 0) & (radius < _DISC)
    wave = 0.5 + 0.5 * np.sin(5 * place[..., 0]) * np.sin(5 * place[..., 2])
    floor = np.array([0.42, 0.40, 0.38]) + wave[..., None] * np.array([0.35, 0.36, 0.40])
    shade = np.ones_like(radius)
    for (cx, _, cz), r, _ in balls:  # a soft dark spot where a ball stands
        shade *= 1 - 0.5 * np.exp(-(((place[..., 0] - cx) ** 2 + (place[..., 2] - cz) ** 2) / (0.6 * r) ** 2))
    color[on], depth[on] = (floor * shade[..., None])[on], hit[on]
    for centre, r, bands in balls:
        away = origin - np.array(centre)
        a, b, c = (rays * rays).sum(-1), rays @ away, away @ away - r * r
        inside = b * b - a * c
        t = (-b - np.sqrt(np.maximum(inside, 0))) / a
        near = (inside > 0) & (t > 0) & (t < depth)
        normal = (away + t[..., None] * rays) / r
        band = 0.5 + 0.5 * np.tanh(3 * np.sin(7 * normal[..., 1] + 2 * normal[..., 0]))
        paint = (1 - band[..., None]) * np.array(bands[0]) + band[..., None] * np.array(bands[1])
        lit = 0.55 + 0.45 * np.clip(normal @ _LIGHT, 0, 1)
        color[near], depth[near] = (paint * lit[..., None])[near], t[near]
    blocks = (size, samples, size, samples)
    least = depth.reshape(blocks).min((1, 3))
    mean = color.reshape(*blocks, 3).mean((1, 3))
    return np.clip(mean, 0, 1), np.where(np.isfinite(least), least, 0).astype(np.float32)
