"""ClickNet: our own click model. A MobileNetV2 sees the picture once, a light decoder answers every click.

The split of SAM (arXiv 2304.02643: heavy encoder once, light decoder per prompt) with an encoder that a phone can run (MobileNetV2,
arXiv 1801.04381) and a feature pyramid (arXiv 1612.03144) that gets the clicks at every stride: how alike each place and the clicked
ones look, how far they are, along the edges of the picture too, and the mask that was shown before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.backbones.model import Model
from mmkit.data.transforms import resized
from mmkit.errors import InputError
from mmkit.vision.clicks.geodesic import click_maps
from mmkit.vision.clicks.prompts import BOX_A, BOX_B, NEGATIVE, PADDING, POSITIVE, check_prompts

STRIDES = (2, 4, 8, 16, 32)
NUM_MAPS = 11
"""Channels of `prompt_maps`."""


class View(NamedTuple):
    """What the decoder keeps of a picture.

    Attributes:
        features: the encoder's maps, standardised, `(B, C, S / stride, S / stride)` for `STRIDES`.
        small: the picture at stride 4, `(B, 3, S / 4, S / 4)` in -1..1; half: at stride 2.
        inside: 1 where the square shows the picture, `(B, 1, S / 2, S / 2)`.
    """

    features: list[Tensor]
    half: Tensor
    small: Tensor
    inside: Tensor


class Residual(nn.Module):
    """Two 3x3 convolutions with group norm around a shortcut: `(N, C, h, w)` to the same."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(8, dim)
        self.conv2, self.norm2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(8, dim)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, h, w)`."""
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Likeness(nn.Module):
    """How alike each place and the clicked ones are, in several learned respects: cosines with the most alike click.

    `(N, C, h, w)` features and points `(N, P, 2)` in -1..1 to `(N, 2 * heads, h, w)`, positive clicks first, 0 without clicks.
    """

    def __init__(self, in_chans: int, heads: int, dim: int):
        super().__init__()
        self.heads, self.project = heads, nn.Conv2d(in_chans, heads * dim, 1)

    def forward(self, x: Tensor, points: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """`positive`, `negative`: bool `(N, P)`."""
        keys = self.project(x).unflatten(1, (self.heads, -1))
        asked = F.normalize(at_points(keys.flatten(1, 2), points).unflatten(1, (self.heads, -1)), dim=2)
        length = keys.float().square().sum(dim=2, keepdim=True).clamp(min=1e-6).rsqrt()
        alike = torch.einsum("nhdp,nhdyx->nhpyx", asked.to(keys.dtype), keys).float() * length
        found = []
        for kind in (positive, negative):
            chosen = alike.masked_fill(~kind[:, None, :, None, None], -1.0).amax(dim=2)
            found.append(chosen * kind.any(dim=1)[:, None, None, None])
        return torch.cat(found, dim=1).to(x.dtype)


class Level(nn.Module):
    """One stride of the decoder: picture features, likeness, prompt maps and the coarser level become `dim` channels."""

    def __init__(self, in_chans: int, above: int, dim: int, heads: int, depth: int, context: int):
        super().__init__()
        self.lateral = nn.Conv2d(in_chans, dim, 1)
        self.likeness = Likeness(in_chans, heads, 16) if heads else None
        self.merge = nn.Conv2d(
            dim + above + 2 * heads + NUM_MAPS, dim, 1 if dim > 64 else 3, padding=0 if dim > 64 else 1
        )
        self.context = nn.Linear(context, dim) if context else None
        self.blocks = nn.Sequential(*(Residual(dim) for _ in range(depth)))

    def forward(
        self,
        x: Tensor,
        maps: Tensor,
        clicks: tuple[Tensor, Tensor, Tensor],
        above: Tensor | None,
        context: Tensor | None,
    ) -> Tensor:
        """`(N, dim, h, w)`."""
        parts = [self.lateral(x), maps]
        if self.likeness is not None:
            parts.append(self.likeness(x, *clicks))
        if above is not None:
            parts.append(F.interpolate(above, x.shape[2:], mode="bilinear").to(x.dtype))
        merged = self.merge(torch.cat(parts, dim=1))
        if self.context is not None and context is not None:
            merged = merged + self.context(context)[..., None, None]
        return self.blocks(F.relu(merged))


class ClickNet(Model):
    """Promptable segmentation in two parts: `encode` a picture once, `decode` it for every prompt.

    Args:
        img_size: side of the square the network sees, a multiple of 32; pictures are padded to it at the right and bottom.
        encoder: a timm model with features at strides 2 to 32.
        dims: width of the decoder at strides 2, 4, 8, 16 and 32.
        depth: residual blocks at strides 4, 8, 16 and 32.
        heads: respects in which places and clicks are compared, at strides 4 to 32.
        num_masks: masks per prompt. The first is the best single guess, the others answer an ambiguous click differently.

    Raises:
        InputError: an impossible configuration.
    """

    def __init__(
        self,
        img_size: int = 224,
        encoder: str = "mobilenetv2_100",
        dims: Sequence[int] = (24, 40, 64, 96, 128),
        depth: Sequence[int] = (1, 1, 2, 2),
        heads: Sequence[int] = (4, 8, 8, 8),
        num_masks: int = 4,
    ):
        super().__init__()
        bad = any(n < 8 or n % 8 for n in dims) or any(n < 0 for n in (*depth, *heads))
        if img_size < 64 or img_size % 32 or num_masks < 1 or bad or (len(dims), len(depth), len(heads)) != (5, 4, 4):
            raise InputError(
                "ClickNet needs img_size in multiples of 32 from 64, 5 dims in multiples of 8, 4 depths, 4 heads and a mask at "
                f"least, not {img_size}, {list(dims)}, {list(depth)}, {list(heads)} and {num_masks}."
            )
        import timm

        self.img_size, self.num_masks = img_size, num_masks
        options: dict[str, Any] = {"pad_type": "same"} if encoder.startswith("mobilenet") else {}
        built: nn.Module = timm.create_model(encoder, features_only=True, **options).requires_grad_(False).eval()
        self.encoder = cast(Any, built)
        about: Any = self.encoder.feature_info
        widths = about.channels()
        if tuple(about.reduction()) != STRIDES:
            raise InputError(f"{encoder} has features at strides {about.reduction()}, not {STRIDES}.")
        for i, width in enumerate(widths):  # what the features' channels are on photographs
            self.register_buffer(f"mean{i}", torch.zeros(1, width, 1, 1))
            self.register_buffer(f"scale{i}", torch.ones(1, width, 1, 1))
        context = dims[4]
        self.clicked = nn.Sequential(
            nn.Linear(2 * (widths[4] + widths[3] + widths[2]), context),
            nn.ReLU(),
            nn.Linear(context, context),
            nn.ReLU(),
        )
        above = [dims[2], dims[3], dims[4], 0]
        self.levels = nn.ModuleList(
            Level(widths[i + 1], above[i], dims[i + 1], heads[i], depth[i], context) for i in range(4)
        )
        self.fine = nn.Sequential(
            nn.Conv2d(dims[1] + widths[0] + 3 + NUM_MAPS, dims[0], 3, padding=1), nn.ReLU(),
            nn.Conv2d(dims[0], dims[0], 3, padding=1), nn.ReLU(),
            nn.Conv2d(dims[0], num_masks, 3, padding=1),
        )  # fmt: skip
        self.mask_kind = nn.Parameter(torch.randn(num_masks, 32) * 0.1)
        self.rate = nn.Sequential(
            nn.Linear(2 * dims[2] + context + 32 + 4, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def train(self, mode: bool = True) -> ClickNet:
        """The encoder keeps its statistics."""
        super().train(mode)
        self.encoder.eval()
        return self

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width the picture takes inside the network's square."""
        scale = self.img_size / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def preprocess(self, images: Tensor) -> Tensor:
        """RGB `(B, 3, H, W)` in 0..1 to `(B, 4, S, S)`: the picture in -1..1 and 0 in the padding, and where it is."""
        h, w = self.scaled_size(*images.shape[2:])
        x = resized(images, size=(h, w), antialias=True) * 2 - 1
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        return F.pad(x, (0, self.img_size - w, 0, self.img_size - h))

    def encode(self, framed: Tensor, encoder: nn.Module | None = None) -> View:
        """What the decoder needs of `(B, 4, S, S)` of `preprocess`; `encoder`: a copy of the own one in another precision."""
        features = [
            ((x - getattr(self, f"mean{i}")) * getattr(self, f"scale{i}")).to(framed.dtype)
            for i, x in enumerate(self.raw_features(framed[:, :3], encoder))
        ]
        half = F.avg_pool2d(framed, 2)
        return View(features, half[:, :3], F.avg_pool2d(half[:, :3], 2), half[:, 3:])

    def raw_features(self, pixels: Tensor, encoder: nn.Module | None = None) -> list[Tensor]:
        """The encoder's maps of `(B, 3, S, S)` in -1..1."""
        encoder = self.encoder if encoder is None else encoder
        reference = next(encoder.parameters())
        return encoder(pixels.to(reference.dtype, memory_format=torch.channels_last))

    @torch.no_grad()
    def standardise(self, pixels: Tensor) -> None:
        """Measure mean and spread of the encoder's channels on `(B, 3, S, S)` in -1..1; once, before training."""
        for i, x in enumerate(self.raw_features(pixels)):
            x = x.float()
            getattr(self, f"mean{i}").copy_(x.mean(dim=(0, 2, 3))[None, :, None, None])
            getattr(self, f"scale{i}").copy_(1 / x.std(dim=(0, 2, 3)).clamp(min=1e-3)[None, :, None, None])

    def prompt_maps(self, view: View, points: Tensor, labels: Tensor, previous: Tensor | None) -> Tensor:
        """What was asked, painted at stride 2: `(N, NUM_MAPS, S / 2, S / 2)`.

        Args:
            view: of N pictures.
            points: `(N, P, 2)` in pixels of the square; labels: `(N, P)`.
            previous: logits `(N, 1, s, s)` of the mask shown before, NaN where there was none, or `None`.
        """
        side, size = self.img_size // 2, self.img_size
        axis = (torch.arange(side, device=points.device) + 0.5) / side
        at = points / size
        apart = (axis.view(1, 1, 1, -1) - at[..., 0, None, None]).square() + (
            axis.view(1, 1, -1, 1) - at[..., 1, None, None]
        ).square()
        maps = []
        for kind in (POSITIVE, NEGATIVE):
            nearest = apart.masked_fill((labels != kind)[..., None, None], 4.0).amin(dim=1, keepdim=True)
            maps += [(-nearest / 0.0006).exp(), (-nearest / 0.01).exp(), (1 - nearest.sqrt()).clamp(min=0)]
        corner = (labels == BOX_A) | (labels == BOX_B)
        low = at.masked_fill(~corner[..., None], 2.0).amin(dim=1)[..., None, None]
        high = at.masked_fill(~corner[..., None], -2.0).amax(dim=1)[..., None, None]
        x, y = axis.view(1, 1, -1), axis.view(1, -1, 1)
        boxed = (x >= low[:, 0]) & (x <= high[:, 0]) & (y >= low[:, 1]) & (y <= high[:, 1])
        maps.append((boxed.float() * 2 - 1)[:, None] * corner.any(dim=1)[:, None, None, None])
        before, known = torch.zeros_like(maps[0]), torch.zeros_like(maps[0])
        if previous is not None:
            before = F.interpolate(previous.float().sigmoid(), (side, side), mode="bilinear").nan_to_num()
            known = known + previous.isfinite()[:, :, :1, :1].float()
        maps += [before, known, view.inside.expand_as(before)]
        return torch.cat([*maps, self.paths(view, points, labels)], dim=1)

    @torch.no_grad()
    def paths(self, view: View, points: Tensor, labels: Tensor) -> Tensor:
        """Whether positive or negative clicks are nearer along the picture's edges, -1..1: `(N, 1, S / 2, S / 2)`."""
        side = self.img_size // 4
        cell = (points / 4).long().clamp(0, side - 1)
        place = cell[..., 1] * side + cell[..., 0]
        seeds = []
        for kind in (POSITIVE, NEGATIVE):
            grid = torch.zeros(points.shape[0], side * side, device=points.device)
            seeds.append(grid.scatter_add(1, place, (labels == kind).float()).unflatten(1, (side, side)) > 0)
        near = click_maps(view.small.float(), seeds[0][:, None], (seeds[1] & ~seeds[0])[:, None])[:, 0, 2:]
        return F.interpolate(near, scale_factor=2, mode="bilinear")

    def decode(
        self, view: View, points: Tensor, labels: Tensor, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Masks of one prompt per picture.

        Args:
            view: of N pictures.
            points: `(N, P, 2)` x, y in pixels of the square; labels: `(N, P)` in -1..3.
            previous: logits `(N, 1, s, s)` of the mask shown before, in the square, or `None`.

        Returns:
            Logits `(N, num_masks, S / 2, S / 2)` and their estimated IoU `(N, num_masks)`.
        """
        maps = self.prompt_maps(view, points, labels, previous).to(view.half.dtype, memory_format=torch.channels_last)
        corner = (labels == BOX_A) | (labels == BOX_B)
        positive, negative = labels == POSITIVE, labels == NEGATIVE
        middle = (points * corner[..., None]).sum(1, keepdim=True) / corner.sum(1).clamp(min=1)[:, None, None]
        boxed = (corner.any(dim=1) & ~positive.any(dim=1))[
            :, None
        ]  # without a click the middle of the box stands for one
        spots = torch.cat([points, middle], dim=1) / self.img_size * 2 - 1
        positive = torch.cat([positive, boxed], dim=1)
        negative = torch.cat([negative, torch.zeros_like(boxed)], dim=1)
        clicks = (spots, positive, negative)
        seen = []
        for kind in (positive, negative):
            share = (kind.float() / kind.sum(1, keepdim=True).clamp(min=1))[:, None]
            seen += [(at_points(x, spots) * share).sum(dim=2) for x in view.features[2:]]
        context = self.clicked(torch.cat(seen, dim=1).to(next(self.clicked.parameters())))
        pyramid = [maps]
        for _ in range(4):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        x: Tensor | None = None
        for i in (3, 2, 1, 0):
            x = self.levels[i](view.features[i + 1], pyramid[i + 1], clicks, x, context)
            if i == 1:
                eighth = x
        assert x is not None
        x = F.interpolate(x, scale_factor=2, mode="bilinear").to(maps.dtype)
        low = self.fine(torch.cat([x, view.features[0], view.half, maps], dim=1))
        return low, self.rated(low, eighth, context, maps)

    def rated(self, low: Tensor, features: Tensor, context: Tensor, maps: Tensor) -> Tensor:
        """Estimated IoU `(N, M)` of masks, from what lies inside and outside them."""
        masks = F.avg_pool2d(low.detach().float().sigmoid(), 4)
        flat = features.flatten(2).float()
        area = masks.flatten(2).mean(dim=2, keepdim=True)
        within = torch.einsum("nmp,ncp->nmc", masks.flatten(2), flat) / masks.flatten(2).sum(2, keepdim=True).clamp(
            min=1
        )
        around = flat.mean(dim=2)[:, None].expand_as(within)
        sure = (masks - 0.5).abs().flatten(2).mean(dim=2, keepdim=True) * 2
        soft = (masks * (1 - masks)).flatten(2).sum(2, keepdim=True) / masks.flatten(2).sum(2, keepdim=True).clamp(
            min=1
        )
        known = maps[:, 8].float().mean(dim=(1, 2))[:, None, None].expand_as(area)
        kind = self.mask_kind.expand(low.shape[0], -1, -1)
        parts = [within, around, context[:, None].expand(-1, low.shape[1], -1), kind, area.sqrt(), sure, soft, known]
        told = torch.cat([p.float() for p in parts], dim=2)
        return self.rate(told.to(next(self.rate.parameters())))[..., 0].sigmoid()

    def upscale(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits `(N, M, s, s)` of the square to the picture's `size`."""
        h, w = self.scaled_size(*size)
        if (h, w) != (self.img_size, self.img_size):
            low = F.interpolate(low, (self.img_size, self.img_size), mode="bilinear")[..., :h, :w]
        return resized(low, size=size, antialias=size[0] < low.shape[2])

    def forward(
        self, images: Tensor, points: Tensor, labels: Tensor, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Masks of Q prompts for each picture, seen once as a whole.

        Args:
            images: `(B, 3, H, W)` RGB in 0..1, any size.
            points: `(B, Q, P, 2)` x, y in pixels of `images`; -1 for padding.
            labels: `(B, Q, P)`: 1 positive, 0 negative, 2 and 3 box corners, -1 padding.
            previous: logits `(B, Q, s, s)` of the masks shown before, in the network's square.

        Returns:
            Logits `(B, Q, num_masks, H, W)`, positive inside, and estimated IoU `(B, Q, num_masks)`.

        Raises:
            InputError: shapes that do not belong together or unknown labels.
        """
        check_prompts(images, points, labels, previous)
        size, count = (images.shape[2], images.shape[3]), points.shape[1]
        view = View(*(repeat(x, count) for x in self.encode(self.preprocess(images))))
        scaled = points.float() * (self.img_size / max(size))
        scaled = torch.where((labels == PADDING)[..., None], -1.0, scaled)
        before = None if previous is None else previous.flatten(0, 1)[:, None]
        low, iou = self.decode(view, scaled.flatten(0, 1), labels.flatten(0, 1), before)
        return self.upscale(low, size).unflatten(0, points.shape[:2]), iou.unflatten(0, points.shape[:2])


def repeat(x: Any, count: int) -> Any:
    """Tensors `(B, ...)`, or a list of them, with each picture `count` times."""
    return (
        [repeat(y, count) for y in x] if isinstance(x, list) else x.repeat_interleave(count, dim=0) if count > 1 else x
    )


def at_points(x: Tensor, points: Tensor) -> Tensor:
    """Values `(N, C, P)` of maps `(N, C, h, w)` at points `(N, P, 2)` in -1..1 (outside: the edge)."""
    return F.grid_sample(x.float(), points[:, :, None], padding_mode="border", align_corners=False)[..., 0]


def clicknet_mobilenetv2(**overrides: Any) -> ClickNet:
    """The bundled click model: MobileNetV2, 224 pixels."""
    return ClickNet(**overrides)
