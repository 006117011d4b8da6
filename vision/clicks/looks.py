"""Training a `ClickNet` with what ships: a look at the whole, a window around what it found, a closer look, more clicks there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.vision.clicks.clicknet import ClickNet, View
from mmkit.vision.clicks.prompts import BOX_A, PADDING, POSITIVE
from mmkit.vision.clicks.scenes import SceneMaker, stack
from mmkit.vision.clicks.training import multimask_loss, right_clicks, sample_boxes, sample_clicks

GRID = 48
"""Clicks are placed by depths on a grid of this side."""


def two_look_loss(
    model: ClickNet,
    maker: SceneMaker,
    count: int,
    encoder: nn.Module,
    *,
    max_rounds: int = 4,
    box_prob: float = 0.12,
    early_prob: float = 0.25,
    alpha: float = 0.5,
    focal_weight: float = 10.0,
) -> tuple[Tensor, dict[str, float]]:
    """Loss of `count` random scenes: of the first look, and of the second after 0 to `max_rounds - 1` further clicks in it.

    Args:
        model: to train.
        maker: of scenes at the model's size.
        encoder: a copy of the model's encoder, in the precision to train with.
        box_prob: share that starts with a box.
        early_prob: share of the batches whose first look gets several clicks at once.
        alpha, focal_weight: of `focal_dice`.

    Returns:
        The loss, and the IoU of the shown masks: "first" and "second" look, "best" of the second look's masks.
    """
    size, half = model.img_size, model.img_size // 2
    scenes, (framed, target, valid) = maker.batch(count)
    coarse, counted = shrink(target), shrink(valid)
    points, labels = first_prompts(coarse & counted, counted, box_prob)
    if float(torch.rand(())) < early_prob:
        more, kinds = right_clicks(coarse & counted, counted, 4, True)
        points, labels = torch.cat([points, more], 1), torch.cat([labels, kinds], 1)
    points = points * (size / half)
    low, iou = decode(model, encoder, framed, points, labels, None)
    loss, measured = multimask_loss(low, iou, coarse, counted, torch.ones(()), alpha=alpha, focal_weight=focal_weight)
    shown = pick(iou)
    rows = torch.arange(count)
    metrics = {"first": measured[rows, shown].mean().item()}

    boxed = (labels == BOX_A).any(dim=1)
    before = low[rows, shown].detach().float()
    windows = [
        window(before[i], coarse[i] if wide < 0.4 else None, points[i], labels[i], size, bool(boxed[i]))
        for i, wide in enumerate(torch.rand(count).tolist())
    ]
    framed, target, valid = stack([maker.draw(s, w) for s, w in zip(scenes, windows, strict=True)])
    coarse, counted = shrink(target), shrink(valid)
    corner = torch.tensor([w[:2] for w in windows]) * size
    side = torch.tensor([w[2] for w in windows])
    points = torch.where((labels == PADDING)[..., None], -1.0, (points - corner[:, None]) / side[:, None, None])
    previous = framed_mask(before, windows, half).masked_fill(boxed[:, None, None, None], torch.nan)
    with torch.no_grad():
        view = encode(model, encoder, framed)
    for _ in range(int(torch.randint(0, max_rounds, ()))):
        with torch.no_grad():
            low, iou = model.decode(view, points, labels, previous)
        previous = low[rows, pick(iou)][:, None].float()
        style = ("uniform", "ritm", "center")[int(torch.randint(0, 3, ()))]
        prediction = previous[:, 0] > 0
        extra, kind = sample_clicks(prediction, coarse & counted, counted, style=style, grid=GRID)
        points = torch.cat([points, torch.where((kind == PADDING)[:, None], -1.0, extra * (size / half))[:, None]], 1)
        labels = torch.cat([labels, kind[:, None]], 1)
    low, iou = model.decode(view, points, labels, previous)
    second, measured = multimask_loss(low, iou, coarse, counted, torch.ones(()), alpha=alpha, focal_weight=focal_weight)
    metrics |= {"second": measured[rows, pick(iou)].mean().item(), "best": measured.amax(1).mean().item()}
    return loss + second, metrics


def encode(model: ClickNet, encoder: nn.Module, framed: Tensor) -> View:
    """The view in the encoder's precision."""
    return model.encode(framed.to(next(encoder.parameters()).dtype), encoder)


