"""Training a promptable segmenter from simulated clicks: click samplers, target merging, losses, the iterative loop.

Sources: SAM (Kirillov et al., arXiv 2304.02643, appendix A: losses, clicks drawn uniformly from the error region,
rounds without a new click), RITM (Sofiiuk et al., arXiv 2102.06583: clicks deep inside the larger error, only the
last round has gradients), and the SqueezeSAM abstract (arXiv 2312.06736) for whole-object targets and clicks that
miss. Their recipes for the latter two are not published; ours are documented at the functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.errors import InputError
from mmkit.vision.clicks.prompts import BOX_A, BOX_B, NEGATIVE, PADDING, POSITIVE

HELD_CLASSES = (
    "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork",
    "knife", "spoon", "bowl", "cell phone", "book", "teddy bear", "hair drier", "toothbrush", "laptop", "remote",
)  # fmt: skip
"""COCO classes that a person wears or holds (whole-object merging)."""


def distance_transform(mask: Tensor) -> Tensor:
    """Exact Euclidean distance of each true pixel to the nearest false one; the outside of the picture counts as false.

    Args:
        mask: bool `(N, H, W)`.

    Returns:
        float `(N, H, W)`, zero where `mask` is false. Equal to `scipy.ndimage.distance_transform_edt` of the padded
        mask.
    """
    padded = F.pad(mask, (1, 1, 1, 1))
    n, h, w = padded.shape
    rows = torch.arange(h, device=mask.device, dtype=torch.float32).view(1, h, 1)
    last = torch.where(padded, -1e4, rows.expand(n, h, w)).cummax(dim=1).values
    following = -torch.where(padded, -1e4, -rows.expand(n, h, w)).flip(1).cummax(dim=1).values.flip(1)
    column = torch.minimum((rows - last).abs(), (following - rows).abs()).square()  # squared distance within the column
    cols = torch.arange(w, device=mask.device, dtype=torch.float32)
    across = (cols[:, None] - cols).square()  # (from, to)
    best = torch.full_like(column, 1e9)
    for x in range(0, w, 8):  # lower envelope over columns, eight at a time to bound the memory
        best = torch.minimum(best, (column[:, :, x : x + 8, None] + across[x : x + 8]).amin(dim=2))
    return best.sqrt()[:, 1:-1, 1:-1] * mask


def sample_clicks(
    prediction: Tensor, target: Tensor, valid: Tensor, *, style: str = "uniform", grid: int = 96
) -> tuple[Tensor, Tensor]:
    """One corrective click per sample.

    Args:
        prediction, target, valid: bool `(N, H, W)`; pixels that are not valid are never clicked.
        style: "uniform": anywhere in the error region (SAM). "ritm": in the larger of the two error types, deeper
            than half of its greatest depth. "center": its deepest point (the evaluation click, at the resolution of
            `grid`).
        grid: the depth is computed on a grid of at most this many cells per side.

    Returns:
        points `(N, 2)` x, y in pixels, and labels `(N,)`: 1, 0, or -1 (padding) where there is no error.
    """
    if style not in ("uniform", "ritm", "center"):
        raise InputError(f"style must be 'uniform', 'ritm' or 'center', not {style!r}.")
    missed, extra = target & ~prediction & valid, prediction & ~target & valid
    w = target.shape[2]
    if style == "uniform":
        weight = (missed | extra).float()
    else:
        deep_missed, deep_extra = (_depth(region, grid) for region in (missed, extra))
        top = torch.stack([deep_missed.flatten(1).amax(1), deep_extra.flatten(1).amax(1)])
        positive = (top[0] > top[1])[:, None, None]
        depth = torch.where(positive, deep_missed, deep_extra)
        share = 0.5 if style == "ritm" else 0.999
        weight = ((depth > share * depth.flatten(1).amax(1)[:, None, None]) & (missed | extra)).float()
    flat = weight.flatten(1)
    none = flat.sum(dim=1) == 0
    choice = (flat * torch.rand_like(flat)).argmax(dim=1)  # uniform over pixels of equal weight
    points = torch.stack([choice % w, choice // w], dim=-1).float()
    hit = target.flatten(1).gather(1, choice[:, None])[:, 0]
    labels = torch.where(none, PADDING, torch.where(hit, POSITIVE, NEGATIVE))
    return torch.where(none[:, None], -1.0, points), labels


def _depth(region: Tensor, grid: int) -> Tensor:
    """Distance to the border of `region`, computed on a coarser grid for speed."""
    size = region.shape[1:]
    step = max(1, -(-max(size) // grid))
    if step == 1:
        return distance_transform(region)
    coarse = F.avg_pool2d(region[:, None].float(), step, ceil_mode=True, count_include_pad=False)[:, 0] > 0.5
    fine = F.interpolate(distance_transform(coarse)[:, None], scale_factor=step, mode="nearest")[:, 0]
    return (fine[:, : size[0], : size[1]] + 1e-3) * region  # regions thinner than a cell keep a small depth


def sample_boxes(target: Tensor, jitter: float = 0.1, max_jitter: float = 20.0) -> tuple[Tensor, Tensor]:
    """The box of each target `(N, H, W)` with Gaussian corner noise: points `(N, 2, 2)`, labels `(N, 2)` = 2, 3."""
    n, h, w = target.shape
    cols, rows = target.any(dim=1), target.any(dim=2)
    low = torch.stack([cols.float().argmax(1), rows.float().argmax(1)], dim=-1).float()
    high = torch.stack([w - 1 - cols.flip(1).float().argmax(1), h - 1 - rows.flip(1).float().argmax(1)], dim=-1).float()
    side = high - low
    corners = torch.stack([low, high], dim=1)
    noise = (torch.randn_like(corners) * jitter * side[:, None]).clamp(-max_jitter, max_jitter)
    limit = corners.new_tensor([w - 1, h - 1])
    points = torch.minimum((corners + noise).clamp(min=0), limit)
    labels = torch.tensor([BOX_A, BOX_B], device=target.device).expand(n, 2)
    return points, labels


def sample_outliers(target: Tensor, valid: Tensor, near: int = 20) -> tuple[Tensor, Tensor]:
    """A wrong positive click outside each target, half within `near` pixels of it: points `(N, 2)`, labels `(N,)`.

    Our recipe for the noisy saliency clicks the abstract of SqueezeSAM mentions.
    """
    flat = _outside(target, valid, near).flatten(1).float()
    choice = (flat * torch.rand_like(flat)).argmax(dim=1)
    none = flat.sum(dim=1) == 0
    points = torch.stack([choice % target.shape[2], choice // target.shape[2]], dim=-1).float()
    return torch.where(none[:, None], -1.0, points), torch.where(none, PADDING, POSITIVE)


def _outside(target: Tensor, valid: Tensor, near: int) -> Tensor:
    """Valid pixels off each target, for half of the samples only those within `near` pixels of it: bool `(N, H, W)`."""
    side = 2 * near + 1  # one axis after the other: far cheaper than the square window
    grown = F.max_pool2d(target[:, None].float(), (side, 1), stride=1, padding=(near, 0))
    grown = F.max_pool2d(grown, (1, side), stride=1, padding=(0, near))[:, 0] > 0
    anywhere = torch.rand(len(target), 1, 1, device=target.device) < 0.5
    return ~target & valid & (grown | anywhere)


def focal_dice(
    logits: Tensor, target: Tensor, valid: Tensor, *, alpha: float = 0.25, focal_weight: float = 20.0
) -> Tensor:
    """`focal_weight` x focal (gamma 2) + dice (+1 smoothing) of each mask over the valid pixels; the defaults are SAM's.

    Args:
        logits: `(N, M, H, W)`.
        target, valid: `(N, H, W)` in {0, 1}.
        alpha: weight of the object's pixels, against 1 - alpha for the others. At SAM's 0.25 an uncertain pixel ends far below
            0.5, and with little data the first mask of an ambiguous click comes out much too small.

    Returns:
        `(N, M)`.
    """
    logits = logits.float()
    target, valid = target[:, None].float(), valid[:, None].float()
    probability = logits.sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none")
    wrong = probability + target - 2 * probability * target
    balance = alpha * target + (1 - alpha) * (1 - target)
    area = valid.sum(dim=(2, 3)).clamp(min=1)
    focal = (balance * wrong.square() * cross * valid).sum(dim=(2, 3)) / area
    overlap = (probability * target * valid).sum(dim=(2, 3))
    total = ((probability + target) * valid).sum(dim=(2, 3))
    return focal_weight * focal + 1 - (2 * overlap + 1) / (total + 1)


def mask_iou(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """IoU of bool masks over the valid pixels, broadcast over leading axes; two empty masks give 1."""
    inter = (prediction & target & valid).sum(dim=(-2, -1)).float()
    union = ((prediction | target) & valid).sum(dim=(-2, -1)).float()
    return torch.where(union > 0, inter / union.clamp(min=1), 1.0)


def multimask_loss(
    low: Tensor, iou: Tensor, target: Tensor, valid: Tensor, single: Tensor, **weights: float
) -> tuple[Tensor, Tensor]:
    """SAM's multi-mask loss: only the best mask is trained on, the IoU head on all of them.

    Args:
        low: logits `(N, M + 1, s, s)`, entry 0 the single mask.
        iou: predicted IoU `(N, M + 1)`.
        target, valid: bool `(N, H, W)`.
        single: bool `(N,)`: also supervise entry 0 (SAM: with several prompts, which leave no ambiguity; models with
            `single_mask`: always).
        weights: of `focal_dice`.

    Returns:
        The loss, and the measured IoU `(N, M + 1)` of each thresholded mask.
    """
    logits = F.interpolate(low.float(), target.shape[1:], mode="bilinear")
    losses = focal_dice(logits, target, valid, **weights)
    with torch.no_grad():
        measured = mask_iou(logits > 0, target[:, None], valid[:, None])
    loss = losses[:, 1:].amin(dim=1) + single * losses[:, 0]
    regression = (iou.float() - measured).square()
    return (loss + regression[:, 1:].mean(dim=1) + single * regression[:, 0]).mean(), measured


def shown_mask(model: Any, iou: Tensor) -> Tensor:
    """Index `(N,)` of the mask a user sees: entry 0 if the model has a `single_mask`, else the best of `iou` `(N, M + 1)`."""
    if model.single_mask:
        return torch.zeros(len(iou), dtype=torch.long, device=iou.device)
    return iou[:, 1:].argmax(dim=1) + 1


def iterative_loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    max_rounds: int = 4,
    box_prob: float = 0.25,
    idle_prob: float = 0.2,
    outlier_prob: float = 0.1,
    start_clicks: int = 0,
    depth_grid: int = 96,
    alpha: float = 0.25,
    focal_weight: float = 20.0,
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one step with simulated interaction; fits `mmkit.training.fit(loss_fn=iterative_loss)`.

    The first prompt is a noisy box (`box_prob`) or a positive click, with up to `start_clicks` further right clicks; then 0
    to `max_rounds - 1` rounds without gradients, each correcting the previous prediction with a click (or with none,
    `idle_prob`) and feeding its logits back; the last round is trained on. A model without negative clicks gets positive
    corrections only.

    Args:
        model: a `SqueezeSAM`.
        batch: "image" `(N, 3, S, S)` in 0..1, "target" and optionally "valid" bool `(N, S, S)`. S need not be the
            model's size.
        max_rounds: predictions per step, at most.
        outlier_prob: share of samples with one wrong positive click besides at least one right one.
        start_clicks: right clicks a prompt may start with besides the first, so that long sessions are trained without
            their many rounds (RITM); a sample keeps the k-th with probability 0.7^k.
        depth_grid: see `sample_clicks`.
        alpha, focal_weight: see `focal_dice`.

    Returns:
        The loss, and {"iou": IoU of the mask the model would choose, "best": best of its masks}.
    """
    images, target = batch["image"], batch["target"].bool()
    valid = batch["valid"].bool() if "valid" in batch else torch.ones_like(target)
    core: Any = getattr(model, "module", model)
    points, labels = _first_prompts(target & valid, valid, box_prob, depth_grid)
    if start_clicks:
        more, kinds = right_clicks(target & valid, valid, start_clicks, core.negative_clicks)
        points, labels = torch.cat([points, more], dim=1), torch.cat([labels, kinds], dim=1)
    rounds = int(torch.randint(0, max_rounds, ()))
    previous = None
    for _ in range(rounds):
        with torch.no_grad():
            low, iou = core.forward_low_res(images, points[:, None], labels[:, None], previous)
        chosen = shown_mask(core, iou[:, 0])
        previous = low[torch.arange(len(low)), 0, chosen][:, None].float()
        prediction = F.interpolate(previous, target.shape[1:], mode="bilinear")[:, 0] > 0
        style = ("uniform", "ritm", "center")[int(torch.randint(0, 3, ()))]
        extra, kind = sample_clicks(prediction, target, valid, style=style, grid=depth_grid)
        idle = torch.rand(len(extra), device=extra.device) < idle_prob
        if not core.negative_clicks:
            idle |= kind == NEGATIVE
        kind = kind.masked_fill(idle, PADDING)
        points = torch.cat([points, torch.where(idle[:, None], -1.0, extra)[:, None]], dim=1)
        labels = torch.cat([labels, kind[:, None]], dim=1)
    if rounds and float(torch.rand(())) < 0.5:
        previous = None  # a user may also come back with clicks only
    if outlier_prob > 0:
        extra, kind = sample_outliers(target, valid)
        keep = (torch.rand(len(extra), device=extra.device) < outlier_prob) & ((labels == POSITIVE).sum(1) > 0)
        points = torch.cat([points, torch.where(keep[:, None], extra, -1.0)[:, None]], dim=1)
        labels = torch.cat([labels, torch.where(keep, kind, PADDING)[:, None]], dim=1)
    low, iou = core.forward_low_res(images, points[:, None], labels[:, None], previous)
    low, iou = low[:, 0], iou[:, 0]
    single = ((labels >= 0).sum(dim=1) > 1) | core.single_mask
    loss, measured = multimask_loss(low, iou, target, valid, single, alpha=alpha, focal_weight=focal_weight)
    chosen = shown_mask(core, iou)[:, None]
    metrics = {"iou": measured.gather(1, chosen).mean().item(), "best": measured.amax(1).mean().item()}
    return loss, metrics


