"""Building blocks of SqueezeSAM under their published names."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.errors import InputError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leakyrelu": nn.LeakyReLU,
    "hardswish": nn.Hardswish,
    "elu": nn.ELU,
}


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch_norm": nn.BatchNorm2d,
    "layer_norm": lambda dim: nn.GroupNorm(1, dim),
}


class ConvNormAct(nn.Module):
    """3x3 convolution, activation, then norm (the official order), or norm before the activation when `norm_first`."""

    def __init__(self, in_chans: int, out_chans: int, act_layer: str, norm_layer: str, norm_first: bool):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(in_chans, out_chans, 3, padding=1), ACTIVATIONS[act_layer]())
        self.norm = NORMS[norm_layer](out_chans)
        self.norm_first = norm_first

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_chans, h, w)` to `(N, out_chans, h, w)`."""
        if self.norm_first:
            return self.conv[1](self.norm(self.conv[0](x)))
        return self.norm(self.conv(x))


class DoubleConv(nn.Module):
    """Two `ConvNormAct` in a row."""

    def __init__(self, in_chans: int, out_chans: int, *options: Any):
        super().__init__()
        self.double_conv = nn.Sequential(
            ConvNormAct(in_chans, out_chans, *options), ConvNormAct(out_chans, out_chans, *options)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_chans, h, w)` to `(N, out_chans, h, w)`."""
        return self.double_conv(x)


class Down(nn.Module):
    """Halve the resolution by max pooling, then `DoubleConv`."""

    def __init__(self, in_chans: int, out_chans: int, *options: Any):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(in_chans, out_chans, *options))

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_chans, h, w)` to `(N, out_chans, h // 2, w // 2)`."""
        return self.maxpool_conv(x)


class PixelLinear(nn.Module):
    """Double the resolution: a linear layer per pixel, ReLU, norm over all its outputs, pixel shuffle."""

    def __init__(self, in_chans: int, out_chans: int, norm_layer: str, norm_first: bool):
        super().__init__()
        self.upsampler_linear = nn.Sequential(nn.Linear(in_chans, 4 * out_chans), nn.ReLU())
        self.norm = NORMS[norm_layer](4 * out_chans)
        self.norm_first = norm_first

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_chans, h, w)` to `(N, out_chans, 2 h, 2 w)`."""
        x = x.permute(0, 2, 3, 1)
        if self.norm_first:
            x = self.norm(self.upsampler_linear[0](x).permute(0, 3, 1, 2)).relu()
        else:
            x = self.norm(self.upsampler_linear(x).permute(0, 3, 1, 2))
        return F.pixel_shuffle(x, 2)


