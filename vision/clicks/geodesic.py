"""Geodesic distance to clicks: how far a pixel is when crossing edges costs more than walking over even ground.

Criminisi, Sharp, Blake, "GeoS: Geodesic Image Segmentation" (ECCV 2008), and as input of a network DeepIGeoS (Wang et al.,
arXiv 1707.00652). Any device: each sweep solves all rows (then all columns) at once by a running minimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

FAR = 1e4


def geodesic_distance(pixels: Tensor, seeds: Tensor, *, ground: float = 0.2, sweeps: int = 4) -> Tensor:
    """Length of the cheapest path from each pixel to the nearest seed, moving between the four neighbours.

    A step costs the color difference of its two pixels, in units of the picture's mean difference, plus `ground`.

    Args:
        pixels: `(N, C, H, W)`.
        seeds: bool `(N, Q, H, W)`: Q sets of seeds for each picture.
        ground: cost of a step over even ground.
        sweeps: pairs of a horizontal and a vertical pass; a path may turn about twice that often.

    Returns:
        `(N, Q, H, W)`, 0 at seeds, at least `FAR` without any seed.
    """
    across = (pixels[..., 1:] - pixels[..., :-1]).abs().mean(dim=1)
    down = (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().mean(dim=1)
    mean = torch.cat([across.flatten(1), down.flatten(1)], dim=1).mean(dim=1).clamp(min=1e-4)[:, None, None]
    across, down = (torch.cumsum(x / mean + ground, dim) for x, dim in ((across, 2), (down, 1)))
    zero = torch.zeros_like
    across = torch.cat([zero(across[:, :, :1]), across], dim=2)[:, None]
    down = torch.cat([zero(down[:, :1]), down], dim=1)[:, None]
    distance = torch.where(seeds, 0.0, FAR)
    for _ in range(sweeps):
        distance = _sweep(_sweep(distance, across, 3), down, 2)
    return distance


def _sweep(distance: Tensor, walked: Tensor, dim: int) -> Tensor:
    """The best of staying and of walking along `dim`; `walked` is the cost from the first cell to each."""
    forward = walked + _running_minimum(distance - walked, dim)
    backward = _running_minimum((distance + walked).flip(dim), dim).flip(dim) - walked
    return torch.minimum(forward, backward)


def _running_minimum(x: Tensor, dim: int) -> Tensor:
    """`cummin`, which ONNX does not have; there each cell takes the least of all cells before it."""
    if not torch.compiler.is_exporting():
        return x.cummin(dim).values
    rows = x.transpose(dim, -1)
    before = torch.ones(rows.shape[-1], rows.shape[-1], dtype=torch.bool, device=x.device).tril()
    return torch.where(before, rows[..., None, :], torch.inf).amin(-1).transpose(dim, -1)


def click_maps(pixels: Tensor, positive: Tensor, negative: Tensor, reach: float = 10.0) -> Tensor:
    """What clicks say about each pixel when they follow the edges of the picture, as three channels.

    Args:
        pixels: `(B, C, H, W)`.
        positive, negative: bool `(B, Q, H, W)`: cells that were clicked (for `negative` also those outside a box).
        reach: distance at which the first two channels have fallen to 1/e.

    Returns:
        `(B, Q, 3, H, W)`: nearness to positive and to negative clicks in 0..1, and the verdict in -1..1: positive where the
        positive clicks are nearer than the negative ones and the picture's border; 0 everywhere without a positive click.
    """
    frame = torch.zeros_like(positive)
    frame[..., 0], frame[..., -1], frame[..., 0, :], frame[..., -1, :] = (True,) * 4
    seeds = torch.stack([positive, negative, frame & ~positive], dim=2)
    distance = geodesic_distance(pixels, seeds.flatten(1, 2)).unflatten(1, seeds.shape[1:3])
    to_positive, to_negative, to_frame = distance.unbind(2)
    behind = torch.minimum(to_negative, to_frame)
    verdict = (behind - to_positive) / (behind + to_positive + 1) * positive.any(dim=-1).any(dim=-1)[..., None, None]
    return torch.stack([(-to_positive / reach).exp(), (-to_negative / reach).exp(), verdict], dim=2)
