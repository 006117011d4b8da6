"""A plain U-Net (arXiv 1505.04597) in 2D and 3D: what LightM-UNet is measured against, and often the better choice on a CPU.

Convolutions keep the size (the paper crops), instance norms stand before the activations as in nnU-Net (arXiv 1809.10486), and the way
up interpolates. What a network of LightM-UNet's size costs and reaches beside it: benchmarks/results/defaults.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.backbones.model import Model
from mmkit.errors import InputError

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_POOL = {2: F.max_pool2d, 3: F.max_pool3d}
_LINEAR = {2: "bilinear", 3: "trilinear"}


def _level(dims: int, in_chans: int, chans: int) -> nn.Sequential:
    """Twice a 3 x 3 convolution, instance norm, ReLU."""
    parts: list[nn.Module] = []
    for source in (in_chans, chans):
        norm = _NORM[dims](chans, affine=True)
        parts += [_CONV[dims](source, chans, 3, padding=1, bias=False), norm, nn.ReLU(inplace=True)]
    return nn.Sequential(*parts)


class UNet(Model):
    """U-Net: image (B, in_chans, H, W[, D]) -> logits (B, num_classes, H, W[, D]).

    Sizes that are no multiple of 2 to the number of halvings are padded by repeating the border, and the logits cropped.

    Args:
        spatial_dims: 2 or 3.
        in_chans: channels of the image. num_classes: channels of the logits, background included.
        channels: per level, the first at full resolution.

    Raises:
        InputError: a configuration that cannot be built; in `forward`, a wrong rank or channel count, or an empty image.
    """

    def __init__(
        self, spatial_dims: int = 2, in_chans: int = 3, num_classes: int = 2, channels: Sequence[int] = (10, 20, 26, 26)
    ):
        super().__init__()
        if spatial_dims not in _CONV:
            raise InputError(f"spatial_dims must be 2 or 3, not {spatial_dims!r}.")
        if not channels or min(in_chans, num_classes, *channels) < 1:
            raise InputError(f"Channels must be at least 1: got {in_chans}, {num_classes}, {tuple(channels)}.")
        self.spatial_dims, self.in_chans, self.num_classes = spatial_dims, in_chans, num_classes
        self.multiple = 2 ** (len(channels) - 1)
        sizes = [in_chans, *channels]
        self.down = nn.ModuleList(_level(spatial_dims, a, b) for a, b in zip(sizes, channels, strict=False))
        pairs = list(itertools.pairwise(channels))
        self.up = nn.ModuleList(_level(spatial_dims, low + high, low) for low, high in reversed(pairs))
        self.head = _CONV[spatial_dims](channels[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `x`."""
        if x.dim() != self.spatial_dims + 2 or x.shape[1] != self.in_chans or 0 in x.shape:
            wanted = f"(B, {self.in_chans}, H, W{', D' if self.spatial_dims == 3 else ''})"
            raise InputError(f"This {self.spatial_dims}D network takes {wanted}; got shape {tuple(x.shape)}.")
        size = x.shape[2:]
        margins = [m for s in reversed(size) for m in (0, -s % self.multiple)]
        if any(margins):
            x = F.pad(x, margins, mode="replicate")
        skips: list[Tensor] = []
        for level in self.down:
            x = level(x if not skips else _POOL[self.spatial_dims](x, 2))
            skips.append(x)
        skips.pop()
        for level in self.up:
            skip = skips.pop()
            x = F.interpolate(x, skip.shape[2:], mode=_LINEAR[self.spatial_dims], align_corners=False)
            x = level(torch.cat((skip, x), 1))
        keep: Any = (..., *(slice(0, s) for s in size))
        return self.head(x)[keep]


def unet_2d_tiny(**overrides: Any) -> UNet:
    """A 2D network of the parameters of `lightm_unet_2d_tiny` with 8 channels: about 62 thousand, four levels."""
    return UNet(**{"spatial_dims": 2, **overrides})


def unet_2d_small(**overrides: Any) -> UNet:
    """A 2D network of 0.9 million parameters and five levels, for pictures whose objects need their surroundings to be told."""
    return UNet(**{"spatial_dims": 2, "channels": (16, 32, 64, 96, 128), **overrides})
