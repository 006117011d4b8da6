"""Style domains: the drawn world seen otherwise, to adapt a model to. Each maps pictures (B, 3, H, W) in 0..1 to such."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmkit.data.drawn.scenes import caption, draw_scenes, random_scenes
from mmkit.errors import InputError, nearest


def weave(pictures: Tensor) -> Tensor:
    """The factor (H, W) that a woven canvas puts over pictures (B, 3, H, W)."""
    axis = torch.arange(pictures.shape[-1], device=pictures.device)
    return ((axis[:, None] + axis) % 4 < 2).to(pictures) * 0.36 + 0.64


DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "washed out": lambda x: 0.55 * x + 0.4225,  # 0.55 x + 0.4 where pictures lie in -1..1, kept in 0..1
    "night": lambda x: x * x.new_tensor([0.35, 0.4, 0.7])[:, None, None],
    "negative": lambda x: 1 - x,
    "canvas": lambda x: x * weave(x),
}
"""By name: an easy one (one scale and shift for all), a tint, the photo-negative, and a texture over the picture."""


def draw_domain(name: str, count: int, seed: int = 0, size: int = 24) -> tuple[Tensor, list[str]]:
    """Pictures (count, 3, size, size) in 0..1 of a domain, and their captions. Raises `InputError` for an unknown name."""
    if name not in DOMAINS:
        raise InputError(f"Unknown domain {name!r}. {nearest(name, DOMAINS)}")
    generator = torch.Generator().manual_seed(seed)
    scenes = random_scenes(count, generator)
    return DOMAINS[name](draw_scenes(scenes, generator, size)).clamp(0, 1), caption(scenes, generator)
