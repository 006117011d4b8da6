"""Pictures drawn by a program: an endless, license-free classification task to pre-train small backbones on.

Three families of classes: filled shapes, textures, and glyphs (a few pen strokes that are fixed for each class and drawn
with a shaking hand). Colors, background, position, size, rotation, line width, clutter and noise vary in all of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from mmkit.errors import InputError

Rng = np.random.Generator
Points = np.ndarray[Any, Any]

NUM_GLYPHS = 24


class ProceduralImages(Dataset[Any]):
    """`dataset[i] -> (image, label)`; picture `i` depends only on `(seed, i)`, and classes follow in turn.

    Args:
        length: number of pictures.
        size: side in pixels.
        seed: different seeds give disjoint random streams (training and validation).
        transform: applied to the RGB PIL image; None returns the image.

    Raises:
        InputError: a length or size below 1.
    """

    def __init__(
        self, length: int, size: int = 32, seed: int = 0, transform: Callable[[Any], Any] | None = None
    ) -> None:
        if length < 1 or size < 8:
            raise InputError(f"length must be at least 1 and size at least 8, not {length} and {size}.")
        self.length, self.size, self.seed, self.transform = length, size, seed, transform
        self.class_names = class_names()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < self.length:
            raise IndexError(index)  # ends iteration over the data set
        label = index % len(self.class_names)
        image = draw(self.class_names[label], np.random.default_rng((self.seed, index)), self.size)
        return (image if self.transform is None else self.transform(image)), label

    def describe(self, index: int) -> str:
        """What is drawn, for messages."""
        return f"{self.class_names[index % len(self.class_names)]} {index}"


def class_names() -> list[str]:
    """All classes of `draw`."""
    return [*_SHAPES, *_TEXTURES, *(f"glyph_{i:02d}" for i in range(NUM_GLYPHS))]


def draw(name: str, rng: Rng, size: int = 32) -> Image.Image:
    """One RGB picture of class `name`; raises `InputError` for an unknown class."""
    side = 2 * size  # drawn at twice the size and averaged, for smooth edges
    if name in _TEXTURES:
        image = Image.fromarray(_texture(_TEXTURES[name], rng, side))
    else:
        back, fore = _two_colors(rng)
        image = _background(rng, side, back)
        pen = ImageDraw.Draw(image)
        if name in _SHAPES:
            _clutter(pen, rng, side, back)
            centre, radius = rng.uniform(0.38, 0.62, 2) * side, rng.uniform(0.22, 0.4) * side
            outline = _rotate(_SHAPES[name](rng), rng.uniform(-0.35, 0.35)) * radius + centre
            pen.polygon([tuple(p) for p in outline], fill=fore)
        elif name.startswith("glyph_") and name[6:].isdecimal() and int(name[6:]) < NUM_GLYPHS:
            _draw_glyph(pen, rng, side, int(name[6:]), fore)
        else:
            raise InputError(f"Unknown procedural class {name!r}.")
    image = image.resize((size, size), Image.Resampling.BOX)
    noise = rng.normal(0, rng.uniform(0, 12), (size, size, 3))
    return Image.fromarray(np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8))


def outline(name: str, rng: Rng) -> np.ndarray[Any, Any]:
    """The corners (N, 2), x and y in about -1..1, of a filled shape such as "star"; raises `InputError` for another name."""
    if name not in _SHAPES:
        raise InputError(f"{name!r} is no filled shape; these are: {', '.join(_SHAPES)}.")
    return _SHAPES[name](rng)


def texture(rng: Rng, side: int) -> np.ndarray[Any, Any]:
    """A random texture in two colors, uint8 (side, side, 3)."""
    return _texture(list(_TEXTURES.values())[rng.integers(len(_TEXTURES))], rng, side)


# --------------------------------------------------------------------------------------------------------- colors


def _two_colors(rng: Rng) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Background and foreground that differ clearly in brightness; half of them grey."""
    while True:
        pair = rng.uniform(0, 255, (2, 3))
        if rng.random() < 0.5:
            pair = np.repeat(pair[:, :1], 3, axis=1)
        brightness = pair @ (0.299, 0.587, 0.114)
        if abs(brightness[0] - brightness[1]) > 70:
            return tuple(int(v) for v in pair[0]), tuple(int(v) for v in pair[1])


