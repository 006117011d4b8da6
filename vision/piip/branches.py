"""The branch protocol: how a backbone is run a few blocks at a time, and which families of backbones can be.

A `Family` knows one family's order of work: patches and positions (`embed`), the list of blocks (`layers`), what runs between two
block numbers (`run`). It holds no weights: the backbone stays the library's own module under its own keys, so adapters and weight
files fit it as they do alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, RmsNorm
from torch import Tensor, nn

from mmkit.backbones import create_backbone
from mmkit.errors import InputError, nearest
from mmkit.vision.piip.config import BranchConfig
from mmkit.vision.piip.interaction import Grid


@dataclass
class Tokens:
    """Where a branch stands between two groups of blocks.

    Attributes:
        x: patch tokens (B, H * W, C), row by row.
        grid: (H, W).
        prefix: class and register tokens (B, P, C), or `None`; they take no part in interactions.
        extra: what the family's blocks need beside the tokens: rotary embeddings, a relative position bias.
    """

    x: Tensor
    grid: Grid
    prefix: Tensor | None = None
    extra: Any = None

    @property
    def maps(self) -> Tensor:
        """The patch tokens as (B, C, H, W)."""
        return self.x.transpose(1, 2).unflatten(2, self.grid)

    def joined(self) -> Tensor:
        """Prefix and patch tokens in one sequence (B, P + N, C)."""
        return self.x if self.prefix is None else torch.cat([self.prefix, self.x], 1)

    def split(self, sequence: Tensor) -> Tokens:
        """The same place with the tokens of `joined` replaced."""
        count = 0 if self.prefix is None else self.prefix.shape[1]
        return replace(self, x=sequence[:, count:], prefix=sequence[:, :count] if count else None)


class TakenOff(nn.Module):
    """In the place of a module that a branch does not use; no `nn.Identity`, which some adapters would act at."""

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        return x


class Family:
    """How one family of backbones is run in steps. Subclasses override what differs from a plain vision transformer of timm."""

    norm_name = "norm"
    windows = False
    """Whether blocks can attend within windows."""
    attends = True
    """Whether blocks have self-attention."""

    def prefix_tokens(self, model: Any) -> int:
        """Class and register tokens before the patches."""
        return int(model.num_prefix_tokens)

    def layers(self, model: Any) -> list[nn.Module]:
        """The blocks that `interaction_indexes` count."""
        return list(model.blocks)

    def widths(self, model: Any) -> list[int]:
        """Channels after each block."""
        return [int(model.embed_dim)] * len(self.layers(model))

    def strides(self, model: Any) -> list[int]:
        """Pixels per token after each block."""
        return [int(model.patch_embed.patch_size[0])] * len(self.layers(model))

    def embed(self, model: Any, x: Tensor, config: BranchConfig) -> Tokens:
        """Patches with positions, (B, 3, H, W) -> tokens before the first block."""
        raise NotImplementedError

    def block(self, model: Any, number: int, x: Tensor, tokens: Tokens) -> Tensor:
        """One block on the joined sequence; of `tokens` it reads the grid and what else it needs."""
        return self.layers(model)[number](x)

    def run(self, model: Any, tokens: Tokens, first: int, last: int, config: BranchConfig) -> Tokens:
        """Blocks `first` to `last`, both included."""
        x = tokens.joined()
        for number in range(first, last + 1):
            window = config.window_of(number)
            if window:
                x = _windowed_block(self.layers(model)[number], x, tokens.grid, window, config.pad_keys)
            else:
                x = self.block(model, number, x, tokens)
        return tokens.split(x)

    def strip(self, model: Any) -> nn.Module:
        """Take the classifier and the final norm off `model`; returns the norm."""
        norm = getattr(model, self.norm_name)
        if isinstance(norm, nn.Identity) and hasattr(model, "fc_norm"):  # timm norms after pooling where it averages
            norm = model.fc_norm
        setattr(model, self.norm_name, TakenOff())
        if hasattr(model, "reset_classifier"):
            model.reset_classifier(0, "")
        for name in ("fc_norm", "head"):
            if hasattr(model, name):
                setattr(model, name, TakenOff())
        return norm


class TimmViT(Family):
    """timm's `VisionTransformer`: DeiT, DeiT-III, AugReg, MAE, and the bundled `tiny_vit`."""

    windows = True

    def embed(self, model: Any, x: Tensor, config: BranchConfig) -> Tokens:
        x = model.patch_embed(x)  # (B, H, W, C): built with dynamic_img_size
        grid = (x.shape[1], x.shape[2])
        if config.official_positions:
            x = x.flatten(1, 2) + _bicubic_positions(model.pos_embed, model.num_prefix_tokens, grid)
            cls = getattr(model, "cls_token", None)
            return Tokens(model.norm_pre(x), grid, None if cls is None else cls.expand(len(x), -1, -1))
        return _divided(model.norm_pre(model._pos_embed(x)), grid, model.num_prefix_tokens)


