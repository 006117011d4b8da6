"""Saliency without a network, and first clicks from any saliency map.

The map is a plain colour-contrast heuristic: pixels that differ from all four borders of the picture, weighted towards the centre.
The clicks follow the idea in the abstract of SqueezeSAM (arXiv 2312.06736); the recipe is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from mmkit.errors import InputError


@dataclass(frozen=True)
class InitialPrompt:
    """First clicks.

    Attributes:
        points: positive clicks (x, y) in pixels.
        labels: 1 for each.
        box: x0, y0, x1, y1 around what stands out, or `None`.
        confidence: mean saliency at the chosen parts, 0..1; below 0.2 the proposal is a guess at the centre.
    """

    points: tuple[tuple[int, int], ...]
    labels: tuple[int, ...]
    box: tuple[float, float, float, float] | None
    confidence: float


def saliency_map(image: Image.Image, side: int = 128) -> np.ndarray:
    """How much each pixel stands out from the picture's borders: float `(H, W)` in 0..1."""
    scale = side / max(image.size)
    small = image.convert("RGB").resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.BOX)
    lab = np.asarray(small.convert("LAB"), np.float64) if min(small.size) >= 1 else np.zeros((1, 1, 3))
    h, w, _ = lab.shape
    lab = np.stack([ndimage.gaussian_filter(lab[..., c].astype(np.float64), 1.5) for c in range(3)], axis=-1)
    band_y, band_x = max(1, h // 12), max(1, w // 12)
    contrast = []
    for strip in (lab[:band_y], lab[-band_y:], lab[:, :band_x], lab[:, -band_x:]):
        colors = strip.reshape(-1, 3)
        spread = np.linalg.inv(np.cov(colors.T) + 60 * np.eye(3)) if len(colors) > 1 else np.eye(3) / 60
        offset = lab - colors.mean(0)
        contrast.append(np.sqrt(np.einsum("hwi,ij,hwj->hw", offset, spread, offset)))
    contrast.sort(key=np.mean)
    score = np.mean(contrast[:3], axis=0)  # the border that differs most may be the object itself, cut by the frame
    rows, cols = np.indices((h, w))
    center = np.exp(-(((rows / max(h - 1, 1) - 0.5) / 0.33) ** 2 + ((cols / max(w - 1, 1) - 0.5) / 0.33) ** 2) / 2)
    score = ndimage.gaussian_filter(score * center, max(h, w) / 40)
    low, high = score.min(), score.max()
    score = (score - low) / (high - low) if high - low > 1e-6 else np.zeros_like(score)
    full = Image.fromarray(score.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    return np.clip(np.asarray(full), 0, 1)


def initial_prompt(
    saliency: np.ndarray, *, max_parts: int = 1, clicks_per_part: int = 1, with_box: bool = False
) -> InitialPrompt:
    """Clicks at the deepest points of the salient parts.

    Args:
        saliency: `(H, W)` in 0..1; thresholded at max(0.5, twice its mean).
        max_parts: largest connected parts to click; parts under 1 % of the picture are skipped.
        clicks_per_part: clicks in each, each at the greatest depth left after removing a disk of half that depth.
        with_box: also give the bounding box of the parts, 5 % wider on each side.

    Returns:
        The prompt; one click at the centre with confidence 0 if nothing stands out.
    """
    saliency = np.asarray(saliency, np.float32)
    if saliency.ndim != 2 or not saliency.size or not np.isfinite(saliency).all():
        raise InputError(f"A saliency map must be a finite (H, W) array, not {saliency.shape}.")
    height, width = saliency.shape
    parts, count = ndimage.label(saliency > max(0.5, 2 * float(saliency.mean())))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    chosen = [k for k in np.argsort(-sizes, kind="stable")[:max_parts] if sizes[k] > 0.01 * saliency.size]
    if not chosen:
        return InitialPrompt(((width // 2, height // 2),), (1,), None, 0.0)
    points: list[tuple[int, int]] = []
    for k in chosen:
        depth = ndimage.distance_transform_edt(np.pad(parts == k + 1, 1))[1:-1, 1:-1]
        rows, cols = np.indices(depth.shape, sparse=True)
        for _ in range(clicks_per_part):
            top = depth.max()
            if top <= 0:
                break
            y, x = (int(v) for v in np.unravel_index(int(depth.argmax()), depth.shape))
            points.append((x, y))
            depth[(rows - y) ** 2 + (cols - x) ** 2 <= (top / 2) ** 2] = 0
    covered = np.isin(parts, [k + 1 for k in chosen])
    box = None
    if with_box:
        ys, xs = np.nonzero(covered)
        dx, dy = 0.05 * (xs.max() - xs.min() + 1), 0.05 * (ys.max() - ys.min() + 1)
        left, top_ = max(0.0, float(xs.min() - dx)), max(0.0, float(ys.min() - dy))
        box = (left, top_, min(width - 1.0, float(xs.max() + dx)), min(height - 1.0, float(ys.max() + dy)))
    return InitialPrompt(tuple(points), (1,) * len(points), box, float(saliency[covered].mean()))
