"""Scenes for training two looks: described once, drawn in any window, so that the second look is as sharp as the picture allows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkit.vision.clicks.datasets import OBJECT, UNKNOWN, Bank

WHOLE = (0.0, 0.0, 1.0)
"""The window of a whole scene: left, top and side, as shares of the scene's side."""


@dataclass
class Layer:
    """A picture of the bank in a scene: `place` `(2, 3)` takes scene coordinates in -1..1 to canvas coordinates in -1..1."""

    picture: int
    place: Tensor
    extent: float
    tint: tuple[float, float] = (1.0, 0.0)


@dataclass
class Scene:
    """An object, where it is pasted (`ground`: `None` leaves it in its own picture), and what lies over it.

    Attributes:
        index: of the object in the bank.
        over: another object's layer and index, pasted in front.
        color: contrast, saturation, gain, offset and gamma of the whole.
    """

    index: int
    layer: Layer
    ground: Layer | None = None
    over: tuple[Layer, int] | None = None
    color: tuple[float, ...] = field(default=(1.0, 1.0, 1.0, 0.0, 1.0))


class SceneMaker:
    """Random scenes from a `Bank`, and their views.

    Args:
        bank: pictures and objects.
        side: of the drawn views, in pixels.
        composite: share of the scenes whose object is pasted on another picture.
        natural: share of the other scenes that show a whole picture as the product sees it.
        over: share of the scenes with another object in front.
    """

    def __init__(self, bank: Bank, side: int, composite: float = 0.25, natural: float = 0.5, over: float = 0.2):
        self.bank, self.side = bank, side
        self.composite, self.natural, self.over = composite, natural, over
        self.canvas = bank.images.shape[-1]
        self.coarse = torch.stack([F.avg_pool2d(x.float(), 2).round().byte() for x in bank.images])
        owned = [torch.bincount(m.flatten().long(), minlength=256) for m in bank.maps]
        areas = [(bank.table[i] == OBJECT).long() @ owned[int(o)] for i, o in enumerate(bank.owner)]
        self.area = torch.stack(areas).float()
        self.solid = torch.tensor([float(w) for w in bank.weight])

    def random(self) -> Scene:
        """A scene."""
        bank = self.bank
        index = int(torch.multinomial(bank.weight, 1))
        pasted = bool(torch.rand(()) < self.composite) and float(self.area[index]) > 2000
        layer = self.place(index, float(torch.rand(())) < (0.0 if pasted else self.natural))
        scene = Scene(index, layer, color=tuple(self.colors()))
        if pasted:
            layer.tint = (uniform(0.8, 1.2), uniform(-0.1, 0.1))
            scene.ground = self.background()
        if torch.rand(()) < self.over:
            other = int(torch.multinomial(bank.weight, 1))
            if int(bank.owner[other]) != int(bank.owner[index]):
                scene.over = (self.place(other, False, low=0.005, high=0.2, inside=0.2), other)
        return scene

    def colors(self) -> list[float]:
        """Contrast, saturation, gain, offset and gamma."""
        gray = 0.0 if torch.rand(()) < 0.05 else uniform(0.5, 1.4)
        return [uniform(0.7, 1.3), gray, uniform(0.85, 1.2), uniform(-0.06, 0.06), math.exp(uniform(-0.2, 0.2))]

    def place(self, index: int, natural: bool, low: float = 0.003, high: float = 0.8, inside: float = 1.0) -> Layer:
        """Where a scene shows the object: as the product shows its picture, or at a share of the view drawn log-uniformly."""
        bank, canvas = self.bank, self.canvas
        picture = int(bank.owner[index])
        if natural:
            extent = canvas if torch.rand(()) < 0.5 else canvas * uniform(0.85, 1.25)
            shift = torch.zeros(2) if extent == canvas else (torch.rand(2) - 0.5) * 0.4 * extent
            turn = extent != canvas
            return Layer(picture, self.affine(torch.full((2,), canvas / 2) + shift, extent, turn, turn), extent)
        box = bank.boxes[index]
        share = math.exp(uniform(math.log(low), math.log(high)))
        largest = float((box[2:] - box[:2]).max())
        extent = float(self.area[index] / share) ** 0.5
        extent = min(max(extent, 0.15 * canvas, 0.8 * largest if share > 0.4 else 1.02 * largest), 12 * largest)
        if inside == 1.0 and torch.rand(()) < 0.9:
            extent = min(extent, 1.25 * canvas)  # the object's own picture ends there
        free = max(extent - largest, 0.15 * extent)
        center = (box[:2] + box[2:]) / 2 + (torch.rand(2) - 0.5) * free * (2 - inside)
        return Layer(picture, self.affine(center, extent, True, True), extent)

    def background(self) -> Layer:
        """A random part of a random picture, without its padding."""
        picture = int(torch.randint(len(self.bank.images), ()))
        h, w = self.bank.sizes[picture].tolist()
        extent = min(h, w) * uniform(0.45, 0.98)
        center = torch.tensor([uniform(extent / 2, w - extent / 2), uniform(extent / 2, h - extent / 2)])
        return Layer(picture, self.affine(center, extent, False, True), extent)

    def affine(self, center: Tensor, extent: float, turn: bool, flip: bool) -> Tensor:
        """`(2, 3)` from scene to canvas, both in -1..1, with some rotation, stretch and mirroring."""
        angle = float(torch.randn(())) * 0.12 if turn else 0.0
        stretch = math.exp(uniform(-0.15, 0.15)) if turn else 1.0
        sign = -1.0 if flip and torch.rand(()) < 0.5 else 1.0
        cos, sin, scale = math.cos(angle), math.sin(angle), extent / self.canvas
        x, y = (2 * center / self.canvas - 1).tolist()
        return torch.tensor(
            [
                [sign * cos * stretch * scale, -sin / stretch * scale, x],
                [sign * sin * stretch * scale, cos / stretch * scale, y],
            ]
        )

    def look(self, layer: Layer, window: tuple[float, float, float]) -> tuple[Tensor, Tensor, Tensor]:
        """A layer in a window: pixels `(3, S, S)` in 0..1, segment ids `(S, S)`, and where there is a picture."""
        x0, y0, side = window
        shift = torch.tensor([2 * x0 + side - 1, 2 * y0 + side - 1])
        theta = torch.cat([layer.place[:, :2] * side, (layer.place[:, :2] @ shift + layer.place[:, 2])[:, None]], dim=1)
        grid = F.affine_grid(theta[None], [1, 3, self.side, self.side], align_corners=False)
        coarse = layer.extent * side > 1.4 * self.side
        source = (self.coarse if coarse else self.bank.images)[layer.picture][None].float()
        pixels = F.grid_sample(source, grid, padding_mode="border", align_corners=False)[0] / 255
        ids = F.grid_sample(
            self.bank.maps[layer.picture][None, None].float(), grid, mode="nearest", align_corners=False
        )[0, 0].long()
        limit = 2 * self.bank.sizes[layer.picture].flip(0) / self.canvas - 1
        inside = ((grid[0] >= -1) & (grid[0] <= limit)).all(-1)
        return pixels * layer.tint[0] + layer.tint[1], ids, inside

    def draw(self, scene: Scene, window: tuple[float, float, float] = WHOLE) -> tuple[Tensor, Tensor, Tensor]:
        """A window of a scene: `(4, S, S)` as `ClickNet.preprocess` gives it, target and valid bool `(S, S)`."""
        pixels, ids, inside = self.look(scene.layer, window)
        kind = self.bank.table[scene.index][ids]
        target, valid = (kind == OBJECT) & inside, (kind != UNKNOWN) & inside
        if scene.ground is not None:
            under, _, inside = self.look(scene.ground, window)
            alpha = soft(target)
            pixels = pixels * alpha + under * (1 - alpha)
            target, valid = target & inside, inside
        if scene.over is not None:
            layer, other = scene.over
            front, ids, there = self.look(layer, window)
            cover = (self.bank.table[other][ids] == OBJECT) & there & inside
            alpha = soft(cover)
            pixels = pixels * (1 - alpha) + front * alpha
            target, valid = target & ~cover, valid | cover
        contrast, saturation, gain, offset, gamma = scene.color
        gray = pixels.mean(dim=0, keepdim=True)
        pixels = (gray + (pixels - gray) * saturation - 0.5) * contrast + 0.5
        pixels = (pixels * gain + offset).clamp(1e-3, 1) ** gamma
        pixels = (pixels + torch.randn_like(pixels) * 0.01) * 2 - 1
        return torch.cat([pixels, torch.ones_like(pixels[:1])]) * inside, target, valid & inside

    def batch(self, n: int) -> tuple[list[Scene], tuple[Tensor, Tensor, Tensor]]:
        """`n` scenes whose object can be seen, and their whole views, stacked."""
        scenes: list[Scene] = []
        views = []
        while len(scenes) < n:
            scene = self.random()
            view = self.draw(scene)
            share = float(view[1].float().mean())
            if scene.over is not None and share < 0.5 * float(
                self.draw(Scene(scene.index, scene.layer))[1].float().mean()
            ):
                scene.over = None
                view = self.draw(scene)
                share = float(view[1].float().mean())
            if share > 0.0012:
                scenes.append(scene)
                views.append(view)
        return scenes, stack(views)


def stack(views: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Views of several scenes as one batch."""
    framed, target, valid = zip(*views, strict=True)
    return torch.stack(framed), torch.stack(target), torch.stack(valid)


def soft(mask: Tensor) -> Tensor:
    """A bool mask `(S, S)` with softened edges, `(1, S, S)`."""
    return F.avg_pool2d(mask[None, None].float(), 3, stride=1, padding=1, count_include_pad=False)[0]


def uniform(low: float, high: float) -> float:
    """A random number."""
    return low + (high - low) * float(torch.rand(()))
