"""Captioned scenes: coloured shapes that a sentence describes, for small text-to-image models and those who judge them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mmkit.errors import InputError

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
TEXTURES = ("plain", "striped", "dotted")
SIZES = ("small", "large")
COUNTS = ("one", "two", "three")
POSITIONS = ("centre", "left", "right", "top", "bottom")
BACKGROUNDS = ("black", "white", "grey", "brown")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": COLORS,
    "texture": TEXTURES,
    "size": SIZES,
    "count": COUNTS,
    "position": POSITIONS,
    "background": BACKGROUNDS,
}
"""What a scene consists of and the words for it; several objects of a scene are alike and lie around the centre."""

PLURALS = {"cross": "crosses"} | {shape: shape + "s" for shape in (*SHAPES, "shape") if shape != "cross"}
"""The words for several shapes."""

WORDS = tuple(
    dict.fromkeys(
        (
            *(*SHAPES, "shape", *PLURALS.values(), *COLORS, *TEXTURES, *SIZES, *COUNTS, *POSITIONS, *BACKGROUNDS),
            *("a", "on", "the", "at", "in", "background"),
        )
    )
)
"""Every word of a caption."""

_RGB = {
    "red": (0.88, 0.12, 0.10),
    "green": (0.12, 0.66, 0.20),
    "blue": (0.14, 0.24, 0.92),
    "yellow": (0.97, 0.86, 0.08),
    "purple": (0.58, 0.16, 0.74),
    "cyan": (0.12, 0.82, 0.88),
}
_GROUNDS = {
    "black": (0.06, 0.06, 0.07),
    "white": (0.95, 0.95, 0.94),
    "grey": (0.5, 0.5, 0.5),
    "brown": (0.42, 0.27, 0.15),
}


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes: for each attribute the indices `(B,)` into its words in `ATTRIBUTES`."""

    shape: Tensor
    color: Tensor
    texture: Tensor
    size: Tensor
    count: Tensor
    position: Tensor
    background: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def random_scenes(batch: int, generator: torch.Generator | None = None, **fixed: str) -> Scenes:
    """Scenes with every attribute drawn at random, except those named: `random_scenes(8, shape="circle")`.

    Two objects come in 14 % and three in 10 % of the scenes, 60 % of the textures are plain, and 52 % of single objects are centred.

    Raises:
        InputError: an attribute or a word that does not exist.
    """
    shares = {"texture": (0.6, 0.2, 0.2), "count": (0.76, 0.14, 0.1), "position": (0.52, 0.12, 0.12, 0.12, 0.12)}
    drawn = {
        name: torch.multinomial(torch.tensor(shares.get(name, (1.0,) * len(words))), batch, True, generator=generator)
        for name, words in ATTRIBUTES.items()
    }
    for name, word in fixed.items():
        if word not in ATTRIBUTES.get(name, ()):
            raise InputError(f"{name}={word!r} is no attribute of a scene. There are {ATTRIBUTES}.")
        drawn[name] = torch.full((batch,), ATTRIBUTES[name].index(word))
    drawn["position"] = torch.where(drawn["count"] > 0, 0, drawn["position"])  # several lie around the centre
    return Scenes(**drawn)


def draw_scenes(scenes: Scenes, generator: torch.Generator | None = None, size: int = 32) -> Tensor:
    """Pictures `(B, 3, size, size)` in 0..1; place, angle, radius and tones vary a little from picture to picture."""
    batch = len(scenes)

    def jitter(amount: float, *shape: int) -> Tensor:
        return (torch.rand(batch, *shape, generator=generator) * 2 - 1) * amount

    radius = _RADII[scenes.count, scenes.size] * (1 + jitter(0.07))
    centres = _centres(scenes, jitter)  # (B, 3, 2)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    x = (axis[None, None, None, :] - centres[..., 0, None, None]) / radius[:, None, None, None]  # (B, 3, 1, W)
    y = (axis[None, None, :, None] - centres[..., 1, None, None]) / radius[:, None, None, None]  # (B, 3, H, 1)
    angle = jitter(0.14, 3, 1, 1)
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    level = torch.stack([outline(u, v) for outline in _OUTLINES])[scenes.shape, torch.arange(batch)]  # <= 1 inside
    cover = ((1 - level) * (radius * size / 2)[:, None, None, None] + 0.5).clamp(0, 1)  # edges one pixel soft
    there = torch.arange(3) <= scenes.count[:, None]
    cover = (cover * there[..., None, None]).amax(1, keepdim=True)  # (B, 1, H, W)

    color = (torch.tensor(list(_RGB.values()))[scenes.color] + jitter(0.05, 3))[..., None, None]
    fill = _textured(scenes.texture, color, axis, jitter)
    ground = torch.tensor(list(_GROUNDS.values()))[scenes.background] + jitter(0.03, 1)
    slope = axis[None, None, None, :] * jitter(0.04, 1, 1, 1) + axis[None, None, :, None] * jitter(0.04, 1, 1, 1)
    return (fill * cover + (ground[..., None, None] + slope) * (1 - cover)).clamp(0, 1)


def caption(scenes: Scenes, generator: torch.Generator | None = None, detail: float = 0.5) -> list[str]:
    """One sentence for each scene, like "two small red striped circles on a white background".

    What is not told is plain, large and in the centre; of a background that is not told nothing is known.

    Args:
        scenes: what the pictures show.
        generator: source of every random draw.
        detail: how likely a background and a large size are told (a plain texture and the centre half as often). 1 tells
            everything. Below 1, the shape or the color is left out now and then, and single objects are sometimes called without
            an article, so that single words mean something too.
    """
    told = torch.rand(len(scenes), 7, generator=generator)
    return [_sentence(scenes, i, told[i].tolist(), detail) for i in range(len(scenes))]


