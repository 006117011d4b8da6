"""A drawn room with boxes and balls, ray-traced from inside: colours, exact depths, labels and camera poses, the same on every machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SIZE = np.array([4.8, 2.6, 4.0])
"""Metres across, high and deep; the middle is the origin, y points down."""
WALLS = ("left wall", "right wall", "ceiling", "floor", "front wall", "back wall")
_SHADE = np.array([0.86, 0.92, 1.0, 0.78, 0.95, 0.82])


@dataclass(frozen=True)
class _Solid:
    centre: np.ndarray
    half: np.ndarray  # of a box; a ball's radius three times
    ball: bool
    label: int


class DrawnRoom:
    """A room, its things, and a smooth path through it.

    Args:
        seed: of things, colours and textures.
        objects: how many things; two in three are boxes, the others balls.
        num_classes: the six faces of the room are classes 0 to 5, thing i is of class 6 + i mod (num_classes - 6).
    """

    def __init__(self, seed: int = 0, objects: int = 18, num_classes: int = 24):
        if num_classes < 7 or objects < 0:
            raise ValueError(
                f"A room has at least 7 classes and no negative number of things; got {num_classes} and {objects}."
            )
        rng = np.random.default_rng(seed)
        self.seed, self.num_classes = seed, num_classes
        self.solids = [self._thing(rng, i, objects) for i in range(objects)]
        self.palette = rng.uniform(0.08, 0.92, (6 + objects, 2, 3))

    def _thing(self, rng: np.random.Generator, i: int, objects: int) -> _Solid:
        ball = i % 3 == 2
        half = np.full(3, rng.uniform(0.18, 0.35)) if ball else rng.uniform(0.15, 0.4, 3)
        turn = 2 * math.pi * (i + rng.uniform(-0.3, 0.3)) / max(objects, 1)
        ring = SIZE[[0, 2]] / 2 - 0.1 - half[[0, 2]]
        stretch = 1 / max(abs(math.sin(turn)), abs(math.cos(turn)))  # onto a rectangle along the walls
        x, z = ring * rng.uniform(0.85, 1.0) * np.array([math.sin(turn), math.cos(turn)]) * stretch
        level = SIZE[1] / 2 - half[1]
        y = level if rng.random() < 0.4 else 0.7 * level * rng.uniform(-1, 1)  # on the floor, or hanging
        return _Solid(np.array([x, y, z]), half, ball, 6 + i % (self.num_classes - 6))

    @property
    def class_names(self) -> list[str]:
        """One for each class."""
        return [*WALLS, *(f"thing {i}" for i in range(self.num_classes - 6))]

    def pose(self, t: float) -> np.ndarray:
        """Camera to world (4, 4) at frame t: about 1.4 cm and 1.3 degrees a frame, near the middle of the room."""
        yaw, pitch, roll = 0.022 * t, 0.12 * math.sin(0.05 * t), 0.03 * math.sin(0.07 * t)
        cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (math.cos, math.sin))
        about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
        about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        out = np.eye(4)
        out[:3, :3] = about_y @ about_x @ about_z
        out[:3, 3] = 0.5 * math.sin(0.035 * t), 0.1 * math.sin(0.06 * t), 0.35 * math.sin(0.028 * t + 0.4)
        return out

    def render(
        self, pose: np.ndarray, K: np.ndarray, width: int, height: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Colours (H, W, 3) in 0..1, depths along z in metres (H, W), class numbers (H, W)."""
        x, y = np.meshgrid((np.arange(width) + 0.5 - K[0, 2]) / K[0, 0], (np.arange(height) + 0.5 - K[1, 2]) / K[1, 1])
        rays = np.stack([x, y, np.ones_like(x)], -1) @ pose[:3, :3].T
        rays = np.where(np.abs(rays) < 1e-12, 1e-12, rays)
        origin = pose[:3, 3]
        ahead = np.where(rays > 0, SIZE / 2, -SIZE / 2)
        walls = (ahead - origin) / rays
        axis = walls.argmin(-1)
        depth = np.take_along_axis(walls, axis[..., None], -1)[..., 0]
        side = np.take_along_axis(rays, axis[..., None], -1)[..., 0] > 0
        thing = 2 * axis + side  # left, right, ceiling, floor; then z: -z is the back wall, +z the front wall
        thing = np.where(axis == 2, 4 + ~side, thing)
        face = axis.copy()
        for i, solid in enumerate(self.solids):
            t, hit_axis = _ball(solid, origin, rays) if solid.ball else _box(solid, origin, rays)
            near = t < depth
            depth, thing, face = np.where(near, t, depth), np.where(near, 6 + i, thing), np.where(near, hit_axis, face)
        labels = np.concatenate([np.arange(6), [s.label for s in self.solids]]).astype(np.int64)[thing]
        return self._paint(origin + depth[..., None] * rays, thing, face), depth, labels

    def _paint(self, place: np.ndarray, thing: np.ndarray, face: np.ndarray) -> np.ndarray:
        u = np.where(face == 0, place[..., 2], place[..., 0])
        v = np.where(face == 1, place[..., 2], place[..., 1])
        salt = thing.astype(np.uint64) * np.uint64(8) + face.astype(np.uint64) + np.uint64(self.seed * 1000)
        checker = (np.floor(4 * u) + np.floor(4 * v)) % 2
        mix = (
            0.55 * value_noise(6 * u, 6 * v, salt)
            + 0.3 * value_noise(15 * u, 15 * v, salt + np.uint64(7))
            + 0.15 * checker
        )
        colors = self.palette[thing]
        painted = colors[..., 0, :] + (colors[..., 1, :] - colors[..., 0, :]) * mix[..., None]
        shade = np.where(thing < 6, _SHADE[np.minimum(thing, 5)], np.array([0.85, 1.0, 0.93])[face])
        return np.clip(painted * shade[..., None], 0, 1)


