"""Tiny pyramids for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmkit.vision.piip import BranchConfig, PIIPConfig

PATCH = 4


def branch(size: int, dim: int = 32, depth: int = 2, heads: int = 2, **more: Any) -> BranchConfig:
    """A plain vision transformer with patches of four pixels."""
    settings = {
        "patch_size": PATCH,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": 1.0,
        "class_token": False,
    }
    settings |= {"global_pool": "avg", **more.pop("settings", {})}
    return BranchConfig("timm:vit_tiny_patch16_224", size, settings=settings, **more)


def pyramid(sizes: tuple[int, ...] = (8, 16, 24), dim: int = 32, **more: Any) -> PIIPConfig:
    """Branches of one width; `num_heads` 4, two points."""
    return PIIPConfig(tuple(branch(s, dim) for s in sizes), **{"num_heads": 4, "num_points": 2, **more})


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` with everything that starts at zero drawn anew, so that every part matters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model.eval()