def _first_prompts(target: Tensor, valid: Tensor, box_prob: float, grid: int) -> tuple[Tensor, Tensor]:
    """A box in the first two places, or one click (uniform or central, half and half) and padding."""
    empty = torch.zeros_like(target)
    uniform, kind = sample_clicks(empty, target, valid, style="uniform")
    central, _ = sample_clicks(empty, target, valid, style="ritm", grid=grid)
    half = torch.rand(len(target), 1, device=target.device) < 0.5
    click = torch.stack([torch.where(half, uniform, central), torch.full_like(uniform, -1.0)], dim=1)
    kinds = torch.stack([kind, torch.full_like(kind, PADDING)], dim=1)
    box, corners = sample_boxes(target)
    use_box = (torch.rand(len(target), device=target.device) < box_prob) & (kind >= 0)
    return torch.where(use_box[:, None, None], box, click), torch.where(use_box[:, None], corners, kinds)


def right_clicks(target: Tensor, valid: Tensor, count: int, negatives: bool) -> tuple[Tensor, Tensor]:
    """Up to `count` different clicks: anywhere in each target, or (half of them, if `negatives`) outside it.

    Returns points `(N, count, 2)` and labels `(N, count)`; the k-th is kept with probability 0.7^k, else padding.
    """
    n, w, device = len(target), target.shape[2], target.device
    inside = target.flatten(1).float()
    outside = _outside(target, valid, 20).flatten(1).float()
    outside = outside if negatives else torch.zeros_like(outside)
    shares = torch.stack([inside, outside]) * torch.rand(2, *inside.shape, device=device)
    keys, places = shares.topk(count, dim=2)
    swap = (torch.rand(n, count, device=device) < 0.5) & negatives
    keys, place = (torch.where(swap, x[1], x[0]) for x in (keys, places))
    keep = (keys > 0) & (torch.rand(n, count, device=device) < 0.7 ** torch.arange(1, count + 1, device=device))
    points = torch.stack([place % w, place // w], dim=-1).float()
    labels = torch.where(keep, torch.where(swap, NEGATIVE, POSITIVE), PADDING)
    return torch.where(keep[..., None], points, -1.0), labels


def whole_object_parents(masks: Sequence[np.ndarray]) -> list[int]:
    """For each mask the index of the largest mask that contains it, or its own index.

    A part belongs to a whole when more than 90 % of it lies inside, it is smaller than 80 % of the whole, and the
    whole covers less than 90 % of the picture (our reading of "whole-object augmentation"). The click stays in the
    part.
    """
    areas = [int(m.sum()) for m in masks]
    parents = []
    for i, part in enumerate(masks):
        wholes = [
            j
            for j, whole in enumerate(masks)
            if j != i
            and areas[i] < 0.8 * areas[j]
            and areas[j] < 0.9 * part.size
            and (part & whole).sum() > 0.9 * max(areas[i], 1)
        ]
        parents.append(max(wholes, key=lambda j: areas[j], default=i))
    return parents


def merge_held_objects(
    masks: Sequence[np.ndarray], class_names: Sequence[str], *, reach: int = 5, contact: float = 0.02
) -> list[tuple[int, ...]]:
    """For each person the indices of the person and of the held objects that touch them.

    An object of `HELD_CLASSES` is held when its mask, grown by `reach` pixels, covers at least `contact` of the
    outline of the person. Others are not returned.
    """
    grids = [torch.as_tensor(np.asarray(m, dtype=np.float32))[None, None] for m in masks]
    grown = {
        j: F.max_pool2d(grids[j], 2 * reach + 1, stride=1, padding=reach) > 0
        for j, name in enumerate(class_names)
        if name in HELD_CLASSES
    }
    groups = []
    for i, name in enumerate(class_names):
        if name == "person":
            outline = (grids[i] > 0) & (F.max_pool2d(1 - grids[i], 3, stride=1, padding=1) > 0)
            touching = [j for j in grown if (grown[j] & outline).sum() >= contact * max(int(outline.sum()), 1)]
            groups.append((i, *touching))
    return groups


def close_small_holes(mask: np.ndarray, share: float = 0.005) -> np.ndarray:
    """`mask` with enclosed holes smaller than `share` of its area filled."""
    from scipy import ndimage

    holes, count = ndimage.label(~mask)
    if not count:
        return mask
    sizes = np.bincount(holes.ravel())
    border = np.unique(np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]]))
    small = [k for k in range(1, count + 1) if k not in border and sizes[k] < share * mask.sum()]
    return mask | np.isin(holes, small)
