"""The lists of (Gaussian, tile) intersections that gsplat returns, for callers that read them; ours are built otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkit.ops.gaussian.settings import ALPHA_MIN, TILE, Settings


class LazyMeta(dict):  # type: ignore[type-arg]
    """A dictionary some of whose values are computed when they are first read."""

    def __init__(self, values: dict[str, Any], late: tuple[str, ...], compute: Callable[[], dict[str, Tensor]]):
        super().__init__({**values, **dict.fromkeys(late)})
        self._late, self._compute = set(late), compute

    def _settle(self) -> None:
        if self._late:
            self._late = set()
            self.update(self._compute())

    def __getitem__(self, key: str) -> Any:
        if key in self._late:
            self._settle()
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key in self._late:
            self._settle()
        return super().get(key, default)

    def values(self) -> Any:
        self._settle()
        return super().values()

    def items(self) -> Any:
        self._settle()
        return super().items()


@torch.no_grad()
def tile_lists(
    means2d: Tensor,
    radii: Tensor,
    depths: Tensor,
    conics: Tensor,
    opacities: Tensor,
    image_ids: Tensor,
    images: int,
    s: Settings,
) -> dict[str, Tensor]:
    """`tiles_per_gauss`, `isect_ids`, `flatten_ids` and `isect_offsets` of R rows.

    A tile is listed when it meets the rectangle of the radii; with gsplat 1.6's numbers, the ellipse where alpha is 1/255. An id
    holds image, tile and the bits of the depth, from high to low; lists are sorted by it, ties by row.
    """
    across, down = s.tiles
    size = torch.tensor([across, down])
    low = ((means2d - radii) / TILE).floor().clamp(torch.zeros(2), size).long()
    high = ((means2d + radii) / TILE).ceil().clamp(torch.zeros(2), size).long()
    wide = ((high - low).clamp_min(0) * (radii > 0).all(-1, keepdim=True)).unbind(-1)
    counts = wide[0] * wide[1]
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    nth = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    tx, ty = low[rows, 0] + nth % wide[0][rows], low[rows, 1] + nth // wide[0][rows]
    if s.numerics.exact_tiles:
        kept = _reached(means2d[rows], conics[rows], opacities[rows], tx, ty)
        rows, tx, ty = rows[kept], tx[kept], ty[kept]
        counts = torch.bincount(rows, minlength=len(counts))
    tile = ty * across + tx
    bits = (across * down).bit_length()
    depth = depths[rows].contiguous().view(torch.int32).long()
    keys = (image_ids[rows] << (32 + bits)) | (tile << 32) | depth
    order = keys.argsort(stable=True)
    per_tile = torch.bincount(image_ids[rows] * (across * down) + tile, minlength=images * across * down)
    return {
        "tiles_per_gauss": counts.to(torch.int32),
        "isect_ids": keys[order],
        "flatten_ids": rows[order].to(torch.int32),
        "isect_offsets": (per_tile.cumsum(0) - per_tile).to(torch.int32).view(images, down, across),
    }


def _reached(means2d: Tensor, conics: Tensor, opacities: Tensor, tx: Tensor, ty: Tensor) -> Tensor:
    """Whether the ellipse meets the tile: the least of a x^2 + 2 b x y + c y^2 over the tile is not above its level."""
    a, b, c = conics.double().unbind(-1)
    level = 2 * (opacities.double() / ALPHA_MIN).log()
    x0, y0 = tx * TILE - means2d[:, 0].double(), ty * TILE - means2d[:, 1].double()
    x1, y1 = x0 + TILE, y0 + TILE

    def form(x: Tensor, y: Tensor) -> Tensor:
        return a * x * x + 2 * b * x * y + c * y * y

    least = torch.where((x0 <= 0) & (x1 >= 0) & (y0 <= 0) & (y1 >= 0), 0.0, torch.inf)
    for x in (x0, x1):  # on an edge the form is a parabola
        least = least.minimum(form(x, (-b * x / c).clamp(y0, y1)))
    for y in (y0, y1):
        least = least.minimum(form((-b * y / a).clamp(x0, x1), y))
    return least <= level
