"""Training segmentation networks through `mmkit.fit`: random patches, cross entropy plus soft Dice, Dice per image.

The recipe follows nnU-Net (arXiv 1809.10486) where it matters for small data: a third of the patches is centred on foreground,
the loss is the sum of cross entropy and soft Dice, patches are mirrored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmkit.errors import InputError
from mmkit.vision.medical.datasets import Case


def dice_ce_loss(logits: Tensor, labels: Tensor, smooth: float = 1e-5) -> Tensor:
    """Cross entropy plus one minus soft Dice over the foreground classes, the batch taken together.

    Args:
        logits: (B, K, ...).
        labels: (B, ...) int64 in 0..K-1.
        smooth: keeps absent classes finite.
    """
    truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)[:, 1:].to(torch.float32)
    guess = logits.float().softmax(1)[:, 1:]
    axes = [0, *range(2, logits.dim())]
    overlap = 2 * (guess * truth).sum(axes)
    soft = (overlap + smooth) / (guess.sum(axes) + truth.sum(axes) + smooth)
    return F.cross_entropy(logits.float(), labels) + 1 - soft.mean()


def segmentation_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """`loss_fn` for `mmkit.fit`: `dice_ce_loss` of a batch (images, labels)."""
    return dice_ce_loss(model(batch[0]), batch[1])


class Patches(Dataset[Case]):
    """Random patches of fixed size from a list of cases, mirrored and, for cubes or squares, turned by 90 degrees.

    Args:
        cases: (image, labels) pairs.
        size: patch size per axis; shorter images are padded (image: repeated border, labels: background).
        length: examples per epoch.
        foreground: share of patches centred on a foreground pixel.
        turn: also swap the first two axes at random; for data without a preferred orientation.
        mirror: axes that may be mirrored (0 is the first spatial axis); default all.

    Raises:
        InputError: no cases, or sizes of image and labels that differ.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        size: Sequence[int],
        length: int,
        foreground: float = 0.33,
        turn: bool = False,
        mirror: Sequence[int] | None = None,
    ):
        if not cases:
            raise InputError("Patches needs at least one case.")
        for image, labels in cases:
            if image.shape[1:] != labels.shape or labels.dim() != len(size):
                raise InputError(
                    f"Image {tuple(image.shape)} and labels {tuple(labels.shape)} do not fit a {len(size)}D patch."
                )
        self.cases = [self._pad(image, labels, size) for image, labels in cases]
        self.size, self.length, self.foreground, self.turn = list(size), length, foreground, turn
        self.mirror = tuple(range(len(size))) if mirror is None else tuple(mirror)

    @staticmethod
    def _pad(image: Tensor, labels: Tensor, size: Sequence[int]) -> Case:
        margins = [m for s, w in zip(reversed(labels.shape), reversed(size), strict=True) for m in (0, max(0, w - s))]
        if any(margins):
            image, labels = F.pad(image[None], margins, mode="replicate")[0], F.pad(labels, margins)
        return image, labels

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Case:
        image, labels = self.cases[int(torch.randint(len(self.cases), ()))]
        starts = [int(torch.randint(s - w + 1, ())) for s, w in zip(labels.shape, self.size, strict=True)]
        if torch.rand(()) < self.foreground:
            places = labels.flatten().nonzero()
            if len(places):
                centre = np.unravel_index(int(places[torch.randint(len(places), ())]), labels.shape)
                limits = zip(centre, self.size, labels.shape, strict=True)
                starts = [min(max(int(c) - w // 2, 0), s - w) for c, w, s in limits]
        cut = tuple(slice(a, a + w) for a, w in zip(starts, self.size, strict=True))
        image, labels = image[(slice(None), *cut)], labels[cut]
        axes = [a for a in self.mirror if torch.rand(()) < 0.5]
        image, labels = image.flip([a + 1 for a in axes]), labels.flip(axes)
        if self.turn and torch.rand(()) < 0.5:
            image, labels = image.transpose(1, 2), labels.transpose(0, 1)
        gain, shift = 0.8 + 0.4 * torch.rand(()), 0.2 * torch.randn(())
        return (image * gain + shift).contiguous(), labels.contiguous()
