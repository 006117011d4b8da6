"""Point cloud transformers: Point-MAE (arXiv 2203.06604) and Point-BERT's encoder (arXiv 2111.14819).

A cloud is cut into groups around farthest points, a small PointNet makes one token of each, and a plain transformer reads the
tokens; the position embedding of the centres is added before every block. Blocks are timm's.

Deviations from the official code (Pang-Yatian/Point-MAE): pointwise convolutions are linear layers, and the 512-wide layer of the
tokeniser is applied to the group's maximum and to its points apart (the same numbers, fewer multiplications); pre-training uses an
exact Chamfer distance. `skip_origin=True`, the default, keeps the habit of the CUDA sampling the released weights saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mmkit.backbones.model import Model
from mmkit.errors import InputError
from mmkit.ops.points import chamfer_distance, group_points, three_interpolate
from mmkit.pointcloud.point_peft.official import own_state


class Group(nn.Module):
    """Clouds (B, N, 3) -> neighbourhoods (B, G, K, 3), relative to their centres, and centres (B, G, 3)."""

    def __init__(self, num_groups: int, group_size: int, skip_origin: bool):
        super().__init__()
        self.num_groups, self.group_size, self.skip_origin = num_groups, group_size, skip_origin

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        if points.dim() != 3 or points.shape[-1] != 3:
            raise InputError(f"The model takes clouds (B, N, 3); got {tuple(points.shape)}.")
        least = max(self.num_groups, self.group_size)
        if points.shape[1] < least:
            raise InputError(
                f"The model needs at least {least} points ({self.num_groups} groups of {self.group_size}); got {points.shape[1]}. "
                "Sample the surface more densely, or build it with fewer num_groups."
            )
        with torch.autocast(points.device.type, enabled=False):
            groups = group_points(points, self.num_groups, self.group_size, skip_origin=self.skip_origin)
        return groups.neighborhood.to(points.dtype), groups.center.to(points.dtype)


class MiniPointNet(nn.Module):
    """Neighbourhoods (B, G, K, 3) -> tokens (B, G, D)."""

    def __init__(self, embed_dim: int, widths: Sequence[int] = (128, 256, 512)):
        super().__init__()
        narrow, middle, wide = widths
        self.first_conv = nn.Sequential(
            nn.Linear(3, narrow), nn.BatchNorm1d(narrow), nn.ReLU(inplace=True), nn.Linear(narrow, middle)
        )
        self.second_conv = nn.Sequential(
            nn.Linear(2 * middle, wide), nn.BatchNorm1d(wide), nn.ReLU(inplace=True), nn.Linear(wide, embed_dim)
        )

    def forward(self, neighborhood: Tensor) -> Tensor:
        shape, k = neighborhood.shape[:2], neighborhood.shape[2]
        points = self.first_conv(neighborhood.flatten(0, 2))  # (B G K, middle)
        overall = points.unflatten(0, (-1, k)).amax(1)
        mix, *rest = self.second_conv
        if type(mix) is nn.Linear and "forward" not in mix.__dict__:
            middle = points.shape[-1]
            mixed = F.linear(points, mix.weight[:, middle:]).unflatten(0, (-1, k))
            mixed = mixed + F.linear(overall, mix.weight[:, :middle], mix.bias).unsqueeze(1)
        else:  # an adapter acts at the layer, and has to see it called
            both = torch.cat([overall.unsqueeze(1).expand(-1, k, -1), points.unflatten(0, (-1, k))], -1)
            mixed = mix(both)
        for layer in rest:
            mixed = layer(mixed.flatten(0, 1)).unflatten(0, (-1, k))
        return mixed.amax(1).unflatten(0, shape)


class ClassToken(nn.Module):
    """The class token and its position, (B, 1, D) each."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos = nn.Parameter(torch.zeros(1, 1, embed_dim))
        nn.init.trunc_normal_(self.token, std=0.02)
        nn.init.trunc_normal_(self.pos, std=0.02)

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        return self.token.expand(batch, -1, -1), self.pos.expand(batch, -1, -1)


