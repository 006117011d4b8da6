"""Training segmentation networks through `mmkit.fit`: random patches, cross entropy plus soft Dice, Dice per image.

The recipe follows nnU-Net (arXiv 1809.10486) where it matters for small data: a third of the patches is centred on foreground,
the loss is the sum of cross entropy and soft Dice, patches are mirrored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
        weights: how often each case is drawn, in any unit; default all alike.
        augment: what else happens to a patch, such as `Microscopy`; default a change of gain and offset.

    Raises:
        InputError: no cases, sizes of image and labels that differ, or other than one weight per case.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        size: Sequence[int],
        length: int,
        foreground: float = 0.33,
        turn: bool = False,
        mirror: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        augment: Callable[[Tensor, Tensor], Case] | None = None,
    ):
        if not cases:
            raise InputError("Patches needs at least one case.")
        for image, labels in cases:
            if image.shape[1:] != labels.shape or labels.dim() != len(size):
                raise InputError(
                    f"Image {tuple(image.shape)} and labels {tuple(labels.shape)} do not fit a {len(size)}D patch."
                )
        if weights is not None and len(weights) != len(cases):
            raise InputError(f"There are {len(weights)} weights for {len(cases)} cases.")
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self.augment = augment or _exposure
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
        drawn = torch.randint(len(self.cases), ()) if self.weights is None else torch.multinomial(self.weights, 1)
        image, labels = self.cases[int(drawn)]
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
        image, labels = self.augment(image, labels)
        return image.contiguous(), labels.contiguous()


def _exposure(image: Tensor, labels: Tensor) -> Case:
    gain, shift = 0.8 + 0.4 * torch.rand(()), 0.2 * torch.randn(())
    return image * gain + shift, labels


class Microscopy:
    """Changes that leave cells cells, for RGB patches (3, H, W) and their labels (H, W).

    Size and angle (labels follow; what lies outside is mirrored in), the mixture of stains, grey pictures, light and dark exchanged,
    contrast, blur and noise.

    Args:
        zoom: the largest factor by which objects grow or shrink.
        stain: standard deviation of the mixture of the three channels.
        invert: share of patches with light and dark exchanged.
    """

    def __init__(self, zoom: float = 1.6, stain: float = 0.12, invert: float = 0.1):
        self.zoom, self.stain, self.invert = zoom, stain, invert

    def __call__(self, image: Tensor, labels: Tensor) -> Case:
        if torch.rand(()) < 0.7:
            image, labels = self._turned(image, labels)
        if torch.rand(()) < 0.8:
            mixture = torch.eye(3) + self.stain * torch.randn(3, 3)
            image = torch.einsum("ij,jhw->ihw", mixture, image) + 0.15 * torch.randn(3, 1, 1)
        if torch.rand(()) < 0.15:
            image = image.mean(0, keepdim=True).expand(3, -1, -1)
        if torch.rand(()) < self.invert:
            image = -image
        if torch.rand(()) < 0.5:
            low, high = image.amin(), image.amax()
            spread = (high - low).clamp(min=1e-3)
            image = ((image - low) / spread) ** torch.exp(0.4 * torch.randn(())) * spread + low
        if torch.rand(()) < 0.15:
            image = F.avg_pool2d(image[None], 3, 1, 1, count_include_pad=False)[0]
        if torch.rand(()) < 0.3:
            image = image + 0.15 * torch.rand(()) * torch.randn_like(image)
        return _exposure(image, labels)

    def _turned(self, image: Tensor, labels: Tensor) -> Case:
        angle, size = 0.8 * (2 * torch.rand(()) - 1), self.zoom ** (2 * torch.rand(()) - 1)
        cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
        zero = torch.zeros(())
        matrix = torch.stack([torch.stack([cos, -sin, zero]), torch.stack([sin, cos, zero])])[None]
        grid = F.affine_grid(matrix, [1, 1, *labels.shape], align_corners=False)
        options: dict[str, Any] = {"padding_mode": "reflection", "align_corners": False}
        image = F.grid_sample(image[None], grid, mode="bilinear", **options)[0]
        return image, F.grid_sample(labels[None, None].float(), grid, mode="nearest", **options)[0, 0].long()