def _box(solid: _Solid, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances to a box, infinite beside it, and the axis of the face that is hit."""
    one = (solid.centre - solid.half - origin) / rays
    two = (solid.centre + solid.half - origin) / rays
    into, out = np.minimum(one, two), np.maximum(one, two).min(-1)
    first = into.max(-1)
    return np.where((first < out) & (first > 1e-6), first, np.inf), into.argmax(-1)


def _ball(solid: _Solid, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances to a ball, infinite beside it; it is painted as one face, seen along z."""
    away = origin - solid.centre
    a, b, c = (rays * rays).sum(-1), rays @ away, away @ away - solid.half[0] ** 2
    inside = b * b - a * c
    t = (-b - np.sqrt(np.maximum(inside, 0))) / a
    return np.where((inside > 0) & (t > 1e-6), t, np.inf), np.full(t.shape, 2)


def value_noise(u: np.ndarray, v: np.ndarray, salt: np.ndarray) -> np.ndarray:
    """Smooth noise in 0..1 from hashed whole numbers, which are the same on every platform."""
    iu, iv = np.floor(u), np.floor(v)
    fu, fv = u - iu, v - iv
    su, sv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    a, b = iu.astype(np.int64), iv.astype(np.int64)
    low = _hash(a, b, salt) * (1 - su) + _hash(a + 1, b, salt) * su
    high = _hash(a, b + 1, salt) * (1 - su) + _hash(a + 1, b + 1, salt) * su
    return low * (1 - sv) + high * sv


def _hash(a: np.ndarray, b: np.ndarray, salt: np.ndarray) -> np.ndarray:
    x = a.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ b.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    x = (x ^ salt * np.uint64(0x165667B19E3779F9)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(40)).astype(np.float64) / float(1 << 24)


def noisy(
    color: np.ndarray, depth: np.ndarray, rng: np.random.Generator, *, rgb_sigma: float = 0.01, dropout: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """As a depth camera sees it: noise of colours, of depths as they grow, millimetres, and holes (0)."""
    color = np.clip(color + rng.normal(0, rgb_sigma, color.shape), 0, 1)
    sigma = 0.5 * (0.0012 + 0.0019 * (depth - 0.4) ** 2)
    seen = np.round((depth + rng.normal(0, 1, depth.shape) * sigma) * 1000) / 1000
    return color, np.where(rng.random(depth.shape) < dropout, 0, np.maximum(seen, 0))


def flipped_labels(labels: np.ndarray, num_classes: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Label pictures with a share of their 4 x 4 blocks given another class."""
    height, width = labels.shape
    blocks = rng.random((-(-height // 4), -(-width // 4))) < share
    other = rng.integers(0, num_classes, blocks.shape)
    grow = np.ones((4, 4), int)
    flip, new = np.kron(blocks, grow)[:height, :width] > 0, np.kron(other, grow)[:height, :width]
    return np.where(flip, new, labels)