def decode(
    model: ClickNet, encoder: nn.Module, framed: Tensor, points: Tensor, labels: Tensor, previous: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Masks and estimates of one prompt per picture `(N, 4, S, S)`."""
    with torch.no_grad():
        view = encode(model, encoder, framed)
    return model.decode(view, points, labels, previous)


def pick(iou: Tensor) -> Tensor:
    """The mask a user sees: `(N,)`, the one with the largest estimate."""
    return iou.detach().argmax(dim=1)


def shrink(mask: Tensor) -> Tensor:
    """Bool `(N, S, S)` at half the size."""
    return F.avg_pool2d(mask[:, None].float(), 2)[:, 0] >= 0.5


def first_prompts(target: Tensor, valid: Tensor, box_prob: float) -> tuple[Tensor, Tensor]:
    """A click anywhere, deep, or deepest in each target `(N, h, w)`, or a noisy box: points `(N, 2, 2)` and labels `(N, 2)`."""
    empty = torch.zeros_like(target)
    found = [sample_clicks(empty, target, valid, style=style, grid=GRID) for style in ("uniform", "ritm", "center")]
    choice = torch.randint(0, 3, (len(target),))
    spots = torch.stack([points for points, _ in found])[choice, torch.arange(len(target))]
    kind = found[0][1]
    points = torch.stack([spots, torch.full_like(spots, -1.0)], dim=1)
    labels = torch.stack([kind, torch.full_like(kind, PADDING)], dim=1)
    box, corners = sample_boxes(target, max_jitter=6.0)
    use = (torch.rand(len(target)) < box_prob) & (kind == POSITIVE)
    return torch.where(use[:, None, None], box, points), torch.where(use[:, None], corners, labels)


def window(
    logits: Tensor, target: Tensor | None, points: Tensor, labels: Tensor, size: int, boxed: bool
) -> tuple[float, float, float]:
    """A square around the mask and the prompts, with a random margin around the product's: left, top and side as shares.

    Args:
        logits: `(h, w)` of the first look.
        target: bool `(h, w)`, also to be seen whole, as after clicks on what was missed; or `None`.
        points, labels: `(P, 2)` in pixels of the square of `size`, and `(P,)`.
        boxed: the prompt is a box: its mask does not exist yet when the window is chosen.
    """
    mask = torch.zeros_like(logits, dtype=torch.bool) if boxed else logits > 0
    if target is not None:
        mask = mask | target
    spots = torch.cat([mask.nonzero().flip(1) / mask.shape[0], points[labels != PADDING] / size])
    low, high = spots.amin(dim=0), spots.amax(dim=0)
    margin = 1.8 + 0.5 * float(torch.randn(()).clamp(-1, 2))
    side = min(1.0, max(margin * float((high - low).max()), 0.2 + 0.1 * float(torch.rand(()))))
    x0, y0 = (min(max(float(c) - side / 2, 0.0), 1.0 - side) for c in (low + high) / 2)
    return x0, y0, side


def framed_mask(logits: Tensor, windows: list[tuple[float, float, float]], side: int) -> Tensor:
    """Logits `(N, h, w)` of whole scenes in their windows: `(N, 1, side, side)`."""
    x0, y0, size = torch.tensor(windows).unbind(1)
    zero = torch.zeros_like(size)
    theta = torch.stack(
        [torch.stack([size, zero, 2 * x0 + size - 1], 1), torch.stack([zero, size, 2 * y0 + size - 1], 1)], dim=1
    )
    grid = F.affine_grid(theta, [len(logits), 1, side, side], align_corners=False)
    return F.grid_sample(logits[:, None], grid, padding_mode="border", align_corners=False)