class TimmBeit(Family):
    """timm's `Beit`, whose relative positions are made for one grid."""

    def embed(self, model: Any, x: Tensor, config: BranchConfig) -> Tokens:
        size = tuple(model.patch_embed.img_size)
        if tuple(x.shape[-2:]) != size:
            raise InputError(
                f"{config.backbone} has relative positions for {size[0]}x{size[1]} pixels; its branch was given "
                f"{x.shape[-2]}x{x.shape[-1]}. Build the pyramid for that size, or choose a backbone that takes any."
            )
        x = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), model.patch_embed(x)], 1)
        x = model.pos_drop(x if model.pos_embed is None else x + model.pos_embed)
        tokens = _divided(x, model.patch_embed.grid_size, 1)
        return replace(tokens, extra=None if model.rel_pos_bias is None else model.rel_pos_bias())

    def block(self, model: Any, number: int, x: Tensor, tokens: Tokens) -> Tensor:
        return model.blocks[number](x, shared_rel_pos_bias=tokens.extra)


class TimmEva(Family):
    """timm's `Eva`: EVA-02 and DINOv3, with rotary positions."""

    def embed(self, model: Any, x: Tensor, config: BranchConfig) -> Tokens:
        x = model.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        x, rope = model._pos_embed(x)
        return replace(_divided(model.norm_pre(x), grid, model.num_prefix_tokens), extra=rope)

    def block(self, model: Any, number: int, x: Tensor, tokens: Tokens) -> Tensor:
        mixed = getattr(model, "rope_mixed", False) and tokens.extra is not None
        return model.blocks[number](x, rope=tokens.extra[number] if mixed else tokens.extra)


class TimmConvNeXt(Family):
    """timm's `ConvNeXt`. Downsampling layers count as blocks, as in the official code; grid and width change at them."""

    attends = False

    def prefix_tokens(self, model: Any) -> int:
        return 0

    def layers(self, model: Any) -> list[nn.Module]:
        parts = [[stage.downsample, *stage.blocks] for stage in model.stages]
        return [m for part in parts for m in part if not isinstance(m, nn.Identity)]

    def widths(self, model: Any) -> list[int]:
        return self._per_layer(model, [int(info["num_chs"]) for info in model.feature_info])

    def strides(self, model: Any) -> list[int]:
        return self._per_layer(model, [int(info["reduction"]) for info in model.feature_info])

    def _per_layer(self, model: Any, values: list[int]) -> list[int]:
        sizes = [len(s.blocks) + (not isinstance(s.downsample, nn.Identity)) for s in model.stages]
        return [value for value, size in zip(values, sizes, strict=True) for _ in range(size)]

    def embed(self, model: Any, x: Tensor, config: BranchConfig) -> Tokens:
        return _from_maps(model.stem(x))

    def run(self, model: Any, tokens: Tokens, first: int, last: int, config: BranchConfig) -> Tokens:
        maps = tokens.maps
        for layer in self.layers(model)[first : last + 1]:
            maps = layer(maps)
        return _from_maps(maps)

    def strip(self, model: Any) -> nn.Module:
        norm = model.head.norm
        model.head = TakenOff()
        # the head's norm works on (B, C, 1, 1) maps; here it is applied to tokens
        plain = nn.LayerNorm(norm.weight.shape[0], eps=norm.eps)
        plain.weight, plain.bias = norm.weight, norm.bias
        return plain


