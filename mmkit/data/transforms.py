"""From a picture to the tensor a backbone expects, as its own preprocessing says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmkit.data.images import ImageLike, check_size, load_image
from mmkit.errors import InputError, nearest

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "random")
_CROP_MODES = ("center", "squash", "border", "pad")


class ImageTransform:
    """Resize, crop, and normalise a picture: `transform(image) -> (C, H, W)` float32. Can be pickled.

    At evaluation this is timm's own transform. For training: a random resized crop and a random horizontal flip, and what is asked
    for of timm's RandAugment, torchvision's colour jitter and timm's random erasing.

    Args:
        size: output side, or (H, W).
        mean, std: per channel, for values in 0..1; one value means a grey output with one channel.
        interpolation: "bilinear", "bicubic", "nearest", "lanczos", "box" or "hamming"; "random", which some published
            configurations hold, is bilinear here.
        train: augment.
        crop_pct: share of the resized picture that the crop keeps; above 1 a border is left.
        crop_mode: "center" resizes the shorter side to `size / crop_pct`, "squash" both sides without regard to the aspect
            ratio, "border" the longer side and fills up with the mean around; then the centre is cropped. "pad" resizes the
            longer side to `size` and fills up with the mean at the right and below (Segment Anything).
        scale: range of the area that a training crop covers; `(1, 1)` keeps the whole picture.
        ratio: range of its aspect ratio.
        hflip: probability of a flip in training; 0 for digits, text and everything else with a handedness.
        auto_augment: a policy in timm's words: "rand-m9-mstd0.5" (RandAugment), "3a", "original"; training only.
        color_jitter: how far brightness, contrast and saturation may go, 0 to 1; a tenth of it for the hue.
        erase: probability that a random rectangle is filled with noise.

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
        crop_mode: str = "center",
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        auto_augment: str | None = None,
        color_jitter: float = 0.0,
        erase: float = 0.0,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        if min(height, width) < 1:
            raise InputError(f"size must be positive, not {size}.")
        if len(mean) != len(std) or len(mean) not in (1, 3) or min(std) <= 0:
            raise InputError(f"mean and std must hold 1 or 3 values each, std above 0; found {mean} and {std}.")
        if interpolation not in _INTERPOLATIONS:
            raise InputError(f"Unknown interpolation {interpolation!r}. {nearest(interpolation, _INTERPOLATIONS)}")
        if crop_mode not in _CROP_MODES:
            raise InputError(f"Unknown crop_mode {crop_mode!r}. {nearest(crop_mode, _CROP_MODES)}")
        if crop_pct <= 0 or not 0 < scale[0] <= scale[1] <= 1 or not 0 <= hflip <= 1:
            raise InputError("crop_pct must be above 0, scale lie in (0, 1], hflip in 0..1.")
        self.size, self.mean, self.std = (height, width), tuple(mean), tuple(std)
        self.interpolation, self.train, self.crop_pct, self.crop_mode = interpolation, train, crop_pct, crop_mode
        if not 0 <= color_jitter <= 1 or not 0 <= erase <= 1:
            raise InputError(f"color_jitter and erase must lie in 0..1, not {color_jitter} and {erase}.")
        self.scale, self.ratio, self.hflip = scale, ratio, hflip
        self.auto_augment, self.color_jitter, self.erase = auto_augment, color_jitter, erase
        self._steps = self._training_steps() if train else self._evaluation_steps()

    def _evaluation_steps(self) -> Any:
        from timm.data import create_transform
        from timm.data.transforms import ResizeKeepRatio
        from torchvision import transforms as T

        steps = create_transform(
            self.size, interpolation=self._method, mean=self.mean, std=self.std, crop_pct=self.crop_pct, crop_mode=self.crop_mode
        ).transforms  # fmt: skip
        if self.crop_mode == "pad":
            fill = tuple(round(255 * v) for v in self.mean)
            steps = [
                ResizeKeepRatio(self.size, interpolation=self._method, longest=1.0),
                PadEnd(self.size, fill),
                *steps[-2:],
            ]
        steps[-1].inplace = True  # the tensor is fresh: nobody sees it before it is normalised
        return T.Compose([*self._grey(), *steps])

    def _training_steps(self) -> Any:
        from timm.data.transforms import str_to_interp_mode
        from torchvision import transforms as T

        crop = T.RandomResizedCrop(self.size, self.scale, self.ratio, interpolation=str_to_interp_mode(self._method))
        flip = [T.RandomHorizontalFlip(self.hflip)] if self.hflip else []
        last = [T.ToTensor(), T.Normalize(self.mean, self.std, True)]
        if self.erase:
            from timm.data.random_erasing import RandomErasing

            last.append(RandomErasing(self.erase, mode="pixel", max_count=1, device="cpu"))
        return T.Compose([crop, *flip, *self._colours(), *self._grey(), *last])

    def _colours(self) -> list[Any]:
        from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
        from timm.data.transforms import str_to_pil_interp
        from torchvision import transforms as T

        steps: list[Any] = []
        if self.auto_augment:
            grey = tuple(round(255 * v) for v in (self.mean if len(self.mean) == 3 else self.mean * 3))
            hints = {
                "translate_const": int(0.45 * min(self.size)),
                "img_mean": grey,
                "interpolation": str_to_pil_interp(self._method),
            }
            try:
                make = rand_augment_transform if self.auto_augment.startswith("rand") else auto_augment_transform
                steps.append(make(self.auto_augment, hints))
            except (AssertionError, ValueError, KeyError, IndexError) as error:
                raise InputError(
                    f"timm knows no policy {self.auto_augment!r}: use 'rand-m9-mstd0.5' (RandAugment), '3a' or 'original'."
                ) from error
        if self.color_jitter:
            j = self.color_jitter
            steps.append(T.ColorJitter(j, j, j, j / 10))
        return steps

    @property
    def _method(self) -> str:
        return "bilinear" if self.interpolation == "random" else self.interpolation

    def _grey(self) -> list[Any]:
        from torchvision.transforms import Grayscale

        return [Grayscale()] if len(self.mean) == 1 else []

    @classmethod
    def of(cls, preprocessing: Mapping[str, Any], train: bool = False, **overrides: Any) -> Self:
        """From a backbone's preprocessing: keys `mean`, `std`, `input_size` (C, H, W), `interpolation`, `crop_pct`, `crop_mode`.

        timm's configurations fit as they are; a `test_input_size` beside `input_size` is left alone, as timm does unless it
        is asked for: pass `size=` for it. `overrides` are keywords of the constructor and win.
        """
        keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        known = {k: preprocessing[k] for k in keys if k in preprocessing}
        if "input_size" in preprocessing:
            known["size"] = tuple(preprocessing["input_size"])[-2:]
        return cls(**{**known, "train": train, **overrides})

    def __call__(self, image: ImageLike) -> Tensor:
        if not isinstance(image, Image.Image) or image.mode != "RGB":
            image = load_image(image)
        if not self.train and self.crop_mode == "center":  # the whole picture is resized, long strips to enormous ones
            factor = max(s / self.crop_pct / own for s, own in zip(self.size, (image.height, image.width), strict=True))
            name = f"A picture of {image.width}x{image.height}, resized to cover {self.size[1]}x{self.size[0]},"
            check_size((math.ceil(image.width * factor), math.ceil(image.height * factor)), name)
        try:
            return self._steps(image)
        except ValueError as error:  # a strip whose short side shrinks to nothing
            raise InputError(f"A picture of {image.width}x{image.height} cannot be prepared: {error}") from error

    def __repr__(self) -> str:
        shown = (
            "size",
            "mean",
            "std",
            "interpolation",
            "train",
            *(("scale", "hflip") if self.train else ("crop_pct", "crop_mode")),
            *(name for name in ("auto_augment", "color_jitter", "erase") if self.train and getattr(self, name)),
        )
        return f"ImageTransform({', '.join(f'{k}={getattr(self, k)!r}' for k in shown)})"


class PadEnd:
    """Fill a picture up to (H, W) at the right and below."""

    def __init__(self, size: tuple[int, int], fill: tuple[int, ...]):
        self.size, self.fill = size, fill

    def __call__(self, image: Image.Image) -> Image.Image:
        canvas = Image.new(image.mode, self.size[::-1], self.fill if len(self.fill) > 1 else self.fill[0])
        canvas.paste(image, (0, 0))
        return canvas


def resized(x: Tensor, **options: Any) -> Tensor:
    """`F.interpolate`, bilinear, of maps (B, C, H, W) in any precision: on the CPU torch has none that antialiases half precision.

    Args:
        x: of a floating type, which the answer has too.
        options: `size` or `scale_factor`, and `antialias`.
    """
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.interpolate(work, mode="bilinear", **options).to(x.dtype)
