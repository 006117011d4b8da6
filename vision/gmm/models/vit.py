"""ViT with Gaussian mixture masks, arXiv 2309.05375."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from mmkit.vision.gmm.masks import create_mask
from mmkit.vision.gmm.models.layers import (
    Block,
    GMMModel,
    MaskedAttention,
    check_images,
    head_width,
    init_xavier,
    pair,
    patch_grid,
)  # fmt: skip


class GMMViT(GMMModel):
    """ViT whose attention logits are masked in every layer.

    Args:
        img_size, patch_size, in_chans, num_classes, embed_dim, depth, num_heads, mlp_ratio, drop_path_rate: as in
            timm; the drop path rate is the same in every layer.
        head_dim: width of a head; `None` is `embed_dim // num_heads`.
        mask: "gmm", "elm" or "none".
        num_kernels: Gaussians per head.
        class_token: classify from a class token; `None` follows the authors: only without a mask, else mean pooling.
        official_underflow: see `GaussianMixtureMask`.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 192,
        depth: int = 9,
        num_heads: int = 12,
        head_dim: int | None = None,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.0,
        mask: str = "gmm",
        num_kernels: int = 5,
        class_token: bool | None = None,
        official_underflow: bool = False,
    ):
        super().__init__()
        grid = patch_grid(img_size, patch_size)
        prefix = int(mask == "none" if class_token is None else class_token)
        options: dict[str, Any] = {"num_prefix_tokens": prefix, "official_underflow": official_underflow}
        self.patch_embed = PatchEmbed(pair(img_size), patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.randn(1, grid[0] * grid[1] + prefix, embed_dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim)) if prefix else None
        head_dim = head_dim or head_width(embed_dim, num_heads)

        def block() -> Block:
            logit_mask = create_mask(mask, num_heads, grid, num_kernels, **options)
            attn = MaskedAttention(embed_dim, num_heads, head_dim, logit_mask)
            return Block(embed_dim, attn, int(embed_dim * mlp_ratio), drop_path_rate)

        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.fc_norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        self.apply(init_xavier)
        nn.init.xavier_normal_(self.patch_embed.proj.weight.view(embed_dim, -1))  # a linear layer in the official code

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> tokens `(B, N, embed_dim)`, class token first where there is one."""
        check_images(x, self.config["in_chans"], self.config["img_size"])
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> logits `(B, num_classes)`."""
        x = self.forward_features(x)
        return self.head(self.fc_norm(x[:, 0] if self.cls_token is not None else x.mean(1)))


def _deep_vit(img_size: int, settings: dict[str, Any]) -> GMMViT:
    return GMMViT(img_size, **{"patch_size": 4 if img_size == 32 else 8, **settings})


def gmm_vit(img_size: int = 32, **overrides: Any) -> GMMViT:
    """The paper's ViT, 2.7 M parameters: patch 4 (8 at 64, 32 at 256 pixels), width 192, depth 9, 12 heads."""
    return GMMViT(img_size, **{"patch_size": {32: 4, 256: 32}.get(img_size, 8), **overrides})


def gmm_vit_base(img_size: int = 32, **overrides: Any) -> GMMViT:
    """The authors' "vit-base", 4.3 M: patch 2 (8 above 32 pixels), width 256, depth 8, 4 heads."""
    settings = {"patch_size": 2 if img_size == 32 else 8, "embed_dim": 256, "depth": 8, "num_heads": 4}
    return GMMViT(img_size, **{**settings, **overrides})


def gmm_vit_heat(img_size: int = 32, **overrides: Any) -> GMMViT:
    """The authors' "vit-heat", 2.4 M: patch 2 (4 above 32 pixels), width 192, depth 8, 6 heads."""
    settings = {"patch_size": 2 if img_size == 32 else 4, "embed_dim": 192, "depth": 8, "num_heads": 6}
    return GMMViT(img_size, **{**settings, **overrides})


def gmm_vit_d6(img_size: int = 32, **overrides: Any) -> GMMViT:
    """The authors' "vit_d6": patch 4 (8 above 32 pixels), width 252, depth 6, 12 heads."""
    return _deep_vit(img_size, {"embed_dim": 252, "depth": 6, **overrides})


def gmm_vit_d15(img_size: int = 32, **overrides: Any) -> GMMViT:
    """The authors' "vit_d15": `gmm_vit_d6` with width 144, depth 15."""
    return _deep_vit(img_size, {"embed_dim": 144, "depth": 15, **overrides})


def gmm_vit_d30(img_size: int = 32, **overrides: Any) -> GMMViT:
    """The authors' "vit_d30": `gmm_vit_d6` with width 72, depth 30."""
    return _deep_vit(img_size, {"embed_dim": 72, "depth": 30, **overrides})
