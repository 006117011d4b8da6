"""From prompts to masks: an engine, the picture it has encoded, and the choice among the masks it offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkit.errors import InputError
from mmkit.vision.clicks.engines import Engine
from mmkit.vision.clicks.prompts import Prompt, pad_prompts
from mmkit.vision.clicks.result import Mask


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
    def predict(self, prompts: Sequence[Prompt], previous: Tensor | None = None) -> list[tuple[Mask, Tensor]]:
        """For each prompt the mask with the largest estimated IoU, and its low-resolution logits `(1, h, w)`.

        Args:
            prompts: Q of them.
            previous: such logits `(Q, h, w)` of the masks shown before, or `None`.
        """
        picture = self.require_picture()
        low, iou, upscale = self.engine.predict(self._state, *pad_prompts(prompts), previous)
        best = iou.nan_to_num(0).argmax(dim=1)
        rows = torch.arange(len(low), device=low.device)
        chosen = low[rows, best]
        full = upscale(chosen).cpu().numpy()
        estimates = iou[rows, best].tolist()
        return [
            (Mask(np.ascontiguousarray(full[i]), estimates[i], picture), chosen[i : i + 1]) for i in range(len(low))
        ]
