"""How often a video classifier is right."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from mmkit.video.transforms import ClipTransform
from mmkit.video.zeroi2v.model import VideoClassifier


@torch.no_grad()
def right_answers(model: VideoClassifier, clips: Iterable[tuple[np.ndarray, int]]) -> np.ndarray:
    """For each clip, uint8 (frames, H, W, 3) with its class, whether the model names it: bool (N,).

    Clips are prepared as the pipeline does: the shorter side to the model's size, its centre.
    """
    prepare = ClipTransform(model.img_size, model.mean, model.std)
    model.eval()
    found = []
    for clip, label in clips:
        frames = torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2)
        found.append(int(model(prepare(frames)[0][None]).argmax()) == label)
    return np.array(found, bool)