def read_caption(text: str) -> dict[str, str]:
    """What a caption asks for: attribute -> word, with only what it names. Words that mean nothing here are passed over.

    A number is understood from "a" (one) as well; a background is a colour of `BACKGROUNDS` anywhere in the caption.
    """
    singular = {plural: shape for shape, plural in PLURALS.items()}
    words = [singular.get(word, word) for word in text.lower().replace(",", " ").split()]
    asked = {name: word for name, known in ATTRIBUTES.items() for word in words if word in known}
    if words and words[0] == "a" and any(word in (*SHAPES, "shape") for word in words):
        asked.setdefault("count", "one")
    return asked


def asked_scenes(captions: Sequence[str], generator: torch.Generator | None = None) -> Scenes:
    """Scenes that fit the captions: without other words one, plain, large and in the centre; the rest is drawn at random."""
    scenes = random_scenes(len(captions), generator, texture="plain", size="large", count="one", position="centre")
    for i, text in enumerate(captions):
        for name, word in read_caption(text).items():
            getattr(scenes, name)[i] = ATTRIBUTES[name].index(word)
    return replace(scenes, position=torch.where(scenes.count > 0, 0, scenes.position))


# ------------------------------------------------------------------------------------------------------------ parts

_RADII = torch.tensor([[0.42, 0.66], [0.37, 0.46], [0.33, 0.40]])  # by count and size, in half pictures
_SHIFTS = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])


def _centres(scenes: Scenes, jitter) -> Tensor:  # type: ignore[no-untyped-def]
    """Where the up to three objects of each scene lie, `(B, 3, 2)` in -1..1."""
    free = 0.92 - _RADII[scenes.count, scenes.size]
    single = _SHIFTS[scenes.position] * free[:, None] + jitter(0.06, 2)
    start = torch.where(scenes.count == 2, -math.pi / 2, 0.0) + jitter(0.3)  # two side by side; three, the first on top
    turn = torch.where(scenes.count == 1, math.pi, 2 * math.pi / 3)
    angles = start[:, None] + turn[:, None] * torch.arange(3)
    around = torch.stack([angles.cos(), angles.sin()], -1) * torch.where(scenes.count == 1, 0.48, 0.53)[:, None, None]
    return torch.where(scenes.count[:, None, None] == 0, single[:, None], around)


def _textured(texture: Tensor, color: Tensor, axis: Tensor, jitter) -> Tensor:  # type: ignore[no-untyped-def]
    """Fill colors `(B, 3, H, W)`: plain, with dark diagonal stripes, or with light dots on a grid."""
    phase = jitter(math.pi, 2, 1, 1)
    x, y = axis[None, None, None, :] * 9.5, axis[None, None, :, None] * 9.5
    stripes = (torch.sin(x + y + phase[:, :1]) * 2.5 + 0.5).clamp(0, 1)
    dots = ((torch.sin(x + phase[:, :1]) * torch.sin(y + phase[:, 1:]) - 0.25) * 3.5).clamp(0, 1)
    striped, dotted = color * (1 - 0.62 * stripes), color + (0.98 - color) * dots
    kind = texture[:, None, None, None]
    return torch.where(kind == 0, color, torch.where(kind == 1, striped, dotted))


def _star(u: Tensor, v: Tensor) -> Tensor:
    """Five tips, one up; the inner corners lie at 0.42 of the radius."""
    sector = math.pi / 5
    angle = (torch.atan2(u, -v) / (2 * sector)).frac().abs()
    angle = torch.minimum(angle, 1 - angle) * 2 * sector  # folded to 0 (tip) .. 36 degrees (inner corner)
    inner = (0.42 * math.cos(sector), 0.42 * math.sin(sector))
    normal = (inner[1], 1 - inner[0])  # of the edge from the tip (1, 0) to the inner corner
    return torch.hypot(u, v) * (angle.cos() * normal[0] + angle.sin() * normal[1]) / normal[0]


_OUTLINES = (
    lambda u, v: torch.hypot(u, v),
    lambda u, v: torch.maximum(u.abs(), v.abs()) / 0.84,
    lambda u, v: torch.maximum(v - 0.12, 0.866 * u.abs() - 0.5 * (v - 0.12)) / 0.58,
    lambda u, v: torch.minimum(torch.maximum(u.abs(), v.abs() / 0.34), torch.maximum(u.abs() / 0.34, v.abs())),
    lambda u, v: 1 + ((torch.hypot(u, v) - 0.76).abs() - 0.24),
    _star,
)


def _sentence(scenes: Scenes, i: int, told: list[float], detail: float) -> str:
    word = {name: words[int(getattr(scenes, name)[i])] for name, words in ATTRIBUTES.items()}
    many = word["count"] != "one"
    shape, color = word["shape"], word["color"]
    if detail < 1 and told[0] < 0.1:
        shape = "shape"
    elif detail < 1 and told[0] < 0.2:
        color = ""
    half = detail if detail >= 1 else detail / 2
    texture = word["texture"] if word["texture"] != "plain" or told[1] < half else ""
    size = word["size"] if word["size"] == "small" or told[2] < detail else ""
    number = word["count"] if many else ("a" if detail >= 1 or told[3] < 0.75 else "")
    place = ""
    side = word["position"]
    if not many and (side != "centre" or told[4] < half):
        place = f"{'at' if side in ('top', 'bottom') else 'in' if side == 'centre' else 'on'} the {side}"
    ground = f"on a {word['background']} background" if told[5] < detail else ""
    noun = PLURALS[shape] if many else shape
    return " ".join(part for part in (number, size, color, texture, noun, place, ground) if part)