class HuggingFaceDino(Family):
    """transformers' DINOv2 (also with registers) and DINOv3 vision transformers."""

    def __init__(self, norm_name: str):
        self.norm_name = norm_name

    def layers(self, model: Any) -> list[nn.Module]:
        return list((model.encoder if hasattr(model, "encoder") else model.model).layer)

    def prefix_tokens(self, model: Any) -> int:
        return 1 + int(getattr(model.config, "num_register_tokens", 0))

    def widths(self, model: Any) -> list[int]:
        return [int(model.config.hidden_size)] * len(self.layers(model))

    def strides(self, model: Any) -> list[int]:
        return [int(model.config.patch_size)] * len(self.layers(model))

    def embed(self, model: Any, x: Tensor, config: BranchConfig) -> Tokens:
        patch = int(model.config.patch_size)
        grid = (x.shape[-2] // patch, x.shape[-1] // patch)
        tokens = _divided(model.embeddings(x), grid, self.prefix_tokens(model))
        return replace(tokens, extra=model.rope_embeddings(x) if hasattr(model, "rope_embeddings") else None)

    def block(self, model: Any, number: int, x: Tensor, tokens: Tokens) -> Tensor:
        keywords = {} if tokens.extra is None else {"position_embeddings": tokens.extra}
        return self.layers(model)[number](x, **keywords)


FAMILIES: dict[str, Family] = {
    "VisionTransformer": TimmViT(),
    "VisionTransformerDistilled": TimmViT(),
    "Beit": TimmBeit(),
    "Eva": TimmEva(),
    "ConvNeXt": TimmConvNeXt(),
    "Dinov2Model": HuggingFaceDino("layernorm"),
    "Dinov2WithRegistersModel": HuggingFaceDino("layernorm"),
    "DINOv3ViTModel": HuggingFaceDino("norm"),
}
"""Class name -> how it is run. Add an entry to use backbones of another family."""


def build_branch(config: BranchConfig, **weights: Any) -> tuple[nn.Module, Family, nn.Module]:
    """The backbone of a branch without its classifier, how it is run, and its final norm.

    Args:
        weights: `checkpoint_path` or `pretrained` of `create_backbone`.

    Raises `InputError` for a backbone of a family that cannot be run in steps, or settings that do not fit it.
    """
    settings = dict(config.settings)
    weights["num_classes"] = 0  # the classifier of a weight file is left out
    try:
        model = create_backbone(config.backbone, **weights, **_sized(config, settings))
    except InputError:
        model = create_backbone(config.backbone, **weights, **settings)  # it takes no img_size: a convolutional one
    family = FAMILIES.get(type(model).__name__)
    if family is None:
        raise InputError(
            f"{config.backbone} is a {type(model).__name__}, which cannot be a branch: it has no fixed patch grid that its blocks keep, "
            f"or its blocks are not known here. {nearest(type(model).__name__, FAMILIES)}"
        )
    if settings.get("patch_drop_rate"):
        raise InputError(f"{config.backbone}: patch_drop_rate takes patches away, and a branch needs its whole grid.")
    norm = family.strip(model)
    _prepare(model, family, config)
    return model, family, norm


def _sized(config: BranchConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that let a backbone of timm take pictures of any size."""
    if config.backbone.startswith("transformers:"):
        return settings
    beit = config.backbone.removeprefix("timm:").startswith("beit")
    size = {} if "img_size" in settings or config.backbone.startswith("mmkit:") else {"img_size": config.img_size}
    return {**size, **({} if beit else {"dynamic_img_size": True}), **settings}


def _prepare(model: Any, family: Family, config: BranchConfig) -> None:
    """Set what no constructor does: constant drop path, QK norms over the full width; refuse what does not fit."""
    depth = len(family.layers(model))
    if config.windowed and (
        not family.windows or (config.class_token and bool(getattr(model, "num_prefix_tokens", 0)))
    ):
        raise InputError(
            f"{config.backbone}: attention within windows is for timm's VisionTransformer without class or register tokens; "
            "pass class_token=False in the branch, or window=0."
        )
    if isinstance(config.window, tuple) and len(config.window) != depth:
        raise InputError(f"{config.backbone} has {depth} blocks, but {len(config.window)} window sizes were given.")
    if config.qk_norm:
        for block in family.layers(model):
            attention: Any = block.attn  # type: ignore[union-attr]
            attention.q_norm, attention.k_norm = (
                FullWidthNorm(int(model.embed_dim), config.qk_norm),
                FullWidthNorm(int(model.embed_dim), config.qk_norm),
            )
    if config.drop_path_rate is not None:
        for module in list(model.modules()):
            for name, _ in list(module.named_children()):
                if name in ("drop_path", "drop_path1", "drop_path2"):
                    setattr(module, name, DropPath(config.drop_path_rate))


class FullWidthNorm(nn.Module):
    """InternViT's norm of queries or keys: over all heads together, where timm's is per head."""

    def __init__(self, dim: int, kind: str):
        super().__init__()
        norm = RmsNorm(dim, eps=1e-6) if kind == "rms" else nn.LayerNorm(dim, eps=1e-6)
        self.weight, self.bias, self.eps, self.kind = norm.weight, getattr(norm, "bias", None), 1e-6, kind

    def forward(self, x: Tensor) -> Tensor:
        """(B, heads, N, D) -> the same."""
        flat = x.transpose(1, 2).flatten(2)
        if self.kind == "rms":
            flat = F.rms_norm(flat, flat.shape[-1:], self.weight, self.eps)
        else:
            flat = F.layer_norm(flat, flat.shape[-1:], self.weight, self.bias, self.eps)
        return flat.unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def _divided(x: Tensor, grid: Any, prefix: int) -> Tokens:
    """Tokens from a sequence that begins with `prefix` others."""
    return Tokens(x[:, prefix:], (int(grid[0]), int(grid[1])), x[:, :prefix] if prefix else None)


def _from_maps(maps: Tensor) -> Tokens:
    return Tokens(maps.flatten(2).transpose(1, 2), (maps.shape[-2], maps.shape[-1]))


def _bicubic_positions(pos_embed: Tensor, prefix: int, grid: Grid) -> Tensor:
    """The authors' positions: those of the class token are left out, the others resized without antialiasing."""
    side = int(pos_embed.shape[1] ** 0.5)
    table = pos_embed if side * side == pos_embed.shape[1] else pos_embed[:, prefix or 1 :]
    side = int(table.shape[1] ** 0.5)
    maps = table.transpose(1, 2).unflatten(2, (side, side))
    work = maps if maps.dtype == torch.float64 else maps.float()
    resized = F.interpolate(work, size=grid, mode="bicubic", align_corners=False)
    return resized.to(pos_embed.dtype).flatten(2).transpose(1, 2)


def _windowed_block(block: Any, x: Tensor, grid: Grid, window: int, pad_keys: bool) -> Tensor:
    """A pre-norm block of timm whose tokens attend within squares of `window` tokens only; x (B, H * W, C)."""
    x = x + block.drop_path1(block.ls1(_windowed_attention(block.attn, block.norm1(x), grid, window, pad_keys)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _windowed_attention(attn: Any, x: Tensor, grid: Grid, window: int, pad_keys: bool) -> Tensor:
    """`attn` within windows. The map is filled up at the right and the bottom: with zero tokens, which become keys of the bias
    alone, or with `pad_keys` with zero keys and values. The filling is not masked; the official code does not either.
    """
    (height, width), batch = grid, x.shape[0]
    fill = (0, 0, 0, -width % window, 0, -height % window)
    maps = x.unflatten(1, grid)
    qkv = F.pad(attn.qkv(maps), fill) if pad_keys else attn.qkv(F.pad(maps, fill))
    rows, columns = qkv.shape[1] // window, qkv.shape[2] // window
    qkv = qkv.view(batch, rows, window, columns, window, 3, attn.num_heads, -1)
    q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, attn.num_heads, window * window, qkv.shape[-1])
    out = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v, dropout_p=attn.attn_drop.p * attn.training)
    out = out.view(batch, rows, columns, attn.num_heads, window, window, -1).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(batch, rows * window, columns * window, -1)[:, :height, :width].flatten(1, 2)
    return attn.proj_drop(attn.proj(out))
