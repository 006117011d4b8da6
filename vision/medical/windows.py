"""Prediction in overlapping windows weighted by a Gaussian, as nnU-Net does (arXiv 1809.10486)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mmkit.errors import InputError
from mmkit.vision.medical.volumes import MAX_VOXELS


def _starts(size: int, window: int, overlap: float) -> list[int]:
    """Evenly spaced window starts that cover `size` with at least `overlap`."""
    count = 1 + int(np.ceil((size - window) / max(1.0, window * (1 - overlap)))) if size > window else 1
    return [round(x) for x in np.linspace(0, size - window, count)]


def fitting(window: Sequence[int], size: Sequence[int], multiple: int) -> list[int]:
    """The window for an image of `size`: no larger than it needs to be, in steps of `multiple`, of which it has two at least.

    With one step along every axis the deepest level of a network is a single point, which an instance norm refuses.
    """
    return [min(w, max(2, -(-s // multiple)) * multiple) for w, s in zip(window, size, strict=True)]


def _gaussian(window: Sequence[int], device: torch.device) -> Tensor:
    weight = torch.ones(1, device=device)
    for size in window:
        x = torch.arange(size, device=device) - (size - 1) / 2
        weight = weight.unsqueeze(-1) * torch.exp(-0.5 * (x / (size / 8)) ** 2)
    return weight[0].clamp(min=1e-3)


@torch.inference_mode()
def sliding_window(
    model: Callable[[Tensor], Tensor],
    image: Tensor,
    window: Sequence[int],
    *,
    overlap: float = 0.5,
    batch_size: int = 4,
    progress: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Class probabilities of `image`, averaged over overlapping windows with Gaussian weights.

    Args:
        model: (B, C, *window) -> logits (B, K, *window).
        image: (C, *spatial); an axis shorter than the window is padded by repeating the border.
        window: size per axis.
        overlap: of neighbouring windows, 0 up to below 1.
        batch_size: windows per forward pass.
        progress: show a bar with the remaining time when it takes longer than two seconds.
        on_progress: called with (windows done, windows in total); may raise to cancel.

    Returns:
        (K, *spatial) float32 probabilities on the image's device.

    Raises:
        InputError: overlap or batch size out of range, too much padding, or logits that are not finite (half precision overflowed).
    """
    if not 0 <= overlap < 1:
        raise InputError(f"overlap must lie in 0..1 (1 excluded), not {overlap}.")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}.")
    size = list(image.shape[1:])
    margins = [max(0, w - s) for w, s in zip(window, size, strict=True)]
    if image.shape[0] * math.prod(max(w, s) for w, s in zip(window, size, strict=True)) > MAX_VOXELS:
        raise InputError(
            f"An image of {' x '.join(map(str, image.shape))} that is padded to windows of {' x '.join(map(str, window))} has more "
            f"than {MAX_VOXELS / 1e6:.0f} million values. Crop it, or use smaller windows."
        )
    if any(margins):
        image = F.pad(image[None], [m for x in reversed(margins) for m in (0, x)], mode="replicate")[0]
    weight = _gaussian(window, image.device)
    places = list(itertools.product(*(_starts(s, w, overlap) for s, w in zip(image.shape[1:], window, strict=True))))
    cuts = [tuple(slice(a, a + w) for a, w in zip(place, window, strict=True)) for place in places]
    total: Tensor | None = None
    norm = torch.zeros(image.shape[1:], device=image.device)
    done = 0
    with tqdm(total=len(cuts), desc="windows", delay=2, disable=not progress, leave=False) as bar:
        for first in range(0, len(cuts), batch_size):
            part = cuts[first : first + batch_size]
            logits = model(torch.stack([image[(slice(None), *cut)] for cut in part])).float()
            if not torch.isfinite(logits).all():
                raise InputError(
                    "The network's output is not finite: half precision overflowed, or the weights are damaged. Use dtype='float32'."
                )
            total = torch.zeros(logits.shape[1], *image.shape[1:], device=image.device) if total is None else total
            for cut, value in zip(part, logits.softmax(1), strict=True):
                total[(slice(None), *cut)] += value * weight
                norm[cut] += weight
            done += len(part)
            bar.update(len(part))
            if on_progress is not None:
                on_progress(done, len(cuts))
    assert total is not None
    return (total / norm)[(slice(None), *(slice(0, s) for s in size))]
