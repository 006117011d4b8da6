"""How good a segmentation is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import nn

from mmkit.errors import InputError
from mmkit.vision.medical.cases import Case
from mmkit.vision.medical.windows import fitting, sliding_window


def dice(predicted: np.ndarray, truth: np.ndarray, label: int) -> float:
    """Dice overlap of one class in 0..1; 1 when it is absent from both. Pixels whose truth is -1 (`IGNORED`) are left out.

    Raises `InputError` when shapes differ.
    """
    if predicted.shape != truth.shape:
        raise InputError(f"The label map has shape {truth.shape}, the image {predicted.shape}; they must be equal.")
    a, b = (predicted == label) & (truth >= 0), truth == label
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


def confusion(predicted: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """(K, K) counts of pixels: row is the truth, column the answer. Pixels whose truth is -1 (`IGNORED`) are left out."""
    known = truth >= 0
    truth, predicted = truth[known], predicted[known]
    return np.bincount(truth.ravel() * num_classes + predicted.ravel(), minlength=num_classes**2).reshape(
        -1, num_classes
    )


def confusions(model: nn.Module, cases: Iterable[Case], window: Sequence[int]) -> np.ndarray:
    """(N, K, K) `confusion` of each whole case, predicted in windows as the pipeline does."""
    device = next(model.parameters()).device
    found = []
    for image, labels in cases:
        size = fitting(window, image.shape[1:], int(model.multiple))  # type: ignore[arg-type]
        probabilities = sliding_window(model, image.to(device), size, progress=False)
        found.append(confusion(probabilities.argmax(0).cpu().numpy(), labels.cpu().numpy(), len(probabilities)))
    return np.stack(found)


def overlaps(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dice and intersection over union of each class, 0..1, (..., K) each, from counts (..., K, K); NaN where it is nowhere."""
    both, total = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1) + counts.sum(-2)
    with np.errstate(invalid="ignore"):
        return 2 * both / total, both / (total - both)


def mean_dice(counts: np.ndarray) -> np.ndarray:
    """Mean of Dice over the foreground classes that occur, (...), from counts (..., K, K); NaN where none does."""
    found = overlaps(counts)[0][..., 1:]
    with np.errstate(invalid="ignore"):
        return np.nansum(found, -1) / (~np.isnan(found)).sum(-1)


def average_precision(predicted: np.ndarray, truth: np.ndarray, overlap: float = 0.5) -> float:
    """Found objects over found, missed and invented ones, 0..1; 1 when there are none at all.

    An object is found when one predicted object overlaps it by more than `overlap`, intersection over union; at 0.5 and above no two can.
    This is the measure of the 2018 Data Science Bowl at one threshold (AP50 at 0.5).

    Args:
        predicted, truth: object numbers of equal shape, 0 outside, as `split_touching` gives them.
        overlap: 0.5 up to below 1.

    Raises:
        InputError: shapes that differ, or another overlap.
    """
    if predicted.shape != truth.shape:
        raise InputError(f"The truth has shape {truth.shape}, the prediction {predicted.shape}; they must be equal.")
    if not 0.5 <= overlap < 1:
        raise InputError(f"overlap must lie in 0.5..1 (1 excluded), not {overlap}.")
    _, own = np.unique(predicted, return_inverse=True)
    _, theirs = np.unique(truth, return_inverse=True)
    shared = np.zeros((own.max() + 1, theirs.max() + 1))
    np.add.at(shared, (own.ravel(), theirs.ravel()), 1)
    union = shared.sum(1, keepdims=True) + shared.sum(0, keepdims=True) - shared
    rows, columns = np.unique(predicted) > 0, np.unique(truth) > 0
    found = int((shared / union > overlap)[np.ix_(rows, columns)].sum())
    objects = int(rows.sum() + columns.sum()) - found
    return found / objects if objects else 1.0
