"""What the five backbones share: checks, masked attention, the transformer block, the base class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from mmkit.backbones.model import Model
from mmkit.errors import InputError
from mmkit.vision.gmm.attention import masked_attention
from mmkit.vision.gmm.masks import LogitMask
from mmkit.vision.gmm.official import own_state


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
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = masked_attention(q, k, v, self.mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block around an attention, whose output is `width` wide (as its input when not given)."""

    def __init__(self, dim: int, attn: nn.Module, mlp_dim: int, drop_path_rate: float, width: int | None = None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(width or dim)
        self.mlp = Mlp(width or dim, mlp_dim)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, dim)` -> `(B, N, dim)`."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class GMMModel(Model):
    """Shared by the five backbones: reading the authors' files."""

    def official_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """See `mmkit.vision.gmm.official.own_state`."""
        return own_state(state, type(self).__name__, self.config.get("patch_size", 1))
