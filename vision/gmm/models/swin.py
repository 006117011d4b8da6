"""Swin with Gaussian mixture masks on its window grid, arXiv 2309.05375."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from mmkit.errors import InputError
from mmkit.vision.gmm.attention import masked_attention
from mmkit.vision.gmm.masks import LogitMask, create_mask
from mmkit.vision.gmm.models.layers import GMMModel, check_images, head_width, pair, patch_grid


class MaskedWindowAttention(WindowAttention):
    """timm's window attention with a mask on the logits, before the relative position bias and the shift mask."""

    def __init__(
        self, dim: int, num_heads: int, window_size: tuple[int, int], qkv_bias: bool, logit_mask: LogitMask | None
    ):
        super().__init__(dim, num_heads=num_heads, window_size=window_size, qkv_bias=qkv_bias)
        self.mask = logit_mask

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Windows `(windows * B, N, dim)` -> the same shape; `mask` is timm's `(windows, N, N)` shift mask."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self._get_rel_pos_bias()
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).repeat(B // len(mask), 1, 1, 1)
        out = masked_attention(q, k, v, self.mask, attn_mask=bias, scale=self.scale)
        return self.proj(out.transpose(1, 2).reshape(B, N, -1))


class SwinStage(nn.Module):
    """Windowed blocks at one resolution, behind an optional 2 x 2 patch merging."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C)` -> `(B, H', W', C')`."""
        return self.blocks(self.downsample(x))


class GMMSwin(GMMModel):
    """Swin with an absolute position embedding; the mask acts on the window grid.

    Args:
        depths, num_heads: per stage; the width doubles from stage to stage.
        window_size: patches per window side; a stage whose side is smaller uses its own side.
        drop_path_rate: rate of the last block, rising linearly from 0.
        qkv_bias, patch_norm: a bias on queries, keys and values, and a LayerNorm behind the patch embedding.
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
        num_heads: Sequence[int] = (3, 6, 12),
        window_size: int = 4,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.0,
        mask: str = "gmm",
        num_kernels: int = 5,
        official_underflow: bool = False,
        qkv_bias: bool = True,
        patch_norm: bool = True,
    ):
        super().__init__()
        if len(depths) != len(num_heads):
            raise InputError(f"depths {tuple(depths)} and num_heads {tuple(num_heads)} must have one entry per stage.")
        grid, dim = patch_grid(img_size, patch_size), embed_dim
        norm = nn.LayerNorm if patch_norm else None
        self.patch_embed = PatchEmbed(pair(img_size), patch_size, in_chans, dim, norm_layer=norm)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], dim))
        trunc_normal_(self.pos_embed, std=0.02)
        self.grid = grid
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.stages = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            downsample: nn.Module = PatchMerging(dim) if stage else nn.Identity()
            if stage:
                grid, dim = ((grid[0] + 1) // 2, (grid[1] + 1) // 2), 2 * dim
            head_width(dim, heads)
            blocks = []
            for index in range(depth):
                block = SwinTransformerBlock(
                    dim,
                    grid,
                    heads,
                    window_size=window_size,
                    shift_size=window_size // 2 if index % 2 else 0,
                    mlp_ratio=mlp_ratio,
                    drop_path=rates[sum(depths[:stage]) + index],
                )
                window: Any = tuple(block.window_size)
                logit_mask = create_mask(mask, heads, window, num_kernels, official_underflow=official_underflow)
                block.attn = MaskedWindowAttention(dim, heads, window, qkv_bias, logit_mask)
                blocks.append(block)
            self.stages.append(SwinStage(blocks, downsample))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> logits `(B, num_classes)`."""
        check_images(x, self.config["in_chans"], self.config["img_size"])
        x = (self.patch_embed(x) + self.pos_embed).unflatten(1, self.grid)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(x).mean((1, 2)))


def gmm_swin(img_size: int = 32, **overrides: Any) -> GMMSwin:
    """Swin of the paper: patch 2 (4 above 32 pixels), width 96, depths 2-6-4, heads 3-6-12, window 4."""
    return GMMSwin(img_size, **{"patch_size": 2 if img_size == 32 else 4, **overrides})
