"""From prompts to masks: an engine, the picture it has encoded, and the choice among the masks it offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkit.errors import InputError
from mmkit.vision.clicks.engines import Engine
from mmkit.vision.clicks.prompts import Prompt, pad_prompts
from mmkit.vision.clicks.result import THRESHOLD, Mask

ALIKE = 0.9
"""Two masks that overlap more than this (IoU) are one to a person."""


@dataclass(frozen=True)
class Offer:
    """The masks that an engine has for one prompt, from small to large, alike ones once.

    Attributes:
        low: low-resolution logits `(M, h, w)`.
        iou: estimate of each.
        shown: index of the one to show.
        picture: that they belong to.
        upscale: of the engine.
    """

    low: Tensor
    iou: tuple[float, ...]
    shown: int
    picture: Image.Image
    upscale: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, low: Tensor, iou: Tensor, picture: Image.Image, upscale: Callable[[Tensor], Tensor]) -> Offer:
        """From all masks `(M, h, w)` and their estimates `(M,)`: the one with the largest estimate is shown."""
        order = iou.nan_to_num(0).argsort(descending=True, stable=True).tolist()
        inside = (low > THRESHOLD).flatten(1)
        kept = order[:1]
        for i in order[1:]:
            both, either = (inside[i] & inside[kept]).sum(1), (inside[i] | inside[kept]).sum(1)
            if inside[i].any() and (both <= ALIKE * either).all():
                kept.append(i)
        area = inside.sum(dim=1).tolist()
        kept.sort(key=lambda i: area[i])
        return cls(low[kept], tuple(iou[kept].tolist()), kept.index(order[0]), picture, upscale)

    @torch.inference_mode()
    def mask(self, index: int | None = None) -> Mask:
        """One of them, by default the shown one."""
        index = self.shown if index is None else index
        full = self.upscale(self.low[index : index + 1])[0].cpu().numpy()
        return Mask(np.ascontiguousarray(full), self.iou[index], self.picture)

    def previous(self) -> Tensor:
        """Logits `(1, h, w)` of the shown mask, for the next click."""
        return self.low[self.shown : self.shown + 1]

    def other(self, step: int) -> Offer:
        """The same with a smaller (-1) or larger (1) mask shown. Raises `InputError` when there is none."""
        if not 0 <= self.shown + step < len(self.iou):
            word, click = (
                ("smaller", "on what is too much, to remove it") if step < 0 else ("larger", "on what is missing")
            )
            raise InputError(f"There is no {word} mask for these clicks; click {click}.")
        return replace(self, shown=self.shown + step)


class Predictor:
    """An engine and one encoded picture.

    Attributes:
        engine: see `mmkit.vision.clicks.engines`.
        picture: what `set_picture` was given last, or `None`.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.picture: Image.Image | None = None
        self._state: Any = None

    @torch.inference_mode()
    def set_picture(self, picture: Image.Image) -> None:
        """Encode an RGB picture once, for all prompts to come."""
        self._state = self.engine.encode(picture)
        self.picture = picture

    def require_picture(self) -> Image.Image:
        """The picture; raises `InputError` before `set_picture`."""
        if self.picture is None:
            raise InputError("No picture yet: call set_image first.")
        return self.picture

    @torch.inference_mode()
    def predict(self, prompts: Sequence[Prompt], previous: Tensor | None = None) -> list[Offer]:
        """For each prompt the masks on offer; the one with the largest estimated IoU is to be shown.

        Args:
            prompts: Q of them.
            previous: low-resolution logits `(Q, h, w)` of the masks shown before, or `None`.
        """
        picture = self.require_picture()
        low, iou, upscale = self.engine.predict(self._state, *pad_prompts(prompts), previous)
        return [Offer.of(low[i], iou[i], picture, upscale) for i in range(len(low))]
