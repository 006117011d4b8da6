"""What two neighbouring branches tell each other: bidirectional, zero-gated cross-attention (arXiv 2406.04330, section 3.3).

    fa, fb = Linear(xa), Linear(xb)                 from the incoming features, so the two directions are parallel
    xa = inject(query=xa, feature=fb)               xb = inject(query=xb, feature=fa)
    inject: q + ca_gamma * attention(norm(q), norm(f)), then + cffn_gamma * ConvFFN(norm(q)); both gates start at zero

Branch a has the larger model and the smaller map, branch b the smaller model and the larger map. Only patch tokens take part.
Names of parameters are the official ones. The official code cannot be built without the ConvFFN (it assigns a module over a
parameter); here `cffn=False` leaves the whole second half out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from mmkit.errors import InputError
from mmkit.ops import deformable_grid_attention

Grid = tuple[int, int]


class DeformableAttention(nn.Module):
    """Single-level deformable cross-attention with a value ratio and a feature width of its own.

    Args:
        dim: width of the queries and of the output.
        feat_dim: width of the features.
        num_heads, num_points: heads, and samples per head.
        value_ratio: width of the values over `dim`.

    Raises `InputError` when `num_heads` does not divide `dim` and the values' width.
    """

    def __init__(self, dim: int, feat_dim: int, num_heads: int = 16, num_points: int = 4, value_ratio: float = 0.5):
        super().__init__()
        width = int(dim * value_ratio)
        if dim % num_heads or width % num_heads or not width:
            raise InputError(
                f"num_heads={num_heads} must divide the width {dim} and the width of the values "
                f"{width} = {dim} * value_ratio {value_ratio}. Choose other heads or another ratio."
            )
        self.num_heads, self.num_points = num_heads, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_points)
        self.value_proj = nn.Linear(feat_dim, width)
        self.output_proj = nn.Linear(width, dim)

    def reset_parameters(self) -> None:
        """Offsets on rings of growing radius, one direction per head, whatever the query; equal weights."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        ring = torch.stack([angles.cos(), angles.sin()], -1)
        ring = ring / ring.abs().amax(-1, keepdim=True)
        radii = torch.arange(1, self.num_points + 1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            bias = (ring[:, None] * radii[None, :, None]).flatten()
            self.sampling_offsets.bias.copy_(bias.to(self.sampling_offsets.bias))
        for linear in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)

    def sampling(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Where each query looks and how much each look counts.

        Returns:
            Offsets (B, N, heads, points, 2) as (x, y) from the query's own place, in cells of the feature map, and logits (B, N, heads,
            points), whose softmax weighs the points.
        """
        shape = (*query.shape[:2], self.num_heads, self.num_points)
        return self.sampling_offsets(query).view(*shape, 2), self.attention_weights(query).view(*shape)

    def forward(self, query: Tensor, feat: Tensor, query_grid: Grid, feat_grid: Grid) -> Tensor:
        """(B, N, dim) from queries (B, N, dim) and features (B, M, feat_dim)."""
        value = self.value_proj(feat)
        value = value.view(*value.shape[:2], self.num_heads, -1)
        return self.output_proj(deformable_grid_attention(value, *self.sampling(query), query_grid, feat_grid))


class PlainAttention(nn.Module):
    """Ordinary multi-head cross-attention: every query sees every feature, at a cost of N * M."""

    def __init__(self, dim: int, feat_dim: int, num_heads: int = 16):
        super().__init__()
        if dim % num_heads:
            raise InputError(f"num_heads={num_heads} must divide the width {dim}.")
        self.num_heads = num_heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(feat_dim, dim, bias=False)
        self.wv = nn.Linear(feat_dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, feat: Tensor, query_grid: Grid, feat_grid: Grid) -> Tensor:
        """(B, N, dim); the grids do not matter here."""
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in (self.wq(query), self.wk(feat), self.wv(feat))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DepthwiseConv(nn.Module):
    """A 3x3 depthwise convolution over tokens that form a grid."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        return self.dwconv(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)


class ConvFFN(nn.Module):
    """Linear, depthwise convolution, GELU, Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), grid)))


class Injector(nn.Module):
    """One direction: features of the other branch into the queries, behind gates that start at zero."""

    def __init__(self, dim: int, feat_dim: int, config: Any):
        super().__init__()
        norm = (lambda d: nn.LayerNorm(d, eps=1e-6)) if config.norm else (lambda d: nn.Identity())
        self.query_norm, self.feat_norm = norm(dim), norm(feat_dim)
        self.attn: nn.Module = (
            DeformableAttention(dim, feat_dim, config.num_heads, config.num_points, config.value_ratio)
            if config.attention == "deform"
            else PlainAttention(dim, feat_dim, config.num_heads)
        )
        self.ca_gamma = nn.Parameter(torch.zeros(dim))
        self.has_ffn = config.cffn
        if config.cffn:
            self.ffn = ConvFFN(dim, int(dim * config.cffn_ratio))
            self.ffn_norm = norm(dim)
            self.cffn_gamma = nn.Parameter(torch.zeros(dim))
            self.drop_path = DropPath(config.drop_path_rate)

    def forward(self, query: Tensor, feat: Tensor, query_grid: Grid, feat_grid: Grid) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        found = self.attn(self.query_norm(query), self.feat_norm(feat), query_grid, feat_grid)
        query = torch.addcmul(query, self.ca_gamma, found)
        if self.has_ffn:
            query = torch.addcmul(query, self.cffn_gamma, self.drop_path(self.ffn(self.ffn_norm(query), query_grid)))
        return query


class BidirectionalInteraction(nn.Module):
    """Two neighbouring branches, 1 with the larger model and 2 with the smaller one, exchange features.

    Args:
        dims: (d1, d2), their widths.
        config: a `PIIPConfig`; its `direction` can leave one of the two ways out.
    """

    def __init__(self, dims: tuple[int, int], config: Any):
        super().__init__()
        first, second = dims
        if config.direction != "to_smaller":
            self.branch2to1_injector = Injector(first, first if config.proj else second, config)
            self.branch2to1_proj = nn.Linear(second, first) if config.proj else nn.Identity()
        if config.direction != "to_larger":
            self.branch1to2_injector = Injector(second, second if config.proj else first, config)
            self.branch1to2_proj = nn.Linear(first, second) if config.proj else nn.Identity()
        self.to_larger, self.to_smaller = config.direction != "to_smaller", config.direction != "to_larger"
        self.apply(init_weights)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()

    def forward(self, x1: Tensor, x2: Tensor, grid1: Grid, grid2: Grid) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, N1, d1) and (B, N2, d2) with their grids -> the same, updated."""
        y1, y2 = x1, x2
        if self.to_larger:
            y1 = self.branch2to1_injector(x1, self.branch2to1_proj(x2), grid1, grid2)
        if self.to_smaller:
            y2 = self.branch1to2_injector(x2, self.branch1to2_proj(x1), grid2, grid1)
        return y1, y2


def init_weights(module: nn.Module) -> None:
    """The authors' initialisation of everything that is not a backbone."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)
