"""What tracking and mapping minimise, apart from labels: colours and depths of a rendering beside those of a frame."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkit.pointcloud.similarity import ssim


def silhouette_mask(depth_seen: Tensor, depth: Tensor, alpha: Tensor, threshold: float = 0.99) -> Tensor:
    """Pixels (H, W) that are tracked: depth is known, and the map is solid there."""
    return (depth > 0) & ~depth_seen.isnan() & (alpha > threshold)


def tracking_terms(
    rgb: Tensor, depth: Tensor, want_rgb: Tensor, want_depth: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """SUMS of absolute differences over the mask (H, W): of colours (H, W, 3), and of depths (H, W)."""
    image = ((rgb - want_rgb).abs() * mask.unsqueeze(-1)).sum()
    return image, (torch.where(mask, depth - want_depth, 0.0)).abs().sum()


def mapping_terms(rgb: Tensor, depth: Tensor, want_rgb: Tensor, want_depth: Tensor) -> tuple[Tensor, Tensor]:
    """MEANS: 0.8 L1 + 0.2 (1 - SSIM) of colours (H, W, 3), and L1 of depths (H, W) where known."""
    similar = ssim(rgb.permute(2, 0, 1), want_rgb.permute(2, 0, 1))
    image = 0.8 * (rgb - want_rgb).abs().mean() + 0.2 * (1 - similar)
    known = (want_depth > 0) & ~depth.isnan()
    count = known.sum().clamp_min(1)
    return image, torch.where(known, depth - want_depth, 0.0).abs().sum() / count


def densify_mask(alpha: Tensor, depth_seen: Tensor, depth: Tensor, threshold: float = 0.5) -> Tensor:
    """Pixels (H, W) where the map lacks Gaussians: not solid, or far behind what the frame sees (50 times the median error)."""
    error = (depth - depth_seen).abs() * (depth > 0)
    in_front = (depth_seen > depth) & (error > 50 * error.median())
    return ((alpha < threshold) | in_front) & (depth > 0)


def share(mask: Tensor, depth: Tensor) -> float:
    """The part of the pixels with depth that a mask holds."""
    return float(mask.sum()) / max(int((depth > 0).sum()), 1)