class Up(nn.Module):
    """Upsample, pad to the size of the skip connection, concatenate, `DoubleConv`."""

    def __init__(self, in_chans: int, skip_chans: int, act_layer: str, norm_layer: str, norm_first: bool):
        super().__init__()
        self.up = PixelLinear(in_chans, in_chans // 2, norm_layer, norm_first)
        self.conv = DoubleConv(in_chans // 2 + skip_chans, skip_chans, act_layer, norm_layer, norm_first)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """`x` `(N, in_chans, h, w)` and `skip` `(N, skip_chans, H, W)` to `(N, skip_chans, H, W)`."""
        x = self.up(x)
        dy, dx = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        if dx or dy:
            x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([skip, x], dim=1))


class MLP(nn.Module):
    """`num_layers` hidden linear layers with activation, then a linear output."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int, act_layer: str):
        super().__init__()
        dims = [in_dim] + [hidden_dim] * num_layers
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), ACTIVATIONS[act_layer]()) for a, b in itertools.pairwise(dims)
        )
        self.fc = nn.Linear(hidden_dim if num_layers else in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_dim)` to `(..., out_dim)`."""
        for layer in self.layers:
            x = layer(x)
        return self.fc(x)


class Attention(nn.Module):
    """Multi-head attention whose inner width is `dim // downsample`."""

    def __init__(self, dim: int, num_heads: int, downsample: int = 1):
        super().__init__()
        inner = dim // downsample
        if inner % num_heads:
            raise InputError(f"num_heads={num_heads} must divide the attention width {inner}.")
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q` `(N, Lq, dim)`, `k` and `v` `(N, Lk, dim)` to `(N, Lq, dim)`."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q, k, v = heads(self.q_proj(q)), heads(self.k_proj(k)), heads(self.v_proj(v))
        attention = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return self.out_proj((attention @ v).transpose(1, 2).flatten(2))


class TwoWayBlock(nn.Module):
    """SAM's two-way block as SqueezeSAM changed it: residuals start from `q + pe`, the image has no position code.

    `first` marks block 0, whose self-attention adds no token position code.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, act_layer: str, first: bool):
        super().__init__()
        self.self_attn = Attention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = Attention(dim, num_heads, 2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, mlp_dim, dim, 1, act_layer)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = Attention(dim, num_heads, 2)
        self.first = first

    def forward(self, q: Tensor, image: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `q` `(N, T, dim)` with their position code `pe`, and `image` `(N, h w, dim)`: both updated."""
        if not self.first:
            q = q + pe
        q = self.norm1(q + self.self_attn(q, q, q))
        q = self.norm2(q + self.cross_attn_token_to_image(q + pe, image, image))
        q = self.norm3(q + self.mlp(q))
        image = self.norm4(image + self.cross_attn_image_to_token(image, q + pe, q))
        return q, image


class DetectionTransformer(nn.Module):
    """Learned IoU and mask tokens and one prompt token attend to the bottleneck of the U-Net."""

    def __init__(self, dim: int, depth: int, num_heads: int, mlp_dim: int, num_masks: int, act_layer: str):
        super().__init__()
        self.transformer: Any = nn.Module()
        self.transformer.layers = nn.ModuleList(
            TwoWayBlock(dim, num_heads, mlp_dim, act_layer, first=i == 0) for i in range(depth)
        )
        self.transformer.final_attn_token_to_image = Attention(dim, num_heads, 2)
        self.transformer.norm_final_attn = nn.LayerNorm(dim)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(num_masks, dim)

    def forward(self, bottleneck: Tensor, prompt: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`bottleneck` `(N, dim, h, w)`, `prompt` `(N, dim)` (zero in the official model).

        Returns the IoU token `(N, dim)`, the mask tokens `(N, num_masks, dim)` and the updated bottleneck.
        """
        n, dim, h, w = bottleneck.shape
        learned = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(n, -1, -1)
        prompt = bottleneck.new_zeros(n, dim) if prompt is None else prompt
        pe = torch.cat([learned, prompt[:, None].to(learned.dtype)], dim=1)
        q, image = pe, bottleneck.flatten(2).transpose(1, 2)
        for layer in self.transformer.layers:
            q, image = layer(q, image, pe)
        q = self.transformer.norm_final_attn(q + self.transformer.final_attn_token_to_image(q + pe, image, image))
        return q[:, 0], q[:, 1:-1], image.transpose(1, 2).reshape(n, dim, h, w)


class MaskDecoder(nn.Module):
    """One hypernetwork per mask token makes a 1x1 filter over the features; an MLP predicts the IoU of each mask."""

    def __init__(
        self, dim: int, feature_dim: int, num_masks: int, iou_head_depth: int, iou_head_hidden_dim: int, act_layer: str
    ):
        super().__init__()
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(dim, dim, feature_dim, 2, act_layer) for _ in range(num_masks)
        )
        self.iou_prediction_head = MLP(dim, iou_head_hidden_dim, num_masks, iou_head_depth, act_layer)

    def forward(self, mask_tokens: Tensor, iou_token: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(N, num_masks, h, w)` and predicted IoU `(N, num_masks)` from features `(N, feature_dim, h, w)`."""
        filters = torch.stack([mlp(mask_tokens[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1)
        masks = (filters @ features.flatten(2)).unflatten(-1, features.shape[2:])
        return masks, self.iou_prediction_head(iou_token)


class PromptToken(nn.Module):
    """Late fusion: points as SAM embeds them (Fourier position code plus a label vector), summed to one token.

    SAM appends one token per point. Here they are summed into the one prompt token the network already has, times a
    scale that starts at zero, so switching late fusion on changes nothing until it is trained.
    """

    frequencies: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, dim // 2))
        self.label_embed = nn.Embedding(4, dim)
        self.scale = nn.Parameter(torch.zeros(dim))

    def forward(self, points: Tensor, labels: Tensor) -> Tensor:
        """`points` `(N, P, 2)` in 0..1, `labels` `(N, P)` in -1..3 to `(N, dim)`."""
        phase = 2 * math.pi * (2 * points - 1) @ self.frequencies.to(points.dtype)
        code = torch.cat([phase.sin(), phase.cos()], dim=-1).to(self.scale.dtype) + self.label_embed(
            labels.long().clamp(min=0)
        )
        return self.scale * (code * (labels >= 0)[..., None]).sum(dim=1)