def _background(rng: Rng, side: int, color: tuple[int, ...]) -> Image.Image:
    """One color with a weak gradient in a random direction."""
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 25)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    shade = (math.cos(angle) * x + math.sin(angle) * y)[..., None] * strength
    return Image.fromarray(np.clip(shade + color, 0, 255).astype(np.uint8))


def _clutter(pen: ImageDraw.ImageDraw, rng: Rng, side: int, near: tuple[int, ...]) -> None:
    """A few faint dots, so that a class is not just any edge."""
    for _ in range(int(rng.integers(0, 4))):
        x, y = rng.uniform(0, side, 2)
        r = rng.uniform(0.02, 0.06) * side
        pen.ellipse(
            (x - r, y - r, x + r, y + r), fill=tuple(int(v) for v in np.clip(near + rng.normal(0, 20, 3), 0, 255))
        )


# ---------------------------------------------------------------------------------------------------------- shapes


def _around(radii: Points) -> Points:
    angles = np.linspace(0, 2 * math.pi, len(radii), endpoint=False) - math.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]


def _polygon(corners: int, rng: Rng) -> Points:
    return _around(np.ones(corners)) * rng.uniform(0.85, 1.0, 2)


def _star(points: int, rng: Rng) -> Points:
    return _around(np.tile([1.0, rng.uniform(0.35, 0.5)], points))


def _box(width: float, height: float) -> Points:
    return np.array([(-width, -height), (width, -height), (width, height), (-width, height)])


def _cross(rng: Rng) -> Points:
    w = rng.uniform(0.25, 0.4)
    return np.array(
        [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]
    )


def _crescent(rng: Rng) -> Points:
    t = np.linspace(-2.2, 2.2, 40)
    outer = np.stack([np.cos(t), np.sin(t)], 1)
    return np.concatenate([outer, (outer * (0.75, 0.9) + (rng.uniform(0.35, 0.5), 0))[::-1]])


def _heart(rng: Rng) -> Points:
    t = np.linspace(0, 2 * math.pi, 48)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], 1) / 17 * rng.uniform(0.9, 1.1)


def _arrow(rng: Rng) -> Points:
    w, h = rng.uniform(0.2, 0.3), rng.uniform(-0.1, 0.2)
    return np.array([(0, -1), (0.8, h), (w, h), (w, 1), (-w, 1), (-w, h), (-0.8, h)])


_SHAPES: dict[str, Callable[[Rng], Points]] = {
    "disk": lambda rng: _polygon(40, rng),
    "triangle": lambda rng: _polygon(3, rng),
    "square": lambda rng: _box(0.8, 0.8 * rng.uniform(0.9, 1.1)),
    "bar": lambda rng: _box(1.0, rng.uniform(0.2, 0.35)),
    "hexagon": lambda rng: _polygon(6, rng),
    "star": lambda rng: _star(5, rng),
    "burst": lambda rng: _star(9, rng),
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
    "arrow": _arrow,
    "half_disk": lambda rng: np.stack([np.cos(np.linspace(0, math.pi, 24)), np.sin(np.linspace(0, math.pi, 24))], 1),
}


# -------------------------------------------------------------------------------------------------------- textures


def _texture(pattern: Callable[[Points, Points, Rng], Points], rng: Rng, side: int) -> np.ndarray[Any, Any]:
    """Blend two colors by a pattern in 0..1 on rotated, shifted coordinates."""
    back, fore = _two_colors(rng)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    angle = rng.uniform(0, 2 * math.pi)
    u = math.cos(angle) * x + math.sin(angle) * y + rng.uniform(-1, 1)
    v = -math.sin(angle) * x + math.cos(angle) * y + rng.uniform(-1, 1)
    share = np.clip(pattern(u, v, rng), 0, 1)[..., None]
    return (share * fore + (1 - share) * back).astype(np.uint8)


def _wave(t: Points, rng: Rng, low: float = 5.0, high: float = 9.0) -> Points:
    return 0.5 + 0.5 * np.sin(t * rng.uniform(low, high) * 2)


def _sharp(t: Points) -> Points:
    return (t - 0.5) * 8 + 0.5


