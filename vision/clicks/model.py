"""SqueezeSAM: promptable segmentation by one small convolutional network that gets prompts as channels.

Paper: "SqueezeSAM: User-Friendly Mobile Interactive Segmentation", Varadarajan et al., arXiv 2312.06736. Its versions
describe models of other sizes than the code the authors published for four days (yformer/EfficientSAM, Apache-2.0,
`squeeze_sam/` at 3477a43): `squeeze_sam_base` is that published network, tensor for tensor (10,159,260 parameters).

Added here, all off in the official configuration: negative clicks and the previous mask as extra input channels with
zero-initialised weights, geodesic distances to the clicks in the same way (a 5-channel checkpoint gives bit-identical
outputs until they are trained), late fusion,
padding instead of stretching, antialiased resizing, and convolution-norm-activation order for new training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.backbones.model import Model
from mmkit.data.transforms import resized
from mmkit.errors import InputError
from mmkit.vision.clicks.geodesic import click_maps
from mmkit.vision.clicks.layers import (
    ACTIVATIONS,
    NORMS,
    DetectionTransformer,
    DoubleConv,
    Down,
    MaskDecoder,
    PromptToken,
    Up,
)
from mmkit.vision.clicks.official import own_state
from mmkit.vision.clicks.prompts import BOX_A, BOX_B, NEGATIVE, PADDING, POSITIVE, check_prompts

MEAN = (0.485, 0.456, 0.406)


STD = (0.229, 0.224, 0.225)


class SqueezeSAM(Model):
    """Promptable segmentation: `(images, points, labels)` to mask logits and predicted IoU.

    Args:
        img_size: side of the square the network sees.
        patch_size: stride of the patch embedding.
        patch_embed_dim: width of the patch embedding.
        dims: width of each U-Net level.
        depth, mlp_dim, num_heads: of the detection transformer; its width is `dims[-1]`.
        num_multimask_outputs: masks returned per query; one more is computed and dropped.
        iou_head_depth, iou_head_hidden_dim: hidden layers of the IoU head.
        norm_layer: "batch_norm" or "layer_norm" (GroupNorm with one group).
        act_layer: "relu", "gelu", "silu", "leakyrelu", "hardswish" or "elu" (upsampling is always with ReLU).
        norm_first: convolution-norm-activation order, which int8 tools can fuse. The official order norms last.
        negative_clicks: adds a channel with a disk at each negative click.
        previous_mask: adds a channel with the sigmoid of the previous logits.
        geodesic: adds three channels that follow the picture's edges from the clicks (see `mmkit.vision.clicks.geodesic`).
        late_fusion: adds the points as a token as well (see `PromptToken`).
        keep_aspect: pad at the right and bottom to a square instead of stretching.
        antialias: filter when shrinking the picture. The official code does not.
        click_radius: radius of a click's disk, in network pixels.
        single_mask: train entry 0 with every prompt and let `InteractiveSegmenter` show it: one best guess instead of three
            and a choice. The published code always drops entry 0, and so does `forward`.
        strict_official_prompts: read prompts as the published code does: the first two points are a box unless the
            first label is 1 (so a label 0 in first place becomes a box).

    Raises:
        InputError: an impossible configuration.

    Example:
        >>> model = SqueezeSAM(img_size=32, dims=(8, 16), patch_embed_dim=8, mlp_dim=16, num_heads=2)
        >>> logits, iou = model(torch.rand(1, 3, 20, 30), torch.tensor([[[[5.0, 6.0]]]]), torch.tensor([[[1]]]))
        >>> logits.shape, iou.shape
        (torch.Size([1, 1, 3, 20, 30]), torch.Size([1, 1, 3]))
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        img_size: int = 512,
        patch_size: int = 2,
        patch_embed_dim: int = 64,
        dims: Sequence[int] = (64, 128, 128, 128, 128, 164, 256, 256),
        depth: int = 2,
        mlp_dim: int = 256,
        num_heads: int = 8,
        num_multimask_outputs: int = 3,
        iou_head_depth: int = 2,
        iou_head_hidden_dim: int = 256,
        norm_layer: str = "batch_norm",
        act_layer: str = "relu",
        norm_first: bool = False,
        negative_clicks: bool = False,
        previous_mask: bool = False,
        geodesic: bool = False,
        late_fusion: bool = False,
        keep_aspect: bool = False,
        antialias: bool = False,
        click_radius: float = 5.0,
        single_mask: bool = False,
        strict_official_prompts: bool = False,
    ):
        super().__init__()
        _check_config(self.config)
        dims = tuple(dims)
        self.img_size, self.patch_size, self.click_radius = img_size, patch_size, click_radius
        self.negative_clicks, self.previous_mask, self.geodesic = negative_clicks, previous_mask, geodesic
        self.single_mask = single_mask
        self.keep_aspect, self.antialias, self.strict_official_prompts = keep_aspect, antialias, strict_official_prompts
        self.num_multimask_outputs = num_multimask_outputs
        num_masks, width, options = num_multimask_outputs + 1, dims[-1], (act_layer, norm_layer, norm_first)

        self.patch_embed: Any = nn.Module()
        patch_conv = nn.Conv2d(self.in_chans, patch_embed_dim, patch_size, stride=patch_size)
        with torch.no_grad():
            patch_conv.weight[:, 5:] = 0  # the extra prompt channels start without effect
        self.patch_embed.proj = nn.Sequential(patch_conv, nn.GroupNorm(1, patch_embed_dim))
        self.unet_encoder: Any = nn.Module()
        self.unet_encoder.down_layers = nn.ModuleList(
            [DoubleConv(patch_embed_dim, dims[0], *options)]
            + [Down(a, b, *options) for a, b in itertools.pairwise(dims)]
        )
        self.get_iou_predictions_and_mask_tokens = DetectionTransformer(
            width, depth, num_heads, mlp_dim, num_masks, act_layer
        )
        self.unet_decoder: Any = nn.Module()
        self.unet_decoder.unet_upscaling_layers = nn.ModuleList(
            Up(a, b, *options) for a, b in zip(dims[:0:-1], dims[-2::-1], strict=True)
        )
        self.mask_decoder = MaskDecoder(width, dims[0], num_masks, iou_head_depth, iou_head_hidden_dim, act_layer)
        self.prompt_token = PromptToken(width) if late_fusion else None
        self.register_buffer("pixel_mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    @property
    def in_chans(self) -> int:
        """Channels of the patch embedding: RGB, box, positive clicks, and the optional extra prompts."""
        return 5 + self.negative_clicks + self.previous_mask + 3 * self.geodesic

    def official_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The published keys are this class's keys; see `mmkit.vision.clicks.official.own_state`."""
        return own_state(state, self.in_chans)

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width the picture takes inside the network's square."""
        if not self.keep_aspect:
            return self.img_size, self.img_size
        scale = self.img_size / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def preprocess(self, images: Tensor) -> Tensor:
        """RGB `(B, 3, H, W)` in 0..1 to normalised `(B, 3, S, S)`; padding, if any, is zero after normalisation."""
        h, w = self.scaled_size(*images.shape[2:])
        x = resized(images, size=(h, w), antialias=self.antialias)
        x = (x - self.pixel_mean) / self.pixel_std
        return F.pad(x, (0, self.img_size - w, 0, self.img_size - h)) if (h, w) != (self.img_size,) * 2 else x

    def scale_points(self, points: Tensor, height: int, width: int) -> Tensor:
        """Points `(..., 2)` in pixels of the picture to network pixels; negative coordinates stay -1."""
        h, w = self.scaled_size(height, width)
        factor = points.new_tensor([w, h])
        scaled = points * factor / points.new_tensor([width, height])
        return torch.where(points >= 0, scaled, -1.0)

    def encode_prompts(
        self, points: Tensor, labels: Tensor, size: tuple[int, int], previous: Tensor | None = None
    ) -> Tensor:
        """Paint prompts into channels: box, positive disks, and where the model has them negative disks, previous mask.

        Args:
            points: `(B, Q, P, 2)`, x and y in pixels of the picture.
            labels: `(B, Q, P)`: 1 positive click, 0 negative click, 2 and 3 box corners, -1 padding.
            size: height and width of the picture.
            previous: low-resolution logits `(B, Q, s, s)` of the previous round, or `None`.

        Returns:
            `(B, Q, C, S, S)`, C from 2 to 4.
        """
        points = self.scale_points(points.float(), *size)
        s = self.img_size
        rows = torch.arange(s, device=points.device, dtype=points.dtype).view(1, 1, s, 1)
        cols = rows.view(1, 1, 1, s)
        channels = [self._box_channel(points, labels, rows, cols), self._disks(points, labels == POSITIVE, rows, cols)]
        if self.negative_clicks:
            channels.append(self._disks(points, labels == NEGATIVE, rows, cols))
        if self.previous_mask:
            if previous is None:
                channels.append(torch.zeros_like(channels[0]))
            else:
                channels.append(F.interpolate(previous.float().sigmoid(), (s, s), mode="bilinear"))
        return torch.stack(channels, dim=2)

    def _box_channel(self, points: Tensor, labels: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Filled box, ones without a box, zeros without any prompt: `(B, Q, S, S)`."""
        if self.strict_official_prompts:
            corners, is_box = points[:, :, :2], labels[:, :, 0] != POSITIVE
            low, high = corners.amin(dim=2), corners.amax(dim=2)
        else:
            corner = (labels == BOX_A) | (labels == BOX_B)
            is_box = corner.any(dim=2) | (labels == PADDING).all(dim=2)  # nothing at all: an empty rectangle
            low = torch.where(corner[..., None], points, math.inf).amin(dim=2)
            high = torch.where(corner[..., None], points, -math.inf).amax(dim=2)
        low, high = low[..., None, None, :], high[..., None, None, :]
        inside = (cols >= low[..., 0]) & (cols <= high[..., 0]) & (rows >= low[..., 1]) & (rows <= high[..., 1])
        return (inside | ~is_box[..., None, None]).to(points.dtype)

    def _disks(self, points: Tensor, chosen: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """1 within `click_radius` of a chosen point: `(B, Q, S, S)`."""
        disks = torch.zeros(*points.shape[:2], self.img_size, self.img_size, dtype=torch.bool, device=points.device)
        for i in range(points.shape[2]):
            x, y = points[:, :, i, 0, None, None], points[:, :, i, 1, None, None]
            near = (cols - x).square() + (rows - y).square() <= self.click_radius**2
            disks |= near & chosen[:, :, i, None, None]
        return disks.to(points.dtype)

    def early_fusion(self, images: Tensor, points: Tensor, labels: Tensor, previous: Tensor | None = None) -> Tensor:
        """Picture and prompts as one input `(B * Q, in_chans, S, S)`; arguments as `forward`."""
        return self.fuse(self.preprocess(images), points, labels, (images.shape[2], images.shape[3]), previous)

    def fuse(
        self, rgb: Tensor, points: Tensor, labels: Tensor, size: tuple[int, int], previous: Tensor | None = None
    ) -> Tensor:
        """As `early_fusion`, from a preprocessed picture `(B, 3, S, S)` whose height and width were `size`."""
        prompts = self.encode_prompts(points, labels, size, previous)
        if self.geodesic:
            maps = self._geodesic_maps(rgb.float(), prompts, labels, self.scaled_size(*size))
            prompts = torch.cat([prompts, maps], dim=2)
        rgb = rgb[:, None].expand(-1, prompts.shape[1], -1, -1, -1)
        return torch.cat([rgb, prompts.to(rgb.dtype)], dim=2).flatten(0, 1)

    @torch.no_grad()
    def _geodesic_maps(self, rgb: Tensor, prompts: Tensor, labels: Tensor, region: tuple[int, int]) -> Tensor:
        """Three channels `(B, Q, 3, S, S)`, computed at the resolution of the logits and zero in the padding."""
        h, w = region
        grid = (max(2, h // self.patch_size), max(2, w // self.patch_size))

        def small(x: Tensor) -> Tensor:
            return F.interpolate(x[..., :h, :w], grid, mode="area")

        boxed = ((labels == BOX_A) | (labels == BOX_B)).any(dim=2)[..., None, None]
        positive = small(prompts[:, :, 1]) > 0
        negative = boxed & (small(prompts[:, :, 0]) < 0.5)
        if self.negative_clicks:
            negative |= small(prompts[:, :, 2]) > 0
        maps = click_maps(small(rgb), positive, negative & ~positive)
        maps = F.interpolate(maps.flatten(0, 1), (h, w), mode="bilinear").unflatten(0, maps.shape[:2])
        return F.pad(maps, (0, self.img_size - w, 0, self.img_size - h))

    def encode(self, fused: Tensor) -> list[Tensor]:
        """The patch embedding and every U-Net level of a fused input `(N, in_chans, S, S)`, finest first."""
        features = [self.patch_embed.proj(fused)]
        for layer in self.unet_encoder.down_layers:
            features.append(layer(features[-1]))
        return features

    def forward_fused(self, fused: Tensor, prompt: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The network proper, which is what gets exported.

        Args:
            fused: `(N, in_chans, S, S)` of `early_fusion`.
            prompt: `(N, dims[-1])` of late fusion, or `None`.

        Returns:
            Low-resolution logits `(N, num_multimask_outputs + 1, S / patch, S / patch)` and predicted IoU
            `(N, num_multimask_outputs + 1)`. Entry 0 is the mask that `forward` drops.
        """
        features = self.encode(fused)
        iou_token, mask_tokens, x = self.get_iou_predictions_and_mask_tokens(features[-1], prompt)
        for layer, skip in zip(self.unet_decoder.unet_upscaling_layers, features[-2:0:-1], strict=True):
            x = layer(x, skip)
        return self.mask_decoder(mask_tokens, iou_token, x)

    def forward_low_res(
        self, images: Tensor, points: Tensor, labels: Tensor, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, without resizing: all logits `(B, Q, M + 1, s, s)` and IoU `(B, Q, M + 1)`."""
        check_prompts(images, points, labels, previous)
        prompt = None
        if self.prompt_token is not None:
            scaled = self.scale_points(points.float(), *images.shape[2:]) / self.img_size
            prompt = self.prompt_token(scaled.flatten(0, 1), labels.flatten(0, 1))
        low, iou = self.forward_fused(self.early_fusion(images, points, labels, previous), prompt)
        shape = points.shape[:2]
        return low.unflatten(0, shape), iou.unflatten(0, shape)

    def upscale(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        """Low-resolution logits `(N, M, s, s)` to the picture's `size` by bicubic resizing (values may overshoot)."""
        h, w = self.scaled_size(*size)
        if (h, w) != (self.img_size, self.img_size):
            low = F.interpolate(low, (self.img_size, self.img_size), mode="bilinear")[..., :h, :w]
        return F.interpolate(low, size, mode="bicubic")

    def forward(
        self, images: Tensor, points: Tensor, labels: Tensor, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict masks for each query.

        Args:
            images: `(B, 3, H, W)` RGB in 0..1, any size.
            points: `(B, Q, P, 2)` x, y in pixels of `images`; -1 for padding.
            labels: `(B, Q, P)`: 1 positive, 0 negative (seen by models with `negative_clicks`), 2 and 3 box corners, -1 padding.
            previous: low-resolution logits `(B, Q, s, s)` of the previous round (seen by models with `previous_mask`).

        Returns:
            Logits `(B, Q, M, H, W)`, positive inside, and predicted IoU `(B, Q, M)`, M = `num_multimask_outputs`;
            take the mask with the largest predicted IoU.

        Raises:
            InputError: shapes that do not belong together or unknown labels.
        """
        low, iou = self.forward_low_res(images, points, labels, previous)
        masks = self.upscale(low[:, :, 1:].flatten(0, 1), (images.shape[2], images.shape[3]))
        return masks.unflatten(0, iou.shape[:2]), iou[:, :, 1:]


def _check_config(config: Mapping[str, Any]) -> None:
    """Raise `InputError` for keywords of `SqueezeSAM` that no network can be built with."""
    norm_layer, act_layer, dims = config["norm_layer"], config["act_layer"], config["dims"]
    if norm_layer not in NORMS or act_layer not in ACTIVATIONS:
        raise InputError(
            f"norm_layer must be one of {sorted(NORMS)} and act_layer one of {sorted(ACTIVATIONS)}, "
            f"not {norm_layer!r} and {act_layer!r}."
        )
    if not isinstance(dims, list) or not dims:
        raise InputError(f"dims must list the width of each U-Net level, not {dims!r}.")
    sizes = ("img_size", "patch_size", "patch_embed_dim", "mlp_dim", "num_heads", "num_multimask_outputs")
    least = {**dict.fromkeys((*sizes, "iou_head_hidden_dim"), 1), "depth": 0, "iou_head_depth": 0}
    given = [(name, config[name], low) for name, low in least.items()] + [("each of dims", width, 1) for width in dims]
    for name, value, low in given:
        if not isinstance(value, int) or value < low:
            raise InputError(f"{name} must be a whole number of at least {low}, not {value!r}.")
    if config["img_size"] // config["patch_size"] < 2 ** (len(dims) - 1):
        raise InputError(f"{len(dims)} levels need img_size / patch_size >= {2 ** (len(dims) - 1)}.")


def squeeze_sam_base(**overrides: Any) -> SqueezeSAM:
    """The published network: 10.16 M parameters, 26.3 GMAC per prompt at 512."""
    return SqueezeSAM(**overrides)


def squeeze_sam_small(**overrides: Any) -> SqueezeSAM:
    """Half the width: 7.40 M parameters, 7.0 GMAC at 512."""
    return SqueezeSAM(**{"patch_embed_dim": 32, "dims": (32, 64, 64, 96, 128, 160, 192, 256), **overrides})


def squeeze_sam_tiny(**overrides: Any) -> SqueezeSAM:
    """Patches of 4: 7.3 M parameters, 3.0 GMAC at 512."""
    tiny = {"patch_size": 4, "patch_embed_dim": 48, "dims": (48, 64, 96, 128, 160, 192, 256)}
    return SqueezeSAM(**{**tiny, **overrides})


def squeeze_sam_photo(**overrides: Any) -> SqueezeSAM:
    """A small model for photos: every extra channel, aspect kept, 128 pixels: 2.78 M parameters."""
    photo = {
        "img_size": 128,
        "patch_embed_dim": 24,
        "dims": (24, 48, 64, 96, 128, 160),
        "mlp_dim": 256,
        "negative_clicks": True,
        "previous_mask": True,
        "geodesic": True,
        "keep_aspect": True,
        "antialias": True,
        "click_radius": 3.0,
        "single_mask": True,
    }
    return SqueezeSAM(**{**photo, **overrides})
