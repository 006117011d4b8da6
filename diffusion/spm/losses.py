"""What an eraser is trained on: the erasing loss, latent anchoring, and the anchors. arXiv 2312.16145, arXiv 2303.07345 (ESD)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def erasing_loss(target: Tensor, positive: Tensor, neutral: Tensor, guidance_scale: float = 1.0) -> Tensor:
    """Mean squared distance of the erased model's answer from the neutral one, pushed away from the concept.

    Args:
        target: the trained model's answer to the concept.
        positive, neutral: the frozen model's answers to the concept and to what takes its place (the empty prompt, a surrogate).
        guidance_scale: s of `neutral - s (positive - neutral)`; 0 only maps the concept onto the neutral answer.
    """
    return F.mse_loss(target, neutral - guidance_scale * (positive - neutral))


def anchoring_loss(anchors: Tensor, frozen: Tensor) -> Tensor:
    """Mean squared change of the answers to anchors: what must stay as it is."""
    return F.mse_loss(anchors, frozen)


def gaussian_anchors(target: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random embeddings (count, ...) of about the length of `target` (...), rather far from it.

    The official code draws a direction, keeps it with probability `1 - cosine` and gives it 0.8 to 1.2 times the length.
    """
    flat = target.detach().float().flatten().cpu()
    length = flat.norm()
    found: list[Tensor] = []
    while len(found) < count:
        g = torch.randn(flat.shape, generator=generator)
        g = g / g.norm()
        draw, stretch = torch.rand(2, generator=generator).tolist()
        if draw < 1 - float(g @ flat / length.clamp_min(1e-12)):
            found.append(g * length * (0.8 + 0.4 * stretch))
    return torch.stack(found).view(count, *target.shape).to(target)
