"""Clips of a shape that is pushed over a picture, drawn with polygons: what motion models are tested on, not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmkit.data.drawn.motion import MOTIONS, WHOLE
from mmkit.data.drawn.pictures import outline, texture
from mmkit.errors import InputError

GROUNDS = ("dark", "bright", "textured", "photo")
"""What `sprite_clip` draws on."""
_WAYS = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
    "stands still": (0, 0),
}


def sprite_clip(
    label: str,
    ground: str,
    seed: int,
    photos: Sequence[Image.Image] = (),
    *,
    size: int = 96,
    num_frames: int = 8,
    speed: tuple[float, float] = (0.02, 0.09),
) -> np.ndarray:
    """A clip, uint8 (frames, size, size, 3): a star, heart, arrow or other shape is pushed over a ground.

    Args:
        label: one of `MOTIONS`; or `WHOLE`, where a texture or photograph slides in any direction, with or without a shape.
        ground: one of `GROUNDS`: "dark" under a bright shape, "bright" under a dark one, or a texture or photograph under either.
        seed: the same seed draws the same clip.
        photos: pictures for the ground "photo", at least `2 * size` on their shorter side or enlarged to that.
        size, num_frames: side in pixels and clip length.
        speed: slowest and fastest, in picture sides a frame.

    Raises:
        InputError: an unknown label or ground, `WHOLE` on a smooth one, or no photos for "photo".
    """
    if label not in (*MOTIONS, WHOLE) or ground not in GROUNDS or (ground == "photo" and not photos):
        raise InputError(
            f"Draw one of {(*MOTIONS, WHOLE)} on one of {GROUNDS} (with photos), not {label!r} on {ground!r}."
        )
    if label == WHOLE and ground in ("dark", "bright"):
        raise InputError(f"Nobody sees a {ground} ground move: draw {WHOLE!r} on 'textured' or 'photo'.")
    rng = np.random.default_rng((seed, GROUNDS.index(ground), num_frames))
    large = _ground(ground, rng, photos, 2 * size)
    step = rng.uniform(*speed) * size
    if label == WHOLE:
        angle = rng.uniform(0, 2 * np.pi)
        way = np.array([np.cos(angle), np.sin(angle)])
    else:
        way = np.array(_WAYS[label], float)
        way += 0.15 * rng.uniform(-1, 1) * way[::-1]
    middle, radius = rng.uniform(0.3, 0.7, 2) * size, rng.uniform(0.09, 0.18) * size
    points = outline(
        str(rng.choice(["disk", "square", "star", "heart", "arrow", "cross", "half_disk", "hexagon"])), rng
    )
    around = np.asarray(large.crop(_box(size / 2 + middle, radius))).reshape(-1, 3).mean(0)
    bright = {"dark": True, "bright": False}.get(ground, bool(around.mean() < rng.uniform(90, 165)))
    color = np.clip(around + rng.uniform(60, 140, 3) * (1 if bright else -1), 0, 255)
    with_shape = label != WHOLE or rng.random() < 0.5
    frames = []
    for t in np.arange(num_frames) - (num_frames - 1) / 2:
        move = step * t * way
        corner = size / 2 - (move if label == WHOLE else 0 * move)
        frame = large.transform(
            (size, size), Image.Transform.AFFINE, (1, 0, corner[0], 0, 1, corner[1]), Image.Resampling.BILINEAR
        )
        if with_shape:
            _paint(frame, points * radius + middle + move, tuple(int(c) for c in color))
        noisy = np.asarray(frame, np.float32) + rng.normal(0, 2, (size, size, 3))
        frames.append(np.clip(noisy, 0, 255).astype(np.uint8))
    return np.stack(frames)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bright on dark": ("dark", {}),
    "dark on bright": ("bright", {}),
    "on a texture": ("textured", {}),
    "on a photograph": ("photo", {}),
    "slow": ("dark", {"speed": (0.015, 0.02)}),
    "fast": ("bright", {"speed": (0.09, 0.115)}),
    "240 pixels": ("dark", {"size": 240}),
    "whole photograph": ("photo", {"label": WHOLE}),
}
"""What `motion_cases` draws: name -> ground and what differs."""


def motion_cases(name: str, number: int, photos: Sequence[Image.Image]) -> list[tuple[np.ndarray, int]]:
    """`number` clips of one of `CASES`, always the same ones, and their classes: indices into `(*MOTIONS, WHOLE)`.

    The classes of `MOTIONS` follow in turn; "whole photograph" has its own. Raises `InputError` for another name.
    """
    if name not in CASES:
        raise InputError(f"There is no case {name!r}; these are: {', '.join(CASES)}.")
    ground, settings = CASES[name]
    found = []
    for seed in range(number):
        label = settings.get("label", MOTIONS[seed % len(MOTIONS)])
        found.append(
            (
                sprite_clip(ground=ground, seed=seed, photos=photos, **{**settings, "label": label}),
                (*MOTIONS, WHOLE).index(label),
            )
        )
    return found


def _ground(kind: str, rng: np.random.Generator, photos: Sequence[Image.Image], side: int) -> Image.Image:
    if kind == "photo":
        photo = photos[int(rng.integers(len(photos)))]
        scale = max(1.0, side / min(photo.size))
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC)
        x, y = (int(rng.integers(s - side + 1)) for s in photo.size)
        return photo.crop((x, y, x + side, y + side)).convert("RGB")
    if kind == "textured":
        return Image.fromarray(texture(rng, side))
    low, high = (10, 90) if kind == "dark" else (160, 245)
    corners = rng.uniform(low, high, (2, 2, 3)).astype(np.uint8)
    return Image.fromarray(corners).resize((side, side), Image.Resampling.BICUBIC)


def _paint(frame: Image.Image, points: np.ndarray, color: tuple[int, ...]) -> None:
    """A filled polygon with soft edges: its mask is drawn at four times the size."""
    mask = Image.new("L", (4 * frame.width, 4 * frame.height))
    ImageDraw.Draw(mask).polygon([tuple(4 * p) for p in points], fill=255)
    frame.paste(Image.new("RGB", frame.size, color), mask=mask.resize(frame.size, Image.Resampling.BOX))


def _box(middle: np.ndarray, radius: float) -> tuple[int, int, int, int]:
    x, y = middle
    return round(x - radius), round(y - radius), round(x + radius), round(y + radius)
