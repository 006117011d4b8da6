"""Small vision transformers with Gaussian mixture masks, for training from scratch on small data sets.

The five backbones of arXiv 2309.05375 (ViT, CaiT and T2T-ViT here, PiT and Swin in `mmkit.vision.gmm.pyramids`), each
with `mask="gmm"`, `"elm"` (element-wise learnable) or `"none"`. Inputs are normalised float images `(B, in_chans, H,
W)`, outputs logits `(B, num_classes)`. Parameter names follow timm; `load_official_checkpoint` maps those of the
authors' code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, trunc_normal_
from torch import Tensor, nn

from mmkit.backbones.model import Model
from mmkit.errors import InputError
from mmkit.vision.gmm.attention import LogitMask, create_mask, masked_attention


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """`value` as (height, width)."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def patch_grid(img_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches; raises `InputError` when the image is not a multiple of the patch."""
    height, width = pair(img_size)
    if patch_size < 1 or height % patch_size or width % patch_size or height < patch_size or width < patch_size:
        raise InputError(f"img_size {height} x {width} must be a positive multiple of patch_size {patch_size}.")
    return height // patch_size, width // patch_size


def head_width(dim: int, num_heads: int) -> int:
    """Width of one head; raises `InputError` when the heads do not share the width `dim` evenly."""
    if num_heads < 1 or dim % num_heads or dim < num_heads:
        raise InputError(f"The width {dim} must be a positive multiple of num_heads {num_heads}.")
    return dim // num_heads


def check_images(x: Tensor, in_chans: int, img_size: int | Sequence[int]) -> None:
    """Raise `InputError` unless `x` is `(B, in_chans, *img_size)`."""
    height, width = pair(img_size)
    if x.dim() != 4 or x.shape[1:] != (in_chans, height, width):
        raise InputError(
            f"Images must be (B, {in_chans}, {height}, {width}) as the model was built, not {tuple(x.shape)}."
        )


def init_xavier(module: nn.Module) -> None:
    """The official initialisation of ViT, CaiT and PiT: Xavier-normal weights, zero bias."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class MaskedAttention(nn.Module):
    """Multi-head self-attention whose logits pass through an optional mask.

    Args:
        dim: token width.
        num_heads, head_dim: the inner width is their product.
        mask: a `LogitMask`, or `None`.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, mask: LogitMask | None):
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.mask = mask
        self.proj = nn.Identity() if num_heads == 1 and head_dim == dim else nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, dim)` -> `(B, N, dim)`."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = masked_attention(q, k, v, self.mask)
        return self.proj(out.transpose(1, 2).reshape(B, N, -1))


class Block(nn.Module):
    """Pre-norm transformer block around `MaskedAttention`."""

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, mlp_dim: int, drop_path_rate: float, mask: LogitMask | None
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = MaskedAttention(dim, num_heads, head_dim, mask)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_dim)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, dim)` -> `(B, N, dim)`."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class GMMModel(Model):
    """Shared by the five backbones: the table that maps official keys, and its application."""

    official_keys: tuple[tuple[str, str], ...] = ()
    dropped_keys: tuple[str, ...] = ()

    def official_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Map the authors' keys; their frozen base masks (4-D tensors called `mask`) are recomputed, not loaded."""
        out: dict[str, Any] = {}
        for key, value in state.items():
            if (re.fullmatch(r"(.*\.)?mask", key) and value.dim() == 4) or any(
                re.fullmatch(p, key) for p in self.dropped_keys
            ):
                continue
            name = re.sub(r"\.mask\.mask$", ".mask.weight", key)
            for pattern, replacement in self.official_keys:
                name = re.sub(pattern, replacement, name)
            out[name] = self._official_value(name, value)
        return out

    def _official_value(self, name: str, value: Tensor) -> Tensor:
        """Reshape one tensor whose layout differs; patch embeddings that were linear layers become convolutions."""
        if name == "patch_embed.proj.weight" and value.dim() == 2:
            p, dim = self.config["patch_size"], value.shape[0]
            return value.reshape(dim, p, p, -1).permute(0, 3, 1, 2)
        return value


BLOCK_KEYS = (
    (r"\.0\.norm\.", ".norm1."),
    (r"\.0\.fn\.to_qkv\.", ".attn.qkv."),
    (r"\.0\.fn\.to_out\.0\.", ".attn.proj."),
    (r"\.0\.fn\.mask\.", ".attn.mask."),
    (r"\.1\.norm\.", ".norm2."),
    (r"\.1\.fn\.net\.0\.", ".mlp.fc1."),
    (r"\.1\.fn\.net\.3\.", ".mlp.fc2."),
    (r"^mlp_head\.0\.", "fc_norm."),
    (r"^mlp_head\.1\.", "head."),
    (r"^pos_embedding$", "pos_embed"),
)


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

    official_keys = (
        (r"^to_patch_embedding\.1\.", "patch_embed.proj."),
        (r"^transformer\.layers\.", "blocks."),
        *BLOCK_KEYS,
    )

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
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                head_dim,
                int(embed_dim * mlp_ratio),
                drop_path_rate,
                create_mask(mask, num_heads, grid, num_kernels, **options),
            )
            for _ in range(depth)
        )
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
        B, N, _ = x.shape
        source = x if context is None else context
        q = self.q(x).reshape(B, N, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(source).reshape(B, source.shape[1], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = (q * self.scale) @ k.transpose(-2, -1)
        if self.mask is not None:
            logits = self.mask(logits)
        weights = torch.einsum("bhij,hg->bgij", logits, self.mix_pre.to(logits.dtype)).softmax(-1)
        weights = torch.einsum("bhij,hg->bgij", weights, self.mix_post.to(weights.dtype)).to(v.dtype)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, -1))


