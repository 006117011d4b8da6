"""From a picture to the tensor a backbone expects, as its own preprocessing says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from PIL import Image
from torch import Tensor

from mmkit.data.images import ImageLike, load_image
from mmkit.errors import InputError, nearest

_MODES = ("nearest", "bilinear", "bicubic", "lanczos")


class ImageTransform:
    """Resize, crop, and normalise a picture: `transform(image) -> (C, H, W)` float32. Can be pickled.

    At evaluation: shorter side to `size / crop_pct`, then the centre crop, exactly as timm does. For training: a random
    resized crop and a random horizontal flip.

    Args:
        size: output side, or (H, W).
        mean, std: per channel, for values in 0..1; one value means a grey output with one channel.
        interpolation: "bilinear", "bicubic", "nearest" or "lanczos".
        train: augment.
        crop_pct: share of the resized picture that the centre crop keeps.
        scale: range of the area that a training crop covers; `(1, 1)` keeps the whole picture.
        ratio: range of its aspect ratio.
        hflip: probability of a flip in training; 0 for digits, text and everything else with a handedness.

    Raises:
        InputError: a value that makes no sense.
    """

    def __init__(
        self,
        size: int | Sequence[int] = 224,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        interpolation: str = "bicubic",
        train: bool = False,
        *,
        crop_pct: float = 1.0,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
    ) -> None:
        from torchvision import transforms as T
        from torchvision.transforms import InterpolationMode

        height, width = (size, size) if isinstance(size, int) else tuple(size)
        if min(height, width) < 1:
            raise InputError(f"size must be positive, not {size}.")
        if len(mean) != len(std) or len(mean) not in (1, 3) or min(std) <= 0:
            raise InputError(f"mean and std must hold 1 or 3 values each, std above 0; found {mean} and {std}.")
        if interpolation not in _MODES:
            raise InputError(f"Unknown interpolation {interpolation!r}. {nearest(interpolation, _MODES)}")
        if not 0 < crop_pct <= 1 or not 0 < scale[0] <= scale[1] <= 1 or not 0 <= hflip <= 1:
            raise InputError("crop_pct and scale must lie in (0, 1], hflip in 0..1.")
        self.size, self.mean, self.std = (height, width), tuple(mean), tuple(std)
        self.interpolation, self.train, self.crop_pct = interpolation, train, crop_pct
        self.scale, self.ratio, self.hflip = scale, ratio, hflip
        mode = InterpolationMode(interpolation)
        if train:
            steps: list[Any] = [T.RandomResizedCrop(self.size, scale, ratio, interpolation=mode)]
            steps += [T.RandomHorizontalFlip(hflip)] if hflip else []
        else:
            scaled = [math.floor(side / crop_pct) for side in self.size]
            resize = scaled[0] if scaled[0] == scaled[1] else scaled
            steps = [T.Resize(resize, interpolation=mode), T.CenterCrop(self.size)]
        steps += [T.Grayscale()] if len(mean) == 1 else []
        self._steps = T.Compose([*steps, T.ToTensor(), T.Normalize(self.mean, self.std)])

    @classmethod
    def of(cls, preprocessing: Mapping[str, Any], train: bool = False, **overrides: Any) -> Self:
        """From a backbone's preprocessing: keys `mean`, `std`, `input_size` (C, H, W), `interpolation`, `crop_pct`.

        `overrides` are keywords of the constructor and win.
        """
        known = {k: preprocessing[k] for k in ("mean", "std", "interpolation", "crop_pct") if k in preprocessing}
        if "input_size" in preprocessing:
            known["size"] = tuple(preprocessing["input_size"])[-2:]
        return cls(**{**known, "train": train, **overrides})

    def __call__(self, image: ImageLike) -> Tensor:
        if not isinstance(image, Image.Image) or image.mode != "RGB":
            image = load_image(image)
        return self._steps(image)

    def __repr__(self) -> str:
        shown = (
            "size",
            "mean",
            "std",
            "interpolation",
            "train",
            "crop_pct",
            *(("scale", "hflip") if self.train else ()),
        )
        return f"ImageTransform({', '.join(f'{k}={getattr(self, k)!r}' for k in shown)})"
