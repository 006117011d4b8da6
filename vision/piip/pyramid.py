"""The pyramid as a backbone for detectors, with four maps of strides 4, 8, 16, 32, and a light head for segmentation on top.

Maps are made as the authors do for detection: from the merged branches by transposed convolutions and pooling ("simple"), or from
merges after chosen interactions ("taps"; the way for a last branch that is convolutional and shrinks its grid itself).
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import FeatureInfo
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from mmkit.backbones.builder import attach_info
from mmkit.errors import InputError
from mmkit.vision.piip.branches import Tokens
from mmkit.vision.piip.config import PIIPConfig
from mmkit.vision.piip.interaction import init_weights
from mmkit.vision.piip.model import Merge, Pyramid


class PIIPFeaturePyramid(Pyramid):
    """A backbone: pictures (B, C, H, W) at the resolution of the last branch -> {"0": map, "1": map, ...}, finest first.

    torchvision's `FasterRCNN`, `MaskRCNN` and `RetinaNet` take it as it is (`out_channels` is set); `feature_info` and
    `forward_intermediates` are timm's.

    Args:
        pyramid: a `PIIPConfig`, or a dict of its settings.
        taps: `None`, or three interactions (0 is the first) whose merged branches become the first three maps; the end gives the last.
        out_indices: which of the four maps are wanted; the DINO detectors use (1, 2, 3).
        fpn_channels: `None`, or the width to which torchvision's `FeaturePyramidNetwork` brings the maps.
        norm_groups: of the GroupNorms; must divide the widths.
    """

    def __init__(
        self,
        pyramid: PIIPConfig | dict[str, Any],
        *,
        taps: Sequence[int] | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        fpn_channels: int | None = None,
        norm_groups: int = 32,
    ):
        super().__init__()
        self._build(pyramid)
        widths, count = self.widths(), len(self.interactions)
        self.tap_indexes = None if taps is None else [int(t) for t in taps]
        self.out_indices = tuple(int(i) for i in out_indices)
        if not self.out_indices or not set(self.out_indices) <= {0, 1, 2, 3}:
            raise InputError(f"out_indices must be some of 0, 1, 2, 3, not {list(out_indices)}.")
        if self.tap_indexes is not None and (
            len(self.tap_indexes) != 3 or sorted(set(self.tap_indexes)) != self.tap_indexes
            or self.tap_indexes[0] < 0 or self.tap_indexes[-1] >= count
        ):  # fmt: skip
            raise InputError(f"taps must be three growing interactions of 0 to {count - 1}, not {list(taps or ())}.")
        self.merge = Merge(widths[-1], "conv2" if taps is None else "conv", norm_groups)
        self.taps = nn.ModuleDict({str(t): Merge(widths[t], "conv", norm_groups) for t in self.tap_indexes or ()})
        first = [widths[t][0] for t in self.tap_indexes] if self.tap_indexes else [widths[-1][0]] * 3
        channels = [*first, widths[-1][0]]
        strides = [self.strides()[t][-1] for t in self.tap_indexes or ()] or [self.strides()[-1][-1]] * 3
        shrinks = len(set(strides)) > 1  # a convolutional last branch has maps of several sizes of its own
        self.fpn1, self.fpn2 = (  # made only where wanted: the DINO detectors' files have no fpn1
            nn.Identity() if shrinks or i not in self.out_indices else _up(channels[i], times, norm_groups)
            for i, times in ((0, 2), (1, 1))
        )
        self.fpn3: nn.Module = nn.Identity()
        self.fpn4: nn.Module = nn.Identity() if shrinks else Halved()
        reductions: list[float] = [*strides, self.strides()[-1][-1]]
        if not shrinks:
            reductions = [s * f for s, f in zip(reductions, (0.25, 0.5, 1, 2), strict=True)]
        wanted = [channels[i] for i in self.out_indices]
        self.neck = FeaturePyramidNetwork(wanted, fpn_channels) if fpn_channels else None
        self.out_channels = fpn_channels or wanted[0]
        self.feature_info = FeatureInfo(
            [
                {"num_chs": fpn_channels or channels[i], "reduction": reductions[i], "module": f"fpn{i + 1}"}
                for i in self.out_indices
            ],
            out_indices=tuple(range(len(self.out_indices))),
        )

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """The wanted maps, finest first."""
        tapped: dict[int, Tensor] = {}

        def watch(k: int, before: list[Tokens], after: list[Tokens]) -> None:
            if str(k) in self.taps:
                tapped[k] = self.taps[str(k)](after)

        merged = self.merge(self.forward_branches(x, watch))
        levels = [*tapped.values(), merged] if tapped else [merged] * 4
        maps = [getattr(self, f"fpn{i + 1}")(levels[i]) for i in self.out_indices]
        if self.neck is None:
            return maps
        return list(self.neck(OrderedDict((str(i), m) for i, m in enumerate(maps))).values())

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """(B, C, H, W) -> maps (B, channels, H / stride, W / stride) by "0", "1", ..., as torchvision's detectors want them."""
        return OrderedDict((str(i), m) for i, m in enumerate(self.forward_maps(x)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's interface: the maps, and with them the last one unless `intermediates_only`.

        Args:
            indices: which of `feature_info`; a number means that many of the last; `None` all.
            norm, stop_early: without effect, since every map comes from the end.
            output_fmt: "NCHW", or "NLC" for tokens (B, H * W, channels).
        """
        maps = self.forward_maps(x)
        chosen = range(len(maps)) if indices is None else indices
        numbers = range(len(maps))[-chosen:] if isinstance(chosen, int) else chosen
        if output_fmt not in ("NCHW", "NLC") or any(not -len(maps) <= i < len(maps) for i in numbers):
            raise InputError(
                f"There are {len(maps)} maps, as 'NCHW' or 'NLC'; got indices={indices!r}, output_fmt={output_fmt!r}."
            )
        taken = [maps[i] if output_fmt == "NCHW" else maps[i].flatten(2).transpose(1, 2) for i in numbers]
        return taken if intermediates_only else (maps[-1], taken)


class Halved(nn.Module):
    """Half the size, by the largest of each 2 x 2; a single row or column, as strips have it, stays."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, max(H // 2, 1), max(W // 2, 1))."""
        return F.max_pool2d(x, [min(2, side) for side in x.shape[-2:]])


def _up(channels: int, times: int, groups: int) -> nn.Sequential:
    """Twice or four times the size, by transposed convolutions."""
    layers: list[nn.Module] = [nn.ConvTranspose2d(channels, channels, 2, 2)]
    if times == 2:
        layers += [nn.GroupNorm(groups, channels), nn.GELU(), nn.ConvTranspose2d(channels, channels, 2, 2)]
    return nn.Sequential(*layers).apply(init_weights)


class PIIPSegmenter(PIIPFeaturePyramid):
    """A class for every pixel: (B, C, H, W) -> (B, num_classes, H, W).

    Every map gets a 1x1 convolution, is brought to the finest map's size and summed; a 3x3 convolution, GroupNorm and GELU follow, then
    the classes, enlarged to the picture. `spatial_dims`, `in_chans` and `num_classes` are set, so that other pipelines take it too.

    Args:
        pyramid: a `PIIPConfig`, or a dict of its settings.
        num_classes: with the background.
        hidden: channels of the head.
        taps, norm_groups: as in `PIIPFeaturePyramid`.
        class_names: background first.
    """

    spatial_dims = 2

    def __init__(
        self,
        pyramid: PIIPConfig | dict[str, Any],
        num_classes: int = 2,
        *,
        hidden: int = 64,
        taps: Sequence[int] | None = None,
        norm_groups: int = 32,
        class_names: Sequence[str] = (),
    ):
        super().__init__(pyramid, taps=taps, norm_groups=norm_groups)
        if class_names and len(class_names) != num_classes:
            raise InputError(f"There are {num_classes} classes, but {len(class_names)} class_names.")
        self.class_names, self.num_classes = tuple(class_names), num_classes
        self.in_chans = self.backbone_info.input_size[0]
        self.laterals = nn.ModuleList(nn.Conv2d(c, hidden, 1) for c in self.feature_info.channels())
        groups = norm_groups if hidden % norm_groups == 0 else 1
        self.fuse = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1, bias=False), nn.GroupNorm(groups, hidden), nn.GELU()
        )
        self.classifier = nn.Conv2d(hidden, num_classes, 1)
        self.laterals.apply(init_weights), self.fuse.apply(init_weights)
        nn.init.normal_(self.classifier.weight, std=0.01)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)
        attach_info(
            self,
            dataclasses.replace(
                self.backbone_info, heads=("classifier",), num_classes=num_classes, class_names=self.class_names
            ),
        )

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Logits of every pixel."""
        maps = [lateral(m) for lateral, m in zip(self.laterals, self.forward_maps(x), strict=True)]
        size = maps[0].shape[-2:]
        total = torch.stack(
            [m if m.shape[-2:] == size else F.interpolate(m, size=size, mode="bilinear") for m in maps]
        ).sum(0)
        return F.interpolate(self.classifier(self.fuse(total)), size=x.shape[-2:], mode="bilinear")
