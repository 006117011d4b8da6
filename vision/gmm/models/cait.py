"""CaiT with Gaussian mixture masks, arXiv 2309.05375."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from mmkit.vision.gmm.masks import LogitMask, create_mask
from mmkit.vision.gmm.models.layers import Block, GMMModel, check_images, init_xavier, pair, patch_grid


class TalkingHeadsAttention(nn.Module):
    """CaiT's attention: mask, then head mixing before and after the softmax; `context` may give keys and values."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, mask: LogitMask | None):
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads, self.scale = num_heads, head_dim**-0.5
        self.q = nn.Linear(dim, inner, bias=False)
        self.kv = nn.Linear(dim, 2 * inner, bias=False)
        self.mix_pre = nn.Parameter(torch.randn(num_heads, num_heads))
        self.mix_post = nn.Parameter(torch.randn(num_heads, num_heads))
        self.mask = mask
        self.proj = nn.Linear(inner, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`(B, N, dim)`, context `(B, M, dim)` -> `(B, N, dim)`."""
        source = x if context is None else context
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(source).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = (q * self.scale) @ k.transpose(-2, -1)
        if self.mask is not None:
            logits = self.mask(logits)
        weights = torch.einsum("bhij,hg->bgij", logits, self.mix_pre.to(logits.dtype)).softmax(-1)
        weights = torch.einsum("bhij,hg->bgij", weights, self.mix_post.to(weights.dtype)).to(v.dtype)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class CaiTBlock(Block):
    """Layer-scaled block of CaiT; `index` (from 1) sets the initial scale."""

    def __init__(self, dim: int, attn: nn.Module, mlp_dim: int, drop_path_rate: float, index: int):
        super().__init__(dim, attn, mlp_dim, drop_path_rate)
        scale = 0.1 if index <= 18 else 1e-5 if index <= 24 else 1e-6
        self.gamma_1 = nn.Parameter(torch.full((dim,), scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`(B, N, dim)` -> `(B, N, dim)`; `context` is not normalised, as in the official code."""
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), context))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class GMMCaiT(GMMModel):
    """CaiT with masked patch layers; the class-attention layers stay unmasked.

    Args:
        cls_depth: class-attention layers behind the `depth` patch layers.
        mlp_dim: hidden width of the MLPs.
        Others: as in `GMMViT`.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 192,
        depth: int = 24,
        cls_depth: int = 2,
        num_heads: int = 4,
        head_dim: int = 64,
        mlp_dim: int = 384,
        drop_path_rate: float = 0.0,
        mask: str = "gmm",
        num_kernels: int = 5,
        official_underflow: bool = False,
    ):
        super().__init__()
        grid = patch_grid(img_size, patch_size)
        self.patch_embed = PatchEmbed(pair(img_size), patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.randn(1, grid[0] * grid[1], embed_dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))

        def block(index: int, kind: str) -> CaiTBlock:
            logit_mask = create_mask(kind, num_heads, grid, num_kernels, official_underflow=official_underflow)
            attn = TalkingHeadsAttention(embed_dim, num_heads, head_dim, logit_mask)
            return CaiTBlock(embed_dim, attn, mlp_dim, drop_path_rate, index)

        self.blocks = nn.ModuleList(block(i + 1, mask) for i in range(depth))
        self.cls_blocks = nn.ModuleList(block(i + 1, "none") for i in range(cls_depth))
        self.fc_norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        self.apply(init_xavier)
        nn.init.xavier_normal_(self.patch_embed.proj.weight.view(embed_dim, -1))

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> logits `(B, num_classes)`."""
        check_images(x, self.config["in_chans"], self.config["img_size"])
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        token = self.cls_token.expand(len(x), -1, -1)
        for block in self.cls_blocks:
            token = block(token, x)
        return self.head(self.fc_norm(token[:, 0]))


def gmm_cait(img_size: int = 32, **overrides: Any) -> GMMCaiT:
    """The authors' "cait", 9.0 M: patch 4 (8 above 32 pixels), width 192, depth 24 + 2, 4 heads x 64."""
    return GMMCaiT(img_size, **{"patch_size": 4 if img_size == 32 else 8, **overrides})


def gmm_cait_tiny(img_size: int = 32, **overrides: Any) -> GMMCaiT:
    """The paper's 5.1 M CaiT: `gmm_cait` with width 108."""
    return gmm_cait(img_size, **{"embed_dim": 108, **overrides})