class CaiTBlock(nn.Module):
    """Layer-scaled block of CaiT; `index` (from 1) sets the initial scale."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        mlp_dim: int,
        drop_path_rate: float,
        mask: LogitMask | None,
        index: int,
    ):
        super().__init__()
        scale = 0.1 if index <= 18 else 1e-5 if index <= 24 else 1e-6
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TalkingHeadsAttention(dim, num_heads, head_dim, mask)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_dim)
        self.gamma_1 = nn.Parameter(torch.full((dim,), scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), scale))
        self.drop_path = DropPath(drop_path_rate)

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

    official_keys = (
        (r"^to_patch_embedding\.1\.", "patch_embed.proj."),
        (r"^patch_transformer\.layers\.", "blocks."),
        (r"^cls_transformer\.layers\.", "cls_blocks."),
        (r"\.0\.scale$", ".gamma_1"),
        (r"\.1\.scale$", ".gamma_2"),
        (r"\.fn\.norm\.", ".norm."),
        (r"\.fn\.fn\.", ".fn."),
        (r"\.0\.fn\.to_q\.", ".attn.q."),
        (r"\.0\.fn\.to_kv\.", ".attn.kv."),
        (r"\.0\.fn\.mix_heads_(pre|post)_attn$", r".attn.mix_\1"),
        *BLOCK_KEYS,
    )

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
            return CaiTBlock(embed_dim, num_heads, head_dim, mlp_dim, drop_path_rate, logit_mask, index)

        self.blocks = nn.ModuleList(block(i + 1, mask) for i in range(depth))
        self.cls_blocks = nn.ModuleList(block(i + 1, "none") for i in range(cls_depth))
        self.fc_norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        self.apply(init_xavier)
        nn.init.xavier_normal_(self.patch_embed.proj.weight.view(embed_dim, -1))

    def _official_value(self, name: str, value: Tensor) -> Tensor:
        value = super()._official_value(name, value)
        return value.flatten() if name.endswith((".gamma_1", ".gamma_2")) else value

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
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = masked_attention(q, k, v, self.mask, scale=self.scale)
        out = self.proj(out.transpose(1, 2).reshape(B, N, -1))
        return out + (v.squeeze(1) if self.num_heads == 1 else x)


class T2TBlock(nn.Module):
    """T2T block; `residual=False` is the token transformer, whose attention changes the width."""

    def __init__(
        self,
        dim: int,
        inner_dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path_rate: float,
        qkv_bias: bool,
        mask: LogitMask | None,
        residual: bool = True,
    ):
        super().__init__()
        self.residual = residual
        self.norm1 = nn.LayerNorm(dim)
        self.attn = T2TAttention(dim, inner_dim, num_heads, qkv_bias, mask)
        self.norm2 = nn.LayerNorm(inner_dim)
        self.mlp = Mlp(inner_dim, int(inner_dim * mlp_ratio))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, dim)` -> `(B, N, inner_dim)`."""
        out = self.attn(self.norm1(x))
        x = x + self.drop_path(out) if self.residual else out
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

    official_keys = (
        (r"^tokens_to_token\.attention1\.", "token_blocks.0."),
        (r"^tokens_to_token\.attention2\.", "token_blocks.1."),
        (r"^tokens_to_token\.norm\.", "token_norm."),
        (r"^tokens_to_token\.project\.", "project."),
    )

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
            block = T2TBlock(width, token_dim, 1, 1.0, 0.0, False, logit_mask(1, side), residual=False)
            self.token_blocks.append(block)
            side, width = side // 2, token_dim * 9
        self.token_norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("pos_embed", sinusoid_table(side * side, embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.ModuleList(
            T2TBlock(embed_dim, embed_dim, num_heads, mlp_ratio, rates[i], qkv_bias, logit_mask(num_heads, side))
            for i in range(depth)
        )
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


def gmm_cait(img_size: int = 32, **overrides: Any) -> GMMCaiT:
    """The authors' "cait", 9.0 M: patch 4 (8 above 32 pixels), width 192, depth 24 + 2, 4 heads x 64."""
    return GMMCaiT(img_size, **{"patch_size": 4 if img_size == 32 else 8, **overrides})


def gmm_cait_tiny(img_size: int = 32, **overrides: Any) -> GMMCaiT:
    """The paper's 5.1 M CaiT: `gmm_cait` with width 108."""
    return gmm_cait(img_size, **{"embed_dim": 108, **overrides})


def gmm_t2t(img_size: int = 32, **overrides: Any) -> GMMT2T:
    """The paper's T2T-ViT, 6.5 M: width 256, depth 12, 4 heads."""
    return GMMT2T(img_size, **overrides)
