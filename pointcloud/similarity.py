"""Structural similarity of pictures, differentiable and fast on small ones."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=8)
def _window(n: int) -> Tensor:
    """The blur of a line of `n` pixels, zeros around it, as a matrix: its products are several times faster than convolutions."""
    away = torch.arange(n) - torch.arange(n)[:, None]
    weights = torch.exp(-torch.arange(-5.0, 6.0).square() / 4.5)
    return torch.where(away.abs() <= 5, torch.exp(-away.square() / 4.5), 0.0) / weights.sum()


def _blur(n: int, like: Tensor) -> Tensor:
    return _window(n).to(like)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity of pictures (C, H, W) in 0..1, with a Gaussian window of 11 pixels (sigma 1.5)."""
    stacked = torch.stack([a, b, a * a, b * b, a * b])
    stacked = _blur(a.shape[1], a) @ stacked @ _blur(a.shape[2], a).T
    ma, mb, aa, bb, ab = stacked.unbind()
    va, vb, cov = aa - ma * ma, bb - mb * mb, ab - ma * mb
    score = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma * ma + mb * mb + 1e-4) * (va + vb + 9e-4))
    return score.mean()
