"""Prompts: what a person points at, checked and in the form engines take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkit.errors import InputError

NEGATIVE, POSITIVE, BOX_A, BOX_B, PADDING = 0, 1, 2, 3, -1
"""Point labels: negative click, positive click, the two corners of a box, and padding."""

POINTS = "points must be pairs (x, y) in pixels"
"""How the refusal of other points begins."""

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels, low before high."""


@dataclass(frozen=True)
class Prompt:
    """Clicks (labels 1 and 0) and a box, checked, in pixels of the picture."""

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    box: Box | None = None

    def rows(self) -> tuple[list[tuple[float, float]], list[int]]:
        """Points and labels as engines take them: box corners first, then clicks."""
        if self.box is None:
            return list(self.points), list(self.labels)
        x0, y0, x1, y1 = self.box
        return [(x0, y0), (x1, y1), *self.points], [BOX_A, BOX_B, *self.labels]


def read_prompt(points: Any, labels: Any, box: Any, size: tuple[int, int]) -> Prompt:
    """What a person gave as a checked prompt: points labelled 2 and 3 become the box, those labelled -1 are dropped.

    Args:
        points: pairs (x, y) in pixels.
        labels: one per point, -1..3; `None` makes all positive clicks.
        box: two opposite corners, or `None`.
        size: width and height of the picture.

    Raises:
        InputError: nothing to predict from, other shapes or labels, a point outside the picture, two boxes, an empty box.
    """
    xy = numbers(points, (2,), POINTS)
    kinds = np.ones(len(xy)) if labels is None else numbers(labels, (), "labels must be one number per point")
    if len(kinds) != len(xy):
        raise InputError(f"{len(xy)} points but {len(kinds)} labels; give one label per point.")
    if not np.isin(kinds, (PADDING, NEGATIVE, POSITIVE, BOX_A, BOX_B)).all():
        raise InputError(f"labels must lie in {{-1, 0, 1, 2, 3}}, found {sorted(set(kinds.tolist()))}.")
    corners, clicks = xy[kinds >= BOX_A], (kinds == POSITIVE) | (kinds == NEGATIVE)
    if len(corners):
        if box is not None or sorted(kinds[kinds >= BOX_A]) != [BOX_A, BOX_B]:
            raise InputError("A box is two points labelled 2 and 3, or `box`, and there can be one only.")
        box = corners.flatten()
    if box is None and not clicks.any():
        raise InputError("A prompt needs at least one point or a box.")
    outside = ~((xy >= 0) & (xy < size)).all(axis=1) & clicks  # true for NaN, too
    if outside.any():
        x, y = xy[outside][0]
        raise InputError(f"({x:g}, {y:g}) lies outside the picture of {size[0]}x{size[1]} pixels.")
    return Prompt(
        tuple((x, y) for x, y in xy[clicks].tolist()),
        tuple(int(k) for k in kinds[clicks]),
        None if box is None else read_box(box, size),
    )


def read_box(corners: Any, size: tuple[int, int]) -> Box:
    """Two opposite corners in a picture of `size` (width, height), low before high; its far edges count as its last pixels.

    Raises `InputError` for other shapes, an empty box, or one that leaves the picture.
    """
    box = numbers(corners, (), "A box must be x0, y0, x1, y1 in pixels")
    if len(box) != 4:
        raise InputError(f"A box must be x0, y0, x1, y1 in pixels, not {corners!r:.80}.")
    low, high = np.minimum(box[:2], box[2:]), np.maximum(box[:2], box[2:])
    if not ((low >= 0) & (high <= size)).all():
        raise InputError(f"The box {box.tolist()} lies outside the picture of {size[0]}x{size[1]} pixels.")
    if (low == high).any():
        raise InputError(f"The box {box.tolist()} is empty; give two opposite corners.")
    last = np.array(size) - 1
    x0, y0, x1, y1 = np.concatenate([np.minimum(low, last), np.minimum(high, last)]).tolist()
    return x0, y0, x1, y1


def pad_prompts(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Q prompts as points `(Q, P, 2)` and labels `(Q, P)`, the shorter ones padded."""
    rows = [prompt.rows() for prompt in prompts]
    longest = max(len(labels) for _, labels in rows)
    points = torch.full((len(rows), longest, 2), -1.0)
    labels = torch.full((len(rows), longest), PADDING)
    for i, (xy, kinds) in enumerate(rows):
        points[i, : len(kinds)] = torch.tensor(xy, dtype=torch.float32)
        labels[i, : len(kinds)] = torch.tensor(kinds)
    return points, labels


def numbers(values: Any, columns: tuple[int, ...], expected: str) -> np.ndarray:
    """`values` as a float array `(n, *columns)`; `InputError` beginning with `expected` when they are none."""
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        array = np.empty(())
    if array.ndim == 0 or (array.size and array.shape[1:] != columns):
        raise InputError(f"{expected}, not {values!r:.80}.")
    return array.reshape(-1, *columns)


def check_prompts(images: Tensor, points: Tensor, labels: Tensor, previous: Tensor | None = None) -> None:
    """Raise `InputError` unless `(B, 3, H, W)`, `(B, Q, P, 2)`, labels `(B, Q, P)` in -1..3 and `(B, Q, s, s)` fit together."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
        raise InputError(f"images must be float (B, 3, H, W) in 0..1, not {images.dtype} {tuple(images.shape)}.")
    if points.ndim != 4 or points.shape[-1] != 2 or points.shape[0] != images.shape[0] or 0 in points.shape:
        raise InputError(f"points must be (B, Q, P, 2) with B={images.shape[0]}, not {tuple(points.shape)}.")
    if labels.shape != points.shape[:-1]:
        raise InputError(f"labels must be {tuple(points.shape[:-1])} to match points, not {tuple(labels.shape)}.")
    if previous is not None and (previous.ndim != 4 or previous.shape[:2] != points.shape[:2]):
        raise InputError(f"previous must be logits {tuple(points.shape[:2])} + (s, s), not {tuple(previous.shape)}.")
    known = sum((labels == value).sum() for value in (PADDING, NEGATIVE, POSITIVE, BOX_A, BOX_B))
    if int(known) != labels.numel():
        raise InputError(f"labels must lie in {{-1, 0, 1, 2, 3}}, found {sorted(set(labels.flatten().tolist()))}.")
