"""Turning sampled frames into the tensor a model takes: crops, flips that respect labels, normalisation.

Public clip tensors are `(T, C, H, W)`, batches `(B, T, C, H, W)`, several views of one video `(V, T, C, H, W)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from mmkit.data.images import check_size
from mmkit.errors import InputError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SSV2_FLIP_MAP = {86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166}
"""Something-Something v2 classes that swap when a clip is mirrored ("from left to right" and the like)."""


def resize_short(clip: Tensor, size: int) -> Tensor:
    """Scale `(T, C, H, W)` uint8 so that the short side is `size`; raises `InputError` for strips that become enormous."""
    height, width = clip.shape[-2:]
    short = min(height, width)
    if short == size:
        return clip
    target = (max(size, round(height * size / short)), max(size, round(width * size / short)))
    check_size((target[1], target[0]), f"A frame of {width}x{height}, resized to a short side of {size},")
    out = F.interpolate(clip.float(), target, mode="bilinear", antialias=True, align_corners=False)
    return (out + 0.5).clamp_(0, 255).to(torch.uint8)


def crops(clip: Tensor, size: int, count: int = 1) -> Tensor:
    """Square crops `(count, T, C, size, size)` of a clip whose short side is `size`.

    `count` 1 is the centre; 3 are left, centre and right (top, centre and bottom of an upright video), in this order.
    """
    height, width = clip.shape[-2:]
    if min(height, width) < size or count not in (1, 3):
        raise InputError(
            f"crops: needs a short side of at least {size} and count 1 or 3, got {height}x{width} and {count}."
        )
    y, x = (height - size) // 2, (width - size) // 2
    if count == 1:
        places = [(y, x)]
    elif width >= height:
        places = [(y, 0), (y, x), (y, width - size)]
    else:
        places = [(0, x), (y, x), (height - size, x)]
    return torch.stack([clip[..., a : a + size, b : b + size] for a, b in places])


class ClipTransform:
    """uint8 `(T, C, H, W)` and a label -> normalised float32 clip and label.

    Args:
        size: side of the square the model takes.
        mean, std: per channel, for values in 0..1.
        train: random resized crop, mirroring and, with `rand_augment`, RandAugment; the same draw for all frames.
        short_side: short side before cropping when not training; default `size`.
        num_crops: views per clip when not training: 1 (centre) or 3.
        flip: probability of mirroring.
        flip_label_map: label -> label of the mirrored clip, for example `SSV2_FLIP_MAP`.
        scale: area range of the random crop.
        rand_augment: `(num_ops, magnitude)`, for example `(4, 7)`, or `None`.
        random_erasing: probability of blanking one box through all frames.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        *,
        train: bool = False,
        short_side: int | None = None,
        num_crops: int = 1,
        flip: float = 0.5,
        flip_label_map: Mapping[int, int] | None = None,
        scale: tuple[float, float] = (0.5, 1.0),
        rand_augment: tuple[int, int] | None = None,
        random_erasing: float = 0.0,
    ):
        if size < 1 or not 0 <= flip <= 1:
            raise InputError(f"ClipTransform: size must be positive and flip in 0..1, not {size} and {flip}.")
        self.size, self.train, self.num_crops, self.flip = size, train, num_crops, flip
        self.short_side = short_side or size
        self.flip_label_map = dict(flip_label_map or {})
        self.normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])
        self.crop = v2.RandomResizedCrop(size, scale=scale, antialias=True)
        self.augment = v2.RandAugment(*rand_augment) if rand_augment else None
        self.erase = v2.RandomErasing(random_erasing) if random_erasing else None

    def __call__(self, clip: Tensor, label: int = -1) -> tuple[Tensor, int]:
        """`(T, C, H, W)` -> `(T, C, size, size)`, with `num_crops=3` `(3, T, C, size, size)`, and the label."""
        if not self.train:
            views = crops(resize_short(clip, self.short_side), self.size, self.num_crops)
            views = self.normalize(views)
            return (views[0] if self.num_crops == 1 else views), label
        if self.augment is not None:
            clip = self.augment(clip)
        clip = self.crop(clip)
        if self.flip and float(torch.rand(())) < self.flip:
            clip = clip.flip(-1)
            label = self.flip_label_map.get(label, label)
        clip = self.normalize(clip)
        return (self.erase(clip) if self.erase is not None else clip), label
