"""Drawn point clouds: sixteen kinds of things built from boxes, tubes, ellipsoids and rings, clean or as a depth camera sees them.

Up is +y. A sample is a function of (seed, class, index) alone, so any of them can be made without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from mmkit.errors import InputError, nearest

Vector = Sequence[float]


class _Solid(NamedTuple):
    """One primitive: its part's name, its area and how to draw n points on it."""

    part: str
    area: float
    draw: Callable[[Generator, int], np.ndarray]


def _box(part: str, center: Vector, size: Vector) -> _Solid:
    a, b, c = size
    faces = np.array([b * c, b * c, a * c, a * c, a * b, a * b])

    def draw(rng: Generator, n: int) -> np.ndarray:
        points = rng.uniform(-0.5, 0.5, (n, 3))
        face = rng.choice(6, n, p=faces / faces.sum())
        points[np.arange(n), face // 2] = face % 2 - 0.5
        return points * size + center

    return _Solid(part, float(faces.sum()), draw)


def _tube(part: str, start: Vector, end: Vector, r0: float, r1: float, caps: bool = False) -> _Solid:
    """A truncated cone from `start` to `end`, open or closed."""
    origin, axis = np.array(start, float), np.subtract(end, start).astype(float)
    length = float(np.linalg.norm(axis))
    side = np.cross(axis, (1.0, 0.0, 0.0) if abs(axis[0]) < 0.9 * length else (0.0, 1.0, 0.0))
    side /= np.linalg.norm(side)
    other = np.cross(axis / length, side)
    areas = np.array([np.pi * (r0 + r1) * np.hypot(length, r0 - r1), caps * np.pi * r0**2, caps * np.pi * r1**2])

    def draw(rng: Generator, n: int) -> np.ndarray:
        where = rng.choice(3, n, p=areas / areas.sum())
        t = np.where(where == 0, rng.random(n), where - 1)
        radius = (r0 + (r1 - r0) * t) * np.where(where == 0, 1.0, np.sqrt(rng.random(n)))
        angle = rng.uniform(0, 2 * np.pi, n)
        around = np.cos(angle)[:, None] * side + np.sin(angle)[:, None] * other
        return origin + t[:, None] * axis + radius[:, None] * around

    return _Solid(part, float(areas.sum()), draw)


def _ball(part: str, center: Vector, radii: Vector) -> _Solid:
    def draw(rng: Generator, n: int) -> np.ndarray:
        points = rng.normal(size=(n, 3))
        return points / np.linalg.norm(points, axis=1, keepdims=True) * radii + center

    a, b, c = radii
    return _Solid(part, float(4 * np.pi * (((a * b) ** 1.6 + (a * c) ** 1.6 + (b * c) ** 1.6) / 3) ** (1 / 1.6)), draw)


def _ring(part: str, center: Vector, radius: float, thick: float, axis: int) -> _Solid:
    def draw(rng: Generator, n: int) -> np.ndarray:
        u, v = rng.uniform(0, 2 * np.pi, (2, n))
        wide = radius + thick * np.cos(v)
        return np.roll(np.stack([thick * np.sin(v), wide * np.cos(u), wide * np.sin(u)], 1), axis, 1) + center

    return _Solid(part, float(4 * np.pi**2 * radius * thick), draw)


def _legs(r: Callable[..., float], width: float, height: float, depth: float, thick: float) -> list[_Solid]:
    """Four legs, or one on a foot."""
    if r(0, 1) < 0.3:
        foot = _tube("legs", (0, 0, 0), (0, 0.04, 0), 0.35 * width, 0.35 * width, True)
        return [_tube("legs", (0, 0, 0), (0, height, 0), thick, thick), foot]
    lean = r(0, 0.06)
    corners = [(sx * (width / 2 - thick), sz * (depth / 2 - thick)) for sx in (-1, 1) for sz in (-1, 1)]
    return [_tube("legs", (x * (1 + lean), 0, z * (1 + lean)), (x, height, z), thick, thick) for x, z in corners]


def _chair(r: Callable[..., float]) -> list[_Solid]:
    w, h, d = r(0.4, 0.6), r(0.35, 0.55), r(0.4, 0.6)
    tall, slats = r(0.35, 0.7), int(r(0, 5))
    solids = [*_legs(r, w, h, d, r(0.015, 0.035)), _box("seat", (0, h, 0), (w, r(0.03, 0.08), d))]
    if slats < 2:
        return [*solids, _box("back", (0, h + tall / 2, -d / 2), (w, tall, 0.04))]
    bars = [
        _box("back", ((i / (slats - 1) - 0.5) * 0.9 * w, h + tall / 2, -d / 2), (0.04, tall, 0.03))
        for i in range(slats)
    ]
    return [*solids, *bars, _box("back", (0, h + tall, -d / 2), (w, 0.08, 0.04))]


def _table(r: Callable[..., float]) -> list[_Solid]:
    w, h, d = r(0.8, 1.5), r(0.5, 0.8), r(0.5, 1.0)
    top = (
        _tube("top", (0, h, 0), (0, h + 0.05, 0), w / 2, w / 2, True)
        if r(0, 1) < 0.3
        else _box("top", (0, h, 0), (w, 0.05, d))
    )
    return [*_legs(r, w * 0.9, h, d * 0.9, r(0.02, 0.05)), top]


def _lamp(r: Callable[..., float]) -> list[_Solid]:
    h, wide, shade = r(0.6, 1.5), r(0.15, 0.3), r(0.2, 0.4)
    base = _tube("base", (0, 0, 0), (0, 0.04, 0), r(0.1, 0.2), r(0.1, 0.2), True)
    return [
        base,
        _tube("pole", (0, 0, 0), (0, h, 0), 0.02, 0.02),
        _tube("shade", (0, h, 0), (0, h + shade, 0), wide, wide * r(0.4, 1)),
    ]


def _bed(r: Callable[..., float]) -> list[_Solid]:
    w, d, h = r(0.9, 1.6), r(1.8, 2.1), r(0.25, 0.45)
    solids = [_box("frame", (0, h / 2, 0), (w, h, d)), _box("frame", (0, h + 0.2, -d / 2), (w, r(0.4, 0.9), 0.06))]
    count = 1 if w < 1.2 else 2
    pillows = [
        _ball("pillows", ((i - (count - 1) / 2) * w / 2, h + 0.1, -d / 2 + 0.3), (0.28, 0.08, 0.2))
        for i in range(count)
    ]
    return [*solids, _box("mattress", (0, h + 0.06, 0), (w * 0.95, 0.14, d * 0.95)), *pillows]


def _sofa(r: Callable[..., float]) -> list[_Solid]:
    w, d, h = r(1.2, 2.2), r(0.7, 0.9), r(0.3, 0.45)
    arm = r(0.1, 0.25)
    arms = [_box("arms", (s * (w / 2 - arm / 2), h / 2 + 0.1, 0), (arm, h + 0.2, d)) for s in (-1, 1)]
    return [
        _box("seat", (0, h / 2, 0), (w, h, d)),
        *arms,
        _box("back", (0, h + 0.2, -d / 2 + 0.1), (w, r(0.4, 0.6), 0.2)),
    ]


def _shelf(r: Callable[..., float]) -> list[_Solid]:
    w, h, d, boards = r(0.6, 1.2), r(1.0, 2.0), r(0.25, 0.4), int(r(3, 7))
    sides = [_box("frame", (s * w / 2, h / 2, 0), (0.03, h, d)) for s in (-1, 1)]
    back = [_box("frame", (0, h / 2, -d / 2), (w, h, 0.02))] if r(0, 1) < 0.5 else []
    return [*sides, *back, *[_box("boards", (0, i * h / (boards - 1), 0), (w, 0.03, d)) for i in range(boards)]]


def _cabinet(r: Callable[..., float]) -> list[_Solid]:
    w, h, d, doors = r(0.6, 1.2), r(0.7, 1.8), r(0.4, 0.6), int(r(1, 4))
    knobs = [
        _ball("knobs", ((i + 0.5) / doors * w - w / 2, h * r(0.4, 0.6), d / 2 + 0.03), (0.03,) * 3)
        for i in range(doors)
    ]
    seams = [
        _box("body", (i / doors * w - w / 2, h / 2, d / 2 + 0.01), (0.02, h * 0.95, 0.02)) for i in range(1, doors)
    ]
    return [_box("body", (0, h / 2, 0), (w, h, d)), *seams, *knobs]


def _monitor(r: Callable[..., float]) -> list[_Solid]:
    w, h, up = r(0.5, 0.8), r(0.3, 0.5), r(0.1, 0.25)
    return [
        _box("screen", (0, up + h / 2, 0), (w, h, r(0.02, 0.08))),
        _tube("stand", (0, 0, 0), (0, up, 0), 0.025, 0.025),
        _box("stand", (0, 0.01, 0), (w * r(0.3, 0.6), 0.02, r(0.15, 0.25))),
    ]


def _bottle(r: Callable[..., float]) -> list[_Solid]:
    wide, h, neck, top = r(0.1, 0.2), r(0.4, 0.7), r(0.03, 0.06), r(0.1, 0.25)
    return [
        _tube("body", (0, 0, 0), (0, h, 0), wide, wide * r(0.9, 1.0), True),
        _tube("neck", (0, h, 0), (0, h + top / 2, 0), wide, neck),
        _tube("neck", (0, h + top / 2, 0), (0, h + top, 0), neck, neck, True),
    ]


def _mug(r: Callable[..., float]) -> list[_Solid]:
    wide, h = r(0.2, 0.35), r(0.35, 0.6)
    handle = _ring("handle", (wide, h / 2, 0), h * r(0.2, 0.35), r(0.02, 0.04), 2)
    return [
        _tube("body", (0, 0, 0), (0, h, 0), wide * r(0.8, 1), wide),
        _tube("body", (0, 0, 0), (0, 0.01, 0), wide * 0.8, 0.01),
        handle,
    ]


def _plane(r: Callable[..., float]) -> list[_Solid]:
    length, wide, span, sweep = r(1.4, 2.2), r(0.1, 0.16), r(1.2, 2.2), r(0, 0.3)
    wings = [_box("wings", (s * span / 4, 0, sweep * 0.2), (span / 2, 0.03, r(0.2, 0.4))) for s in (-1, 1)]
    fins = [((0, 0, -length / 2 + 0.1), (span * 0.35, 0.02, 0.15)), ((0, 0.15, -length / 2 + 0.1), (0.02, 0.3, 0.18))]
    tail = [_box("tail", center, size) for center, size in fins]
    engines = [
        _tube("engines", (s * span * 0.25, -0.08, 0), (s * span * 0.25, -0.08, 0.25), 0.05, 0.05) for s in (-1, 1)
    ]
    return [_ball("body", (0, 0, 0), (wide, wide, length / 2)), *wings, *tail, *(engines if r(0, 1) < 0.6 else [])]


def _car(r: Callable[..., float]) -> list[_Solid]:
    length, w, h, cabin = r(1.6, 2.2), r(0.7, 0.9), r(0.3, 0.45), r(0.4, 0.7)
    at = [(sx * w / 2, sz * length * 0.3) for sx in (-1, 1) for sz in (-1, 1)]
    wheels = [_tube("wheels", (x - 0.05, 0.15, z), (x + 0.05, 0.15, z), 0.16, 0.16, True) for x, z in at]
    roof = _box("cabin", (0, 0.15 + h + 0.15, -length * r(0, 0.15)), (w * 0.9, 0.3, length * cabin))
    return [_box("body", (0, 0.15 + h / 2, 0), (w, h, length)), roof, *wheels]


def _plant(r: Callable[..., float]) -> list[_Solid]:
    h, pot = r(0.3, 0.7), r(0.15, 0.25)
    leaves = []
    for i in range(int(r(4, 9))):
        angle, out, up = i * 2.4, r(0.1, 0.3), r(0.3, 0.6)
        leaves.append(_ball("leaves", (out * np.cos(angle), h + up, out * np.sin(angle)), (0.14, r(0.03, 0.12), 0.14)))
    return [
        _tube("pot", (0, 0, 0), (0, 0.3, 0), pot * 0.7, pot, True),
        _tube("stem", (0, 0.3, 0), (0, h + 0.3, 0), 0.02, 0.02),
        *leaves,
    ]


def _stool(r: Callable[..., float]) -> list[_Solid]:
    w, h = r(0.3, 0.45), r(0.4, 0.8)
    top = (
        _tube("seat", (0, h, 0), (0, h + 0.05, 0), w / 2, w / 2, True)
        if r(0, 1) < 0.6
        else _box("seat", (0, h, 0), (w, 0.05, w))
    )
    return [*_legs(r, w, h, w, r(0.015, 0.03)), top]


def _door(r: Callable[..., float]) -> list[_Solid]:
    w, h = r(0.7, 1.0), r(1.8, 2.2)
    frame = [_box("frame", (s * (w / 2 + 0.04), h / 2, 0), (0.08, h, 0.14)) for s in (-1, 1)]
    frame.append(_box("frame", (0, h + 0.04, 0), (w + 0.16, 0.08, 0.14)))
    return [
        _box("panel", (0, h / 2, 0), (w, h, 0.05)),
        *frame,
        _ball("handle", (w * 0.4, h * 0.48, 0.06), (0.06, 0.03, 0.05)),
    ]


def _toilet(r: Callable[..., float]) -> list[_Solid]:
    w, h, tank = r(0.18, 0.25), r(0.35, 0.45), r(0.3, 0.45)
    return [
        _tube("bowl", (0, 0, 0), (0, h, 0), w * 0.6, w),
        _ring("seat", (0, h, 0.05), w, 0.035, 1),
        _box("tank", (0, h + tank / 2 - 0.05, -w - 0.1), (0.4, tank, 0.18)),
    ]


_SHAPES: dict[str, Callable[..., list[_Solid]]] = {
    "chair": _chair, "table": _table, "lamp": _lamp, "bed": _bed, "sofa": _sofa, "shelf": _shelf, "cabinet": _cabinet,
    "monitor": _monitor, "bottle": _bottle, "mug": _mug, "plane": _plane, "car": _car, "plant": _plant, "stool": _stool,
    "door": _door, "toilet": _toilet,
}  # fmt: skip

SHAPES = tuple(_SHAPES)
"""The classes of `ProceduralShapes`."""

PARTS = {
    "chair": ("legs", "seat", "back"), "table": ("legs", "top"), "lamp": ("base", "pole", "shade"),
    "bed": ("frame", "mattress", "pillows"), "sofa": ("seat", "arms", "back"), "shelf": ("frame", "boards"),
    "cabinet": ("body", "knobs"), "monitor": ("screen", "stand"), "bottle": ("body", "neck"), "mug": ("body", "handle"),
    "plane": ("body", "wings", "tail", "engines"), "car": ("body", "cabin", "wheels"), "plant": ("pot", "stem", "leaves"),
    "stool": ("legs", "seat"), "door": ("panel", "frame", "handle"), "toilet": ("bowl", "seat", "tank"),
}  # fmt: skip
"""Names of the parts of every class."""

PART_NAMES = ("clutter", *(f"{shape} {part}" for shape, parts in PARTS.items() for part in parts))
"""All parts as one list; 0 is what does not belong to the thing."""


def drawn_shape(rng: Generator, shape: str, num_points: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 3) on a random `shape`, upright in the unit sphere, and the part of each as an index into `PART_NAMES`."""
    solids = _SHAPES[shape](lambda low, high: float(rng.uniform(low, high)))
    counts = rng.multinomial(num_points, np.array([s.area for s in solids]) / sum(s.area for s in solids))
    points = np.concatenate([s.draw(rng, n) for s, n in zip(solids, counts, strict=True)])
    parts = np.repeat([PART_NAMES.index(f"{shape} {s.part}") for s in solids], counts)
    order = rng.permutation(num_points)
    return _unit(points)[order].astype(np.float32), parts[order]


def drawn_scan(rng: Generator, shape: str, num_points: int) -> tuple[np.ndarray, np.ndarray]:
    """The same as one or two depth cameras see it: turned, among clutter, hidden in part, cropped, tilted, noisy."""
    points, parts = drawn_shape(rng, shape, 3 * num_points)
    points = points @ _yaw(rng.uniform(0, 2 * np.pi)).T
    clutter = _clutter(rng, points, int(rng.uniform(0.06, 0.24) * len(points)))
    points, parts = np.concatenate([points, clutter]), np.concatenate([parts, np.zeros(len(clutter), parts.dtype)])
    keep = np.zeros(len(points), bool)
    for _ in range(int(rng.integers(1, 3))):
        keep |= visible(points, rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.7))
    size = np.ptp(points, axis=0) / 2
    middle, half = points.mean(0) + rng.uniform(-0.25, 0.25, 3) * size, size * rng.uniform(0.8, 1.3, 3)
    inside = keep & (np.abs(points - middle) <= half).all(1)
    keep = np.flatnonzero(inside if inside.sum() >= num_points // 4 else keep)
    keep = keep[rng.permutation(len(keep))][:num_points]
    keep = np.concatenate([keep, rng.choice(keep, num_points - len(keep))])  # noise tells the repeated ones apart
    tilt = rng.uniform(0, np.deg2rad(15))
    points = points[keep] @ (_tilt(tilt) @ _yaw(rng.uniform(0, 2 * np.pi))).T
    return _unit(points + rng.normal(0, 0.015, points.shape)).astype(np.float32), parts[keep]


def _clutter(rng: Generator, points: np.ndarray, n: int) -> np.ndarray:
    """A piece of floor and, in half of the cases, of a wall."""
    low, high = points.min(0) - 0.1, points.max(0) + 0.1
    places = rng.uniform(low, high, (n, 3))
    wall = (rng.random(n) < 0.5) & bool(rng.random() < 0.5)
    places[~wall, 1] = low[1] + 0.1
    places[wall, 2] = low[2]
    return places


def visible(points: np.ndarray, yaw: float, pitch: float, cells: int = 24, slack: float = 0.18) -> np.ndarray:
    """Which points a camera sees: those near the front of their cell of a coarse depth image."""
    seen = points @ _yaw(yaw).T @ _tilt(pitch).T
    low, span = seen.min(0), np.ptp(seen, axis=0) + 1e-6
    cell = ((seen[:, :2] - low[:2]) / span[:2] * cells).astype(int)
    flat = cell[:, 0] * cells + cell[:, 1]
    front = np.full(cells * cells, -np.inf)
    np.maximum.at(front, flat, seen[:, 2])
    return seen[:, 2] >= front[flat] - slack


def _yaw(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def _tilt(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def _unit(points: np.ndarray) -> np.ndarray:
    points = points - points.mean(0)
    return points / np.linalg.norm(points, axis=1).max()


class ProceduralShapes:
    """A map-style data set of drawn clouds: (points (N, 3) float32, label), or (points, label, parts) with `parts=True`.

    Args:
        split: any word; each gives other samples. "train" and "test" are customary.
        domain: "clean" (upright, whole) or "scan" (see `drawn_scan`).
        per_class: samples of each class; index i is of class i % number of classes.
        num_points: N.
        classes: names from `SHAPES`; labels count in this order.
        seed: of everything. parts: also give the part of every point.

    Raises `InputError` for an unknown class or domain.
    """

    def __init__(
        self,
        split: str = "train",
        domain: str = "clean",
        per_class: int = 100,
        num_points: int = 1024,
        classes: Sequence[str] = SHAPES,
        seed: int = 0,
        parts: bool = False,
    ):
        for name in classes:
            if name not in _SHAPES:
                raise InputError(f"There is no drawn shape {name!r}. {nearest(name, SHAPES)}")
        if domain not in ("clean", "scan") or num_points < 1 or per_class < 1:
            raise InputError(
                f"domain is 'clean' or 'scan', sizes are at least 1: got {domain!r}, {num_points}, {per_class}."
            )
        self.classes, self.domain, self.num_points, self.parts = tuple(classes), domain, num_points, parts
        self.per_class, self.seed = per_class, (seed, *split.encode())

    def __len__(self) -> int:
        return self.per_class * len(self.classes)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int] | tuple[np.ndarray, int, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        label = index % len(self.classes)
        shape = self.classes[label]
        rng = np.random.default_rng([*self.seed, SHAPES.index(shape), index // len(self.classes)])
        points, parts = (drawn_scan if self.domain == "scan" else drawn_shape)(rng, shape, self.num_points)
        return (points, label, parts) if self.parts else (points, label)