class Blocks(nn.ModuleList):
    """Transformer blocks that are given the position embedding anew each: tokens and positions (B, T, D) -> (B, T, D)."""

    def __init__(self, embed_dim: int, depth: int, num_heads: int, drop_path_rate: float):
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        norm = nn.LayerNorm
        super().__init__([Block(embed_dim, num_heads, qkv_bias=False, drop_path=r, norm_layer=norm) for r in rates])

    def forward(self, x: Tensor, pos: Tensor, collect: Sequence[int] = ()) -> Tensor | list[Tensor]:
        """The last tokens, or those after the blocks `collect`."""
        found = []
        for i, block in enumerate(self):
            x = block(x + pos)
            if i in collect:
                found.append(x)
        return found if collect else x


def position_mlp(embed_dim: int, hidden: int = 128) -> nn.Sequential:
    """Centres (..., 3) -> (..., D)."""
    return nn.Sequential(nn.Linear(3, hidden), nn.GELU(), nn.Linear(hidden, embed_dim))


class PointEncoder(Model):
    """Tokeniser, positions, blocks and final norm: what all models here share."""

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_groups: int,
        group_size: int,
        drop_path_rate: float,
        tokenizer_dim: int | None,
        tokenizer_widths: Sequence[int],
        skip_origin: bool,
    ):
        super().__init__()
        if min(embed_dim, depth, num_heads, num_groups, group_size) < 1 or embed_dim % num_heads:
            raise InputError(
                f"embed_dim={embed_dim} must be a multiple of num_heads={num_heads}, and depth, num_groups and group_size at least 1."
            )
        if len(tokenizer_widths) != 3 or min(tokenizer_widths) < 1:
            raise InputError(f"tokenizer_widths are three widths, not {tokenizer_widths!r}.")
        self.embed_dim = self.num_features = embed_dim
        self.group = Group(num_groups, group_size, skip_origin)
        self.encoder = MiniPointNet(tokenizer_dim or embed_dim, tokenizer_widths)
        self.reduce_dim = nn.Linear(tokenizer_dim, embed_dim) if tokenizer_dim else nn.Identity()
        self.pos_embed = position_mlp(embed_dim)
        self.blocks = Blocks(embed_dim, depth, num_heads, drop_path_rate)
        self.norm = nn.LayerNorm(embed_dim)

    def embed(self, neighborhood: Tensor) -> Tensor:
        """Tokens (B, G, D) of groups, before positions."""
        return self.reduce_dim(self.encoder(neighborhood))

    def encode_groups(self, neighborhood: Tensor, center: Tensor) -> Tensor:
        """All group tokens (B, G, D) after the final norm, without a class token."""
        return self.norm(self.blocks(self.embed(neighborhood), self.pos_embed(center)))

    def global_feature(self, points: Tensor) -> Tensor:
        """One vector per cloud, (B, N, 3) -> (B, D): the maximum over the group tokens; for linear SVMs and memory banks."""
        return self.encode_groups(*self.group(points)).amax(1)

    def official_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """See `mmkit.pointcloud.point_peft.official.own_state`."""
        return own_state(self, state)


def classifier_head(kind: str, width: int, num_classes: int) -> nn.Sequential:
    """A head for features (B, width); see `PointMAE`."""
    hidden = 256
    if kind == "point_bert":
        layers: list[nn.Module] = [nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Dropout(0.5)]
    elif kind == "point_mae":
        layers = []
        for inputs in (width, hidden):
            layers += [nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Dropout(0.5)]
    elif kind == "linear":
        hidden, layers = width, []
    else:
        raise InputError(f"head must be 'point_mae', 'point_bert' or 'linear', not {kind!r}.")
    return nn.Sequential(*layers, nn.Linear(hidden, num_classes))


