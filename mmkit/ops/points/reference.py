"""The point operators in plain torch: any device, any floating type. Indices only; `mmkit.ops.points` adds what is differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 1 << 24
"""Distances held at a time."""


def squared(a: Tensor, b: Tensor) -> Tensor:
    """(dx*dx + dy*dy) + dz*dz over the last axis, in the order of the CPU kernels."""
    d = (a - b).square()
    return (d[..., 0] + d[..., 1]) + d[..., 2]


def farthest_point_sample(xyz: Tensor, m: int, start: Tensor, never: Tensor) -> Tensor:
    """One step per sample, all clouds at once."""
    batch = torch.arange(len(xyz), device=xyz.device)
    d = torch.where(never, -torch.ones((), dtype=xyz.dtype, device=xyz.device), torch.inf)
    out = torch.empty(len(xyz), m, dtype=torch.long, device=xyz.device)
    columns = xyz.transpose(1, 2).contiguous()
    last = start
    for i in range(m):
        out[:, i] = last
        delta = (columns - xyz[batch, last].unsqueeze(-1)).square_()
        torch.minimum(d, delta[:, 0].add_(delta[:, 1]).add_(delta[:, 2]), out=d)
        best, last = d.max(1)
        last = torch.where(best < 0, torch.zeros_like(last), first_of(d, best))
    return out


def first_of(d: Tensor, best: Tensor) -> Tensor:
    """The lowest index at which a row of `d` equals `best`, on every device."""
    return (d == best.unsqueeze(1)).to(torch.uint8).argmax(1)


def knn(ref: Tensor, query: Tensor, k: int) -> Tensor:
    """A stable sort of all distances, in parts."""
    rows = max(1, _AT_ONCE // max(1, ref.shape[0] * ref.shape[1]))
    parts = [
        squared(q.unsqueeze(2), ref.unsqueeze(1)).sort(dim=-1, stable=True)[1][..., :k] for q in query.split(rows, 1)
    ]
    return torch.cat(parts, 1)


def ball_query(ref: Tensor, query: Tensor, radius: float, k: int) -> Tensor:
    """The first k points inside, in parts."""
    n = ref.shape[1]
    rows = max(1, _AT_ONCE // max(1, ref.shape[0] * n))
    order = torch.arange(n, device=ref.device)
    parts = []
    for q in query.split(rows, 1):
        inside = squared(q.unsqueeze(2), ref.unsqueeze(1)) < radius * radius
        found = torch.where(inside, order, n).sort(dim=-1)[0][..., :k]
        if found.shape[-1] < k:
            found = torch.cat([found, found.new_full((*found.shape[:-1], k - found.shape[-1]), n)], -1)
        found = torch.where(found == n, found[..., :1], found)
        parts.append(torch.where(found == n, 0, found))
    return torch.cat(parts, 1)
