"""T2T-ViT with Gaussian mixture masks, arXiv 2309.05375."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mmkit.errors import InputError
from mmkit.vision.gmm.attention import masked_attention
from mmkit.vision.gmm.masks import LogitMask, create_mask
from mmkit.vision.gmm.models.layers import Block, GMMModel, check_images, head_width


class T2TAttention(nn.Module):
    """Attention of T2T-ViT with a skip connection inside: from the values with one head, else from the input.

    Args:
        dim: input width; the logits are scaled by `(dim // num_heads) ** -0.5`.
        inner_dim: width of queries, keys, values and output.
    """

    def __init__(self, dim: int, inner_dim: int, num_heads: int, qkv_bias: bool, mask: LogitMask | None):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * inner_dim, bias=qkv_bias)
        self.mask = mask
        self.proj = nn.Linear(inner_dim, inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, dim)` -> `(B, N, inner_dim)`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = masked_attention(q, k, v, self.mask, scale=self.scale)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return out + (v.squeeze(1) if self.num_heads == 1 else x)


class TokenBlock(Block):
    """The token transformer, whose attention changes the width."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, dim)` -> `(B, N, width)`."""
        x = self.attn(self.norm1(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def sinusoid_table(length: int, dim: int) -> Tensor:
    """Sine and cosine position table `(1, length, dim)` of T2T-ViT (even columns sine, odd columns cosine)."""
    position = torch.arange(length, dtype=torch.float64)[:, None]
    column = torch.arange(dim)
    angle = position / 10000 ** (2 * (column // 2).double() / dim)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()[None]


class GMMT2T(GMMModel):
    """T2T-ViT: overlapping 3 x 3 splits with masked one-head token transformers, then masked blocks and mean pooling.

    Args:
        img_size: side of the square images; 64 pixels use two token transformers, other sizes one, as in the official
        code. token_dim: width inside the token transformers.
        drop_path_rate: rate of the last block, rising linearly from 0.
        qkv_bias: a bias on queries, keys and values of the blocks; the token transformers never have one.
        Others: as in `GMMViT`.

    `cls_token` and `token_norm` are unused parameters of the official model, kept so that files and counts agree.
    """

    def __init__(
        self,
        img_size: int = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 256,
        depth: int = 12,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        token_dim: int = 64,
        drop_path_rate: float = 0.0,
        mask: str = "gmm",
        num_kernels: int = 5,
        official_underflow: bool = False,
        qkv_bias: bool = False,
    ):
        super().__init__()
        head_width(embed_dim, num_heads)
        splits = 2 if img_size == 64 else 1
        if not isinstance(img_size, int) or img_size < 1 or img_size % 2 ** (splits + 1):
            raise InputError(f"img_size must be one side, a multiple of {2 ** (splits + 1)}, not {img_size!r}.")

        def logit_mask(heads: int, side: int) -> LogitMask | None:
            return create_mask(mask, heads, (side, side), num_kernels, official_underflow=official_underflow)

        self.token_blocks = nn.ModuleList()
        side, width = img_size // 2, in_chans * 9
        for _ in range(splits):
            attn = T2TAttention(width, token_dim, 1, False, logit_mask(1, side))
            self.token_blocks.append(TokenBlock(width, attn, token_dim, 0.0, token_dim))
            side, width = side // 2, token_dim * 9
        self.token_norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("pos_embed", sinusoid_table(side * side, embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList()
        for rate in rates:
            attn = T2TAttention(embed_dim, embed_dim, num_heads, qkv_bias, logit_mask(num_heads, side))
            self.blocks.append(Block(embed_dim, attn, int(embed_dim * mlp_ratio), rate))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> logits `(B, num_classes)`."""
        check_images(x, self.config["in_chans"], self.config["img_size"])
        for block in self.token_blocks:
            x = block(F.unfold(x, 3, padding=1, stride=2).transpose(1, 2))
            side = math.isqrt(x.shape[1])
            x = x.transpose(1, 2).unflatten(2, (side, side))
        x = self.project(F.unfold(x, 3, padding=1, stride=2).transpose(1, 2)) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def gmm_t2t(img_size: int = 32, **overrides: Any) -> GMMT2T:
    """The paper's T2T-ViT, 6.5 M: width 256, depth 12, 4 heads."""
    return GMMT2T(img_size, **overrides)
