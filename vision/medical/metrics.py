"""How good a segmentation is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from mmkit.errors import InputError
from mmkit.vision.medical.datasets import Case
from mmkit.vision.medical.windows import sliding_window


def dice(predicted: np.ndarray, truth: np.ndarray, label: int) -> float:
    """Dice overlap of one class in 0..1; 1 when it is absent from both. Raises `InputError` when shapes differ."""
    if predicted.shape != truth.shape:
        raise InputError(f"The label map has shape {truth.shape}, the image {predicted.shape}; they must be equal.")
    a, b = predicted == label, truth == label
    total = int(a.sum() + b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


def dice_per_class(model: nn.Module, cases: Sequence[Case], window: Sequence[int], num_classes: int) -> list[float]:
    """Mean Dice over whole images, predicted with the sliding window, for every foreground class."""
    device = next(model.parameters()).device
    model.eval()
    scores = []
    for image, labels in cases:
        mask = sliding_window(model, image.to(device), window, progress=False).argmax(0).cpu().numpy()
        scores.append([dice(mask, labels.numpy(), k) for k in range(1, num_classes)])
    return [float(x) for x in np.mean(scores, 0)]
