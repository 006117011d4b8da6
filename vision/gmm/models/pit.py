"""PiT with Gaussian mixture masks, arXiv 2309.05375."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from mmkit.errors import InputError
from mmkit.vision.gmm.masks import create_mask
from mmkit.vision.gmm.models.layers import Block, GMMModel, MaskedAttention, check_images, init_xavier, pair, patch_grid


class PiTPool(nn.Module):
    """PiT's pooling: strided depthwise convolution on patches, linear layer on the class token; the width doubles."""

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.depthwise = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, groups=dim)
        self.pointwise = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.cls_fc = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 1 + gh * gw, dim)` -> `(B, 1 + ceil(gh / 2) * ceil(gw / 2), 2 * dim)`."""
        token, patches = x[:, :1], x[:, 1:]
        patches = patches.transpose(1, 2).unflatten(2, self.grid)
        patches = self.pointwise(self.depthwise(patches)).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_fc(token), patches], 1)


class GMMPiT(GMMModel):
    """PiT: stages of masked blocks on shrinking grids; the class token's row and column are never masked.

    Args:
        depths, num_heads: per stage.
        head_dim: width of a head, the same in all stages.
        Others: as in `GMMViT`.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 32,
        patch_size: int = 2,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 6, 4),
        num_heads: Sequence[int] = (2, 4, 8),
        head_dim: int = 48,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.0,
        mask: str = "gmm",
        num_kernels: int = 5,
        official_underflow: bool = False,
    ):
        super().__init__()
        if len(depths) != len(num_heads):
            raise InputError(f"depths {tuple(depths)} and num_heads {tuple(num_heads)} must have one entry per stage.")
        grid, dim = patch_grid(img_size, patch_size), embed_dim
        self.patch_embed = PatchEmbed(pair(img_size), patch_size, in_chans, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, grid[0] * grid[1] + 1, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.stages = nn.ModuleList()
        options: dict[str, Any] = {"num_prefix_tokens": 1, "official_underflow": official_underflow}
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            if stage:
                self.stages.append(PiTPool(dim, grid))
                grid, dim = ((grid[0] + 1) // 2, (grid[1] + 1) // 2), 2 * dim
            blocks = []
            for _ in range(depth):
                logit_mask = create_mask(mask, heads, grid, num_kernels, **options)
                attn = MaskedAttention(dim, heads, head_dim, logit_mask)
                blocks.append(Block(dim, attn, int(dim * mlp_ratio), drop_path_rate))
            self.stages.append(nn.Sequential(*blocks))
        self.fc_norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        self.apply(init_xavier)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> logits `(B, num_classes)`."""
        check_images(x, self.config["in_chans"], self.config["img_size"])
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for stage in self.stages:
            x = stage(x)
        return self.head(self.fc_norm(x[:, 0]))


def gmm_pit(img_size: int = 32, **overrides: Any) -> GMMPiT:
    """PiT of the paper: patch 2 (4 above 32 pixels), widths 96-192-384, depths 2-6-4, heads 2-4-8 x 48."""
    return GMMPiT(img_size, **{"patch_size": 2 if img_size == 32 else 4, **overrides})
