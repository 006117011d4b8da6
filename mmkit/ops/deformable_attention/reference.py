"""Deformable attention's sampling in plain torch: differentiable on every device, in every floating dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_and_sum(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """See `mmkit.ops.multi_scale_deformable_attention`; all tensors of one dtype."""
    batch, _, heads, dim = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B * M, N, K, 2)
    samples = []
    for level, (part, (height, width)) in enumerate(
        zip(value.split([h * w for h, w in shapes], 1), shapes, strict=True)
    ):
        maps = part.permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        samples.append(F.grid_sample(maps, grids[level], "bilinear", "zeros", align_corners=False))
    found = torch.stack(samples, -2)  # (B * M, D, N, L, K)
    shares = weights.transpose(1, 2).reshape(batch * heads, 1, queries, len(shapes), points)
    return (found * shares).sum((-2, -1)).view(batch, heads * dim, queries).transpose(1, 2).contiguous()


def located(offsets: Tensor, query_grid: tuple[int, int], feature_grid: tuple[int, int]) -> Tensor:
    """Offsets (..., N, M, K, 2) from the cells of the query grid, in cells of the feature grid -> places, 0..1 over the feature map."""
    centres = [(torch.arange(n, device=offsets.device, dtype=offsets.dtype) + 0.5) / n for n in query_grid]
    y, x = torch.meshgrid(*centres, indexing="ij")
    start = torch.stack([x, y], -1).view(-1, 1, 1, 2)
    return start + offsets / offsets.new_tensor(feature_grid[::-1])