class PointMAE(PointEncoder):
    """A classifier of clouds: (B, N, 3) -> logits (B, num_classes), or features (B, 2D) when num_classes is 0.

    Args:
        num_classes: outputs. head: "point_mae" (three layers with batch norm), "point_bert" (two) or "linear".
        embed_dim, depth, num_heads, drop_path_rate: of the transformer.
        num_groups, group_size: G and K. Released: 64 x 32 for 1,024 points, 128 x 32 for 2,048.
        tokenizer_dim: width of the tokeniser's output when it differs from embed_dim (Point-BERT: 256).
        tokenizer_widths: its inner widths.
        skip_origin: sampling as the released weights know it; see `mmkit.ops.points.farthest_point_sample`.
        class_names: labels of the outputs, kept with the model.

    Raises:
        InputError: a configuration that cannot be built; in `forward`, wrong shapes, NaN, or fewer points than groups.
    """

    def __init__(
        self,
        num_classes: int = 40,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_groups: int = 64,
        group_size: int = 32,
        drop_path_rate: float = 0.1,
        head: str = "point_mae",
        tokenizer_dim: int | None = None,
        tokenizer_widths: Sequence[int] = (128, 256, 512),
        skip_origin: bool = True,
        class_names: Sequence[str] = (),
    ):
        super().__init__(
            embed_dim, depth, num_heads, num_groups, group_size, drop_path_rate, tokenizer_dim, tokenizer_widths, skip_origin
        )  # fmt: skip
        if num_classes < 0 or (class_names and len(class_names) != num_classes):
            raise InputError(f"{len(class_names)} class_names do not fit num_classes={num_classes}.")
        self.num_classes, self.class_names = num_classes, tuple(class_names)
        self.cls = ClassToken(embed_dim)
        self.head = classifier_head(head, 2 * embed_dim, num_classes) if num_classes else nn.Identity()

    def forward_features(self, points: Tensor) -> Tensor:
        """(B, 2D): the class token's output beside the maximum over the groups'."""
        neighborhood, center = self.group(points)
        token, pos = self.cls(len(points))
        x = torch.cat([token, self.embed(neighborhood)], 1)
        x = self.norm(self.blocks(x, torch.cat([pos, self.pos_embed(center)], 1)))
        return torch.cat([x[:, 0], x[:, 1:].amax(1)], -1)

    def forward(self, points: Tensor) -> Tensor:
        return self.head(self.forward_features(points))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def example_input(self, batch_size: int = 1) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with which the model runs."""
        p, n = self.cls.token, max(self.group.num_groups, self.group.group_size) * 2
        points = torch.rand(batch_size, n, 3, generator=torch.Generator().manual_seed(0)) - 0.5
        return (points.to(p.device, p.dtype),), {}


class PointMAEForPretraining(PointEncoder):
    """Masked autoencoding: groups are hidden, a light decoder draws the points of the hidden ones.

    Args:
        mask_ratio: share of the groups that is hidden. decoder_depth, decoder_num_heads: of the decoder.
        Others as in `PointMAE`.
    """

    def __init__(
        self,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_groups: int = 64,
        group_size: int = 32,
        drop_path_rate: float = 0.1,
        mask_ratio: float = 0.6,
        decoder_depth: int = 4,
        decoder_num_heads: int = 6,
        tokenizer_dim: int | None = None,
        tokenizer_widths: Sequence[int] = (128, 256, 512),
        skip_origin: bool = True,
    ):
        super().__init__(
            embed_dim, depth, num_heads, num_groups, group_size, drop_path_rate, tokenizer_dim, tokenizer_widths, skip_origin
        )  # fmt: skip
        self.num_hidden = int(mask_ratio * num_groups)
        if not 0 < self.num_hidden < num_groups:
            raise InputError(f"mask_ratio={mask_ratio} of {num_groups} groups must leave some hidden and some visible.")
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder_pos_embed = position_mlp(embed_dim)
        self.decoder_blocks = Blocks(embed_dim, decoder_depth, decoder_num_heads, drop_path_rate)
        self.decoder_norm = nn.LayerNorm(embed_dim)
        self.increase_dim = nn.Linear(embed_dim, 3 * group_size)
        for module in self.decoder_blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def random_mask(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """(B, G), true where a group is hidden; the same number in every row."""
        rank = torch.rand(batch, self.group.num_groups, generator=generator).argsort(1).argsort(1)
        return rank < self.num_hidden

    def forward(self, points: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Drawn and true points (B * hidden, K, 3) of the hidden groups, relative to the centres.

        Args:
            points: (B, N, 3).
            mask: (B, G), true where hidden, the same number in every row; drawn at random by default.
        """
        neighborhood, center = self.group(points)
        return self.reconstruct(neighborhood, center, mask)

    def reconstruct(self, neighborhood: Tensor, center: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`forward` for groups that were made before."""
        mask = self.random_mask(len(center)).to(center.device) if mask is None else mask
        if mask.shape != center.shape[:2] or mask.sum(1).unique().numel() != 1 or not 0 < mask[0].sum() < len(mask[0]):
            raise InputError(f"mask must be {tuple(center.shape[:2])} and hide the same number of groups in every row.")
        seen = self.visible_tokens(neighborhood, center, mask)
        hidden_at, seen_at = (center[m].unflatten(0, (len(center), -1)) for m in (mask, ~mask))
        x = torch.cat([seen, self.mask_token.expand(len(center), hidden_at.shape[1], -1)], 1)
        x = self.decoder_blocks(x, self.decoder_pos_embed(torch.cat([seen_at, hidden_at], 1)))
        drawn = self.increase_dim(self.decoder_norm(x[:, seen.shape[1] :]))
        return drawn.reshape(-1, neighborhood.shape[2], 3), neighborhood[mask]

    def visible_tokens(self, neighborhood: Tensor, center: Tensor, mask: Tensor) -> Tensor:
        """What the encoder makes of the groups that are not hidden, (B, visible, D)."""
        tokens, pos = self.embed(neighborhood), self.pos_embed(center)
        x, pos = (t[~mask].unflatten(0, (len(center), -1)) for t in (tokens, pos))
        return self.norm(self.blocks(x, pos))

    def loss(self, points: Tensor, mask: Tensor | None = None, norm: str = "l2") -> Tensor:
        """Chamfer distance of the drawn groups; "l2" or "l1"."""
        return chamfer_distance(*self.forward(points, mask), norm=norm)

    def classifier(self, num_classes: int, **settings: Any) -> PointMAE:
        """A `PointMAE` with this encoder; the class token and the head are new."""
        shared = {k: v for k, v in self.config.items() if not k.startswith(("mask_", "decoder_"))}
        model = PointMAE(num_classes, **{**shared, **settings})
        own = {k: v for k, v in self.state_dict().items() if k in model.state_dict()}
        model.load_state_dict(own, strict=False)
        return model


class PartHead(nn.Module):
    """Features of three depths (B, G, 3D), their centres, the points (B, N, 3) and the kind of thing -> logits (B, parts, N)."""

    def __init__(self, width: int, num_parts: int, num_objects: int, widths: Sequence[int]):
        super().__init__()
        a, b, c, d = widths
        self.num_objects = num_objects
        if num_objects:
            self.label = nn.Sequential(nn.Linear(num_objects, 64, bias=False), nn.BatchNorm1d(64), nn.LeakyReLU(0.2))
        self.carry = nn.Sequential(_layer(width + 3, a), _layer(a, b))
        overall = 2 * width + (64 if num_objects else 0)
        self.mix = nn.Sequential(_layer(b + overall, c), nn.Dropout(0.5), _layer(c, d))
        self.out = nn.Linear(d, num_parts)

    def forward(self, features: Tensor, center: Tensor, points: Tensor, objects: Tensor | None) -> Tensor:
        batch, n = points.shape[:2]
        parts = [features.amax(1), features.mean(1)]
        if self.num_objects:
            if objects is None:
                raise InputError("This segmenter wants to know what each cloud is: pass objects (B,).")
            parts.append(self.label(F.one_hot(objects, self.num_objects).to(features.dtype)))
        carried = torch.cat([points, three_interpolate(points, center, features).to(points.dtype)], -1)
        per_point = self.carry(carried.flatten(0, 1))
        x = torch.cat([per_point, torch.cat(parts, -1).repeat_interleave(n, 0)], -1)
        return self.out(self.mix(x)).unflatten(0, (batch, n)).transpose(1, 2)


def _layer(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True))


class PointMAESegmenter(PointEncoder):
    """Names the part of every point: (B, N, 3) -> logits (B, num_parts, N). Point-MAE's recipe: tokens of three depths are carried to
    the points.

    Args:
        num_parts: outputs. num_objects: kinds of things the caller tells with each cloud (16 in ShapeNetPart), 0 for none.
        head_widths: of the two layers behind the interpolation and of the two before the output.
        class_names: names of the parts.
        Others as in `PointMAE`.
    """

    def __init__(
        self,
        num_parts: int = 50,
        num_objects: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_groups: int = 128,
        group_size: int = 32,
        drop_path_rate: float = 0.1,
        head_widths: Sequence[int] = (1536, 1024, 512, 256),
        tokenizer_dim: int | None = None,
        tokenizer_widths: Sequence[int] = (128, 256, 512),
        skip_origin: bool = True,
        class_names: Sequence[str] = (),
    ):
        super().__init__(
            embed_dim, depth, num_heads, num_groups, group_size, drop_path_rate, tokenizer_dim, tokenizer_widths, skip_origin
        )  # fmt: skip
        if num_parts < 1 or num_objects < 0 or depth < 3 or (class_names and len(class_names) != num_parts):
            raise InputError("num_parts is at least 1, depth at least 3, and there is a class name for every part.")
        self.num_parts, self.class_names = num_parts, tuple(class_names)
        self.depths = tuple(depth * (i + 1) // 3 - 1 for i in range(3))
        self.head = PartHead(3 * embed_dim, num_parts, num_objects, head_widths)

    def forward(self, points: Tensor, objects: Tensor | None = None) -> Tensor:
        """`objects` (B,) int64: what each cloud is, when the model was built to know."""
        neighborhood, center = self.group(points)
        found = self.blocks(self.embed(neighborhood), self.pos_embed(center), collect=self.depths)
        return self.head(torch.cat([self.norm(x) for x in found], -1), center, points, objects)


def point_mae(**overrides: Any) -> PointMAE:
    """Point-MAE's classifier for 1,024 points: 22,099,752 parameters with 40 classes."""
    return PointMAE(**overrides)


def point_mae_scan(**overrides: Any) -> PointMAE:
    """Point-MAE's classifier for 2,048 points (128 groups): 22,093,327 parameters with 15 classes."""
    return PointMAE(**{"num_classes": 15, "num_groups": 128, **overrides})


def point_bert(**overrides: Any) -> PointMAE:
    """Point-BERT's encoder and classifier."""
    return PointMAE(**{"tokenizer_dim": 256, "head": "point_bert", **overrides})


NANO: dict[str, Any] = {
    "embed_dim": 64, "depth": 4, "num_heads": 4, "num_groups": 24, "group_size": 12, "drop_path_rate": 0.0,
    "tokenizer_widths": (32, 64, 128), "skip_origin": False,
}  # fmt: skip
"""A small encoder for CPUs, for clouds of about 256 points."""


def point_mae_nano(**overrides: Any) -> PointMAE:
    """A classifier with the small encoder and a linear head."""
    return PointMAE(**{**NANO, "num_classes": 16, "head": "linear", **overrides})


def point_mae_nano_parts(**overrides: Any) -> PointMAESegmenter:
    """A segmenter with the small encoder, which need not be told what a cloud is."""
    small: dict[str, Any] = {"num_objects": 0, "head_widths": (128, 128, 96, 64)}
    return PointMAESegmenter(**{**NANO, **small, **overrides})


def point_mae_parts(**overrides: Any) -> PointMAESegmenter:
    """Point-MAE's part segmenter for ShapeNetPart: 16 kinds of things, 50 parts."""
    return PointMAESegmenter(**overrides)


def point_mae_nano_pretraining(**overrides: Any) -> PointMAEForPretraining:
    """Pre-training of the small encoder."""
    return PointMAEForPretraining(**{**NANO, "decoder_depth": 1, "decoder_num_heads": 4, **overrides})
