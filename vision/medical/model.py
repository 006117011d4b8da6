"""LightM-UNet: a U-shaped segmentation network with Mamba layers in the encoder (arXiv 2403.05246), in 2D and 3D.

Follows the released code (MrBlankness/LightM-UNet, the version after 2024-03-29), not the paper's figure: plain single-direction
Mamba over the flattened feature map, two Mamba layers per residual block, one LayerNorm shared by a layer's input and output.
State-dict keys are the official ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.backbones.model import Model
from mmkit.errors import InputError
from mmkit.ops.mamba import Mamba
from mmkit.vision.medical.official import own_state

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_LINEAR = {2: "bilinear", 3: "trilinear"}


class _Conv(nn.Module):
    """A convolution under the name `conv`, as in the official keys."""

    def __init__(self, dims: int, in_chans: int, out_chans: int, kernel: int, *, groups: int = 1, bias: bool = False):
        super().__init__()
        self.conv = _CONV[dims](in_chans, out_chans, kernel, padding=kernel // 2, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def _separable(dims: int, in_chans: int, out_chans: int, kernel: int = 3, bias: bool = False) -> nn.Sequential:
    """Depthwise convolution, then a 1x1 convolution; nothing in between."""
    return nn.Sequential(
        _Conv(dims, in_chans, in_chans, kernel, groups=in_chans, bias=bias),
        _Conv(dims, in_chans, out_chans, 1, bias=bias),
    )


class MambaLayer(nn.Module):
    """Residual Vision Mamba layer: LayerNorm, Mamba plus scaled skip, the same LayerNorm, Linear; (B, C, ...) -> (B, C', ...).

    The pixels form one sequence, last axis fastest, read in one direction; `bidirectional=True` averages with the reverse
    direction (same weights). Always computed in the parameters' dtype: float16 autocast would overflow here.
    """

    def __init__(self, in_chans: int, out_chans: int, *, bidirectional: bool = False, backend: str = "auto"):
        super().__init__()
        self.norm = nn.LayerNorm(in_chans)
        self.mamba = Mamba(in_chans, d_state=16, d_conv=4, expand=2, backend=backend)
        self.proj = nn.Linear(in_chans, out_chans)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.bidirectional = bidirectional

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.to(self.norm.weight.dtype).flatten(2).transpose(1, 2)
            normed = self.norm(tokens)
            mixed = self.mamba(normed)
            if self.bidirectional:
                mixed = (mixed + self.mamba(normed.flip(1)).flip(1)) / 2
            out = self.proj(self.norm(mixed + self.skip_scale * tokens))
        return out.transpose(1, 2).unflatten(2, x.shape[2:])


class ResMambaBlock(nn.Module):
    """Encoder block: twice GroupNorm, ReLU, `MambaLayer`, with a residual around both."""

    def __init__(self, chans: int, num_groups: int, **layer: Any):
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, chans)
        self.norm2 = nn.GroupNorm(num_groups, chans)
        self.conv1 = MambaLayer(chans, chans, **layer)  # "conv" is the official name
        self.conv2 = MambaLayer(chans, chans, **layer)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(y)))


class ResUpBlock(nn.Module):
    """Decoder block: GroupNorm, ReLU, separable convolution plus scaled skip, GroupNorm, ReLU."""

    def __init__(self, dims: int, chans: int, num_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, chans)
        self.norm2 = nn.GroupNorm(num_groups, chans)
        self.conv = _separable(dims, chans, chans)
        self.skip_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv(F.relu(self.norm1(x))) + self.skip_scale * x))


class LightMUNet(Model):
    """LightM-UNet (arXiv 2403.05246): image (B, in_chans, H, W[, D]) -> logits (B, num_classes, H, W[, D]).

    Args:
        spatial_dims: 2 or 3.
        init_filters: channels at full resolution, doubled per level; divisible by `num_groups`. The official trainer uses 32.
        in_chans: channels of the image. num_classes: channels of the logits, background included.
        dropout_prob: dropout after the first convolution, or None.
        num_groups: groups of every GroupNorm.
        blocks_down: residual Mamba blocks per level; its length is the number of levels.
        blocks_up: decoder blocks per level; one entry fewer.
        bidirectional: average every Mamba with its reverse direction (not official; same parameters).
        pad: pad inputs to the required multiple by repeating the border and crop the logits; off, such sizes are an error.
        backend: backend of the selective scan.

    Raises:
        InputError: a configuration that cannot be built; in `forward`, a wrong rank, channel count or size.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        init_filters: int = 8,
        in_chans: int = 1,
        num_classes: int = 2,
        dropout_prob: float | None = None,
        num_groups: int = 8,
        blocks_down: Sequence[int] = (1, 2, 2, 4),
        blocks_up: Sequence[int] = (1, 1, 1),
        bidirectional: bool = False,
        pad: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        if spatial_dims not in _CONV:
            raise InputError(f"spatial_dims must be 2 or 3, not {spatial_dims!r}.")
        if min(in_chans, num_classes, num_groups) < 1:
            raise InputError(
                f"in_chans, num_classes and num_groups must be at least 1: got {in_chans}, {num_classes}, {num_groups}."
            )
        if dropout_prob is not None and not 0 <= dropout_prob <= 1:
            raise InputError(f"dropout_prob must lie in 0..1 or be None, not {dropout_prob}.")
        if min([0, *blocks_down, *blocks_up]) < 0:
            raise InputError(f"Block counts cannot be negative: {tuple(blocks_down)}, {tuple(blocks_up)}.")
        if not blocks_down or len(blocks_up) != len(blocks_down) - 1:
            raise InputError(
                f"blocks_up needs one entry fewer than blocks_down: got {len(blocks_up)} and {len(blocks_down)}."
            )
        if init_filters < 1 or init_filters % num_groups:
            raise InputError(f"init_filters must be a multiple of num_groups={num_groups}, not {init_filters}.")
        self.spatial_dims, self.in_chans, self.num_classes = spatial_dims, in_chans, num_classes
        self.pad = pad
        self.multiple = 2 ** (len(blocks_down) - 1)
        chans = [init_filters * 2**i for i in range(len(blocks_down))]
        layer: dict[str, Any] = {"bidirectional": bidirectional, "backend": backend}

        self.convInit = _separable(spatial_dims, in_chans, chans[0])
        self.dropout = nn.Dropout(dropout_prob) if dropout_prob else nn.Identity()
        self.down_layers = nn.ModuleList()
        for i, count in enumerate(blocks_down):
            down: nn.Module = nn.Identity()
            if i:
                down = nn.Sequential(MambaLayer(chans[i - 1], chans[i], **layer), _POOL[spatial_dims](2))
            blocks = [ResMambaBlock(chans[i], num_groups, **layer) for _ in range(count)]
            self.down_layers.append(nn.Sequential(down, *blocks))
        self.up_samples, self.up_layers = nn.ModuleList(), nn.ModuleList()
        for j, count in enumerate(blocks_up):
            high, low = chans[-1 - j], chans[-2 - j]
            up = nn.Upsample(scale_factor=2, mode=_LINEAR[spatial_dims], align_corners=False)
            self.up_samples.append(nn.Sequential(_Conv(spatial_dims, high, low, 1), up))
            self.up_layers.append(nn.Sequential(*[ResUpBlock(spatial_dims, low, num_groups) for _ in range(count)]))
        head = _separable(spatial_dims, chans[0], num_classes, kernel=1, bias=True)
        self.conv_final = nn.Sequential(nn.GroupNorm(num_groups, chans[0]), nn.ReLU(), head)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `x`; float32 unless the model itself is half precision."""
        size = self._check(x)
        target = [-(-s // self.multiple) * self.multiple for s in size]
        if target != size:
            if not self.pad:
                raise InputError(
                    f"Every spatial size must be a multiple of {self.multiple}; got {tuple(size)}. "
                    f"Pad to {tuple(target)} or build the model with pad=True."
                )
            margins = [m for s, t in zip(reversed(size), reversed(target), strict=True) for m in (0, t - s)]
            x = F.pad(x, margins, mode="replicate")
        x = self.dropout(self.convInit(x))
        skips = []
        for down in self.down_layers:
            x = down(x)
            skips.append(x)
        skips.pop()
        for up, blocks in zip(self.up_samples, self.up_layers, strict=True):
            x = blocks(up(x) + skips.pop())
        x = self.conv_final(x)
        keep: Any = (..., *(slice(0, s) for s in size))
        return x[keep] if target != size else x

    def _check(self, x: Tensor) -> list[int]:
        if x.dim() != self.spatial_dims + 2:
            axes = "(B, C, H, W)" if self.spatial_dims == 2 else "(B, C, H, W, D)"
            raise InputError(f"This {self.spatial_dims}D network takes {axes}; got shape {tuple(x.shape)}.")
        if x.shape[1] != self.in_chans:
            raise InputError(f"The network was built for {self.in_chans} input channel(s); got {x.shape[1]}.")
        if not x.is_floating_point():
            raise InputError(f"The network takes floating-point images; got {x.dtype}. Convert with .float().")
        if 0 in x.shape:
            raise InputError(f"The input is empty: shape {tuple(x.shape)}.")
        return list(x.shape[2:])

    def official_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """See `mmkit.vision.medical.official.own_state`."""
        return own_state(state)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone: every `A_log` and `D` of the Mamba blocks."""
        return {name for name, _ in self.named_parameters() if name.endswith((".A_log", ".mamba.D"))}


_OFFICIAL: dict[str, Any] = {"init_filters": 32, "blocks_down": (1, 2, 2, 4), "blocks_up": (1, 1, 1)}
_TINY: dict[str, Any] = {"init_filters": 16, "blocks_down": (1, 1, 2), "blocks_up": (1, 1)}


def lightm_unet_2d(**overrides: Any) -> LightMUNet:
    """The official 2D network: 5,011,683 parameters with one input channel and two classes."""
    return LightMUNet(**{"spatial_dims": 2, **_OFFICIAL, **overrides})


def lightm_unet_3d(**overrides: Any) -> LightMUNet:
    """The official 3D network: 5,015,766 parameters with one input channel and three classes."""
    return LightMUNet(**{"spatial_dims": 3, **_OFFICIAL, **overrides})


def lightm_unet_2d_tiny(**overrides: Any) -> LightMUNet:
    """A 2D network for CPUs: three levels, 16 channels at full resolution."""
    return LightMUNet(**{"spatial_dims": 2, **_TINY, **overrides})


def lightm_unet_3d_tiny(**overrides: Any) -> LightMUNet:
    """A 3D network for CPUs: three levels, 16 channels at full resolution."""
    return LightMUNet(**{"spatial_dims": 3, **_TINY, **overrides})