def _blobs(u: Points, v: Points, rng: Rng) -> Points:
    field = np.zeros_like(u)
    for _ in range(6):
        a, b, phase = *rng.normal(0, 5, 2), rng.uniform(0, 6.3)
        field += np.sin(a * u + b * v + phase)
    return _sharp(field / 4 + 0.5)


def _bricks(u: Points, v: Points, rng: Rng) -> Points:
    rows = v * rng.uniform(3, 4.5)
    shifted = u * rng.uniform(1.8, 2.6) + 0.5 * (np.floor(rows) % 2)
    return np.minimum(_sharp((rows % 1) * 3), _sharp((shifted % 1) * 4))


_TEXTURES: dict[str, Callable[[Points, Points, Rng], Points]] = {
    "stripes": lambda u, v, rng: _sharp(_wave(u, rng)),
    "waves": lambda u, v, rng: _wave(u + 0.15 * np.sin(v * rng.uniform(5, 8)), rng),
    "checker": lambda u, v, rng: _sharp(0.5 + 2 * (_wave(u, rng, 4, 6) - 0.5) * (_wave(v, rng, 4, 6) - 0.5)),
    "dots": lambda u, v, rng: _sharp(_wave(u, rng, 4, 6) * _wave(v, rng, 4, 6)),
    "rings": lambda u, v, rng: _wave(np.hypot(u, v), rng, 6, 10),
    "rays": lambda u, v, rng: _sharp(0.5 + 0.5 * np.sin(np.arctan2(v, u) * int(rng.integers(6, 11)))),
    "blobs": _blobs,
    "bricks": _bricks,
}


# ---------------------------------------------------------------------------------------------------------- glyphs


@functools.cache
def _glyph(number: int) -> tuple[Points, ...]:
    """The strokes of a class: two to four line or arc pieces between points of a 3x4 grid, centred, in -1..1."""
    rng = np.random.default_rng((20260101, number))
    grid = np.array([(x, y) for y in (-1, -1 / 3, 1 / 3, 1) for x in (-0.65, 0.0, 0.65)])
    strokes, here = [], grid[rng.integers(len(grid))]
    for _ in range(int(rng.integers(2, 5))):
        others = [g for g in grid if 0.6 < np.linalg.norm(g - here) < 1.9]
        there = others[rng.integers(len(others))]
        bend = rng.choice([0.0, 0.0, 0.6, -0.6, 1.0, -1.0])
        t = np.linspace(0, 1, 12)[:, None]
        normal = np.array([-(there - here)[1], (there - here)[0]]) * bend
        middle = (here + there) / 2 + normal
        strokes.append((1 - t) ** 2 * here + 2 * t * (1 - t) * middle + t**2 * there)
        here = there if rng.random() < 0.75 else grid[rng.integers(len(grid))]
    low, high = np.concatenate(strokes).min(0), np.concatenate(strokes).max(0)
    return tuple((stroke - (low + high) / 2) / ((high - low).max() / 2) for stroke in strokes)


def _draw_glyph(pen: ImageDraw.ImageDraw, rng: Rng, side: int, number: int, color: tuple[int, ...]) -> None:
    strokes = _glyph(number)
    centre, radius = rng.uniform(0.44, 0.56, 2) * side, rng.uniform(0.28, 0.4, 2) * side
    angle, shear, width = rng.uniform(-0.25, 0.25), rng.uniform(-0.3, 0.3), round(rng.uniform(0.05, 0.12) * side)
    frequency, phase, shake = rng.uniform(1, 3, 2), rng.uniform(0, 6.3, 2), rng.uniform(0, 0.12, 2)
    for stroke in strokes:
        moved = stroke + rng.normal(0, 0.05, 2) + shake * np.sin(stroke[:, ::-1] * frequency + phase)
        moved = moved + np.stack([shear * moved[:, 1], np.zeros(len(moved))], 1)
        line = _rotate(moved, angle) * radius + centre
        pen.line([tuple(p) for p in line], fill=color, width=width, joint="curve")
        for x, y in (line[0], line[-1]):  # round ends
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=color)


def _rotate(points: Points, angle: float) -> Points:
    c, s = math.cos(angle), math.sin(angle)
    return points @ np.array([(c, s), (-s, c)])
