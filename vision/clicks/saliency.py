"""What needs no network: a saliency map, first clicks from any saliency map, and a random walker that follows clicks.

The map is a plain color-contrast heuristic: pixels that differ from all four borders of the picture, weighted
towards the centre. The clicks follow the idea in the abstract of SqueezeSAM (arXiv 2312.06736); the recipe is ours.
The random walker is Grady's (PAMI 2006), on a coarse grid with the picture's border as a weak background prior.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve

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
    lab = ndimage.gaussian_filter(np.asarray(small.convert("LAB"), np.float64), (1.5, 1.5, 0))
    h, w, _ = lab.shape
    band_y, band_x = max(1, h // 12), max(1, w // 12)
    contrast = []
    for strip in (lab[:band_y], lab[-band_y:], lab[:, :band_x], lab[:, -band_x:]):
        colors = strip.reshape(-1, 3)
        spread = np.linalg.inv(np.cov(colors.T) + 60 * np.eye(3)) if len(colors) > 1 else np.eye(3) / 60
        offset = lab - colors.mean(0)
        contrast.append(np.sqrt(np.einsum("hwi,ij,hwj->hw", offset, spread, offset)))
    contrast.sort(key=np.mean)
    score = np.min(contrast[1:], axis=0)  # the border most like the rest may be the object itself, cut by the frame
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


def random_walker(
    image: np.ndarray,
    points: np.ndarray,
    labels: np.ndarray,
    *,
    side: int = 112,
    beta: float = 120.0,
    prior: float = 0.01,
) -> np.ndarray:
    """Segment by clicks alone: the chance that a walker who avoids edges meets a positive click first.

    Args:
        image: uint8 `(H, W, 3)`.
        points, labels: `(P, 2)` x, y and `(P,)`: 1 positive, 0 negative, 2 and 3 box corners. Outside a box is
            background; a box without a positive click gets one at its centre.
        side: longer side of the grid the system is solved on.
        beta: how much color edges stop the walker.
        prior: pull of the picture's border towards background.

    Returns:
        float32 logits `(H, W)`, positive inside.
    """
    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(image).resize(size, Image.Resampling.BOX).convert("LAB")
    colors = np.asarray(picture, np.float64).reshape(size[1], size[0], 3) / 255
    rows, cols = np.indices(colors.shape[:2])
    inside, outside = np.zeros(rows.shape, bool), np.zeros(rows.shape, bool)
    scaled = (np.asarray(points, np.float64) + 0.5) * [size[0] / width, size[1] / height] - 0.5
    corners = scaled[labels >= 2]
    if len(corners):
        (x0, y0), (x1, y1) = corners.min(0), corners.max(0)
        outside |= (cols < x0 - 0.5) | (cols > x1 + 0.5) | (rows < y0 - 0.5) | (rows > y1 + 0.5)
        if not (labels == 1).any():
            inside |= (cols - (x0 + x1) / 2) ** 2 + (rows - (y0 + y1) / 2) ** 2 <= 2.0
    for (x, y), label in zip(scaled, labels, strict=True):
        if label in (0, 1):
            disk = (cols - x) ** 2 + (rows - y) ** 2 <= 2.0
            (inside if label == 1 else outside)[disk] = True
            (outside if label == 1 else inside)[disk] = False
    if not inside.any():
        return np.full((height, width), -9.0, np.float32)
    index = np.arange(rows.size).reshape(rows.shape)
    pairs = [(index[:, :-1], index[:, 1:]), (index[:-1], index[1:])]
    steps = [np.square(colors[:, 1:] - colors[:, :-1]).sum(-1), np.square(colors[1:] - colors[:-1]).sum(-1)]
    mean = sum(s.sum() for s in steps) / max(1, sum(s.size for s in steps)) + 1e-6
    weights = [np.exp(-beta * s * min(1.0, 0.002 / mean)) + 1e-4 for s in steps]
    a, b = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    w = np.concatenate([v.ravel() for v in weights])
    graph = sparse.coo_matrix((np.r_[w, w], (np.r_[a, b], np.r_[b, a])), shape=(rows.size, rows.size)).tocsr()
    border = (rows == 0) | (cols == 0) | (rows == rows.max()) | (cols == cols.max())
    pull = np.where(inside | outside, 1e3, np.where(border, prior, 1e-6)).ravel()
    system = sparse.diags(np.asarray(graph.sum(1)).ravel() + pull) - graph
    chance = spsolve(system.tocsc(), pull * inside.ravel()).reshape(rows.shape).clip(1e-4, 1 - 1e-4)
    logits = Image.fromarray(np.log(chance / (1 - chance)).astype(np.float32))
    return np.array(logits.resize((width, height), Image.Resampling.BILINEAR))
