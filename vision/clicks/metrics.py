"""Measuring interactive segmentation as RITM does (arXiv 2102.06583): simulated clicks, number of clicks, IoU after k clicks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from mmkit.errors import InputError


@dataclass(frozen=True)
class Click:
    """A click at pixel column `x`, row `y`; `positive` adds to the mask, otherwise it removes."""

    x: int
    y: int
    positive: bool = True


def next_click(
    target: np.ndarray, prediction: np.ndarray, clicked: Sequence[Click] = (), ignore: np.ndarray | None = None
) -> Click | None:
    """The evaluation click: the point deepest inside the larger error, the first in reading order among equals.

    Args:
        target, prediction: bool `(H, W)`.
        clicked: earlier clicks; their pixels are not clicked again.
        ignore: bool `(H, W)`, pixels that do not count.

    Returns:
        A positive click if the missed area is deeper than the wrong one, else a negative click; `None` without any error left.
    """
    target, prediction = np.asarray(target, bool), np.asarray(prediction, bool)
    if target.shape != prediction.shape or target.ndim != 2:
        raise InputError(f"target {target.shape} and prediction {prediction.shape} must be two masks of one size.")
    counts = np.ones_like(target) if ignore is None else ~np.asarray(ignore, bool)
    depths = [_depth(region & counts, clicked) for region in (target & ~prediction, ~target & prediction)]
    positive = bool(depths[0].max() > depths[1].max())
    depth = depths[0] if positive else depths[1]
    if depth.max() == 0:
        return None
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return Click(int(x), int(y), positive)


def _depth(region: np.ndarray, clicked: Sequence[Click]) -> np.ndarray:
    """Distance to the outside of `region` (beyond the picture is outside), zero at pixels clicked before."""
    depth = np.zeros(region.shape)
    boxes = ndimage.find_objects(region.astype(np.uint8))
    if boxes:  # nothing outside its bounding box can matter
        depth[boxes[0]] = ndimage.distance_transform_edt(np.pad(region[boxes[0]], 1))[1:-1, 1:-1]
    for click in clicked:
        depth[click.y, click.x] = 0
    return depth


def iou(prediction: np.ndarray, target: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """Intersection over union of bool masks over the pixels that are not ignored; two empty masks give 1."""
    counts = True if ignore is None else ~np.asarray(ignore, bool)
    union = ((prediction | target) & counts).sum()
    return float((prediction & target & counts).sum() / union) if union else 1.0


def simulate_clicks(
    predict: Callable[[list[Click]], np.ndarray],
    target: np.ndarray,
    *,
    max_clicks: int = 20,
    min_clicks: int = 1,
    ignore: np.ndarray | None = None,
    stop_at: float | None = None,
) -> list[float]:
    """IoU after each simulated click.

    Args:
        predict: takes all clicks so far, returns a bool mask `(H, W)`.
        target: bool `(H, W)` with at least one pixel.
        max_clicks: when to stop.
        ignore: pixels that do not count.
        stop_at: stop early at this IoU (the list is then shorter), but not before `min_clicks`.

    Returns:
        One IoU per click. Once no pixel is wrong, the remaining entries repeat the last IoU.
    """
    target = np.asarray(target, bool)
    if not target.any():
        raise InputError("The target mask is empty; there is nothing to click.")
    clicks: list[Click] = []
    scores: list[float] = []
    prediction = np.zeros_like(target)
    while len(scores) < max_clicks:
        click = next_click(target, prediction, clicks, ignore)
        if click is None:
            return scores + [scores[-1]] * ((max_clicks if stop_at is None else min_clicks) - len(scores))
        clicks.append(click)
        prediction = np.asarray(predict(clicks), bool)
        scores.append(iou(prediction, target, ignore))
        if stop_at is not None and len(scores) >= min_clicks and max(scores) >= stop_at:
            break
    return scores


def noc(scores: Sequence[Sequence[float]], threshold: float, max_clicks: int = 20) -> tuple[float, int]:
    """Mean number of clicks until `threshold` IoU is reached (failures count `max_clicks`), and the number of failures.

    Args:
        scores: for each object the IoU after each click, as `simulate_clicks` returns it.
    """
    if not scores:
        raise InputError("noc needs at least one object.")
    counts = [next((i for i, s in enumerate(row, 1) if s >= threshold), None) for row in scores]
    return float(np.mean([c or max_clicks for c in counts])), sum(c is None for c in counts)


def miou_at_k(scores: Sequence[Sequence[float]], k: int) -> float:
    """Mean IoU after exactly `k` clicks; a row that stopped early counts with its last value."""
    if not scores or k < 1:
        raise InputError("miou_at_k needs at least one object and k >= 1.")
    return float(np.mean([row[min(k, len(row)) - 1] for row in scores]))
