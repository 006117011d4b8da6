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
from mmkit.vision.medical.cases import Case, Cases, Stored
from mmkit.vision.medical.labels import IGNORED


def dice_ce_loss(
    logits: Tensor,
    labels: Tensor,
    smooth: float = 1e-5,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy plus one minus soft Dice over the foreground classes, the batch taken together.

    Pixels labelled -1 (`IGNORED`) count in neither part, and get no gradient; where all are, the loss is 0.

    Args:
        logits: (B, K, ...).
        labels: (B, ...) int64 in 0..K-1, or -1.
        smooth: keeps absent classes finite.
        weights: of the classes in the cross entropy, (K,). It stays a mean over the pixels, each by the weight of its class.
        label_smoothing: of the cross entropy: the share of each pixel's target that is spread over all classes, 0..1 (1 excluded).
    """
    logits, known = logits.float(), labels >= 0
    each = F.cross_entropy(
        logits, labels, weight=weights, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum"
    )
    truth = (
        F.one_hot(labels.clamp(min=0), logits.shape[1]).movedim(-1, 1)[:, 1:].to(torch.float32)
    )  # ignored: no foreground
    guess = logits.softmax(1).masked_fill(~known[:, None], 0)[:, 1:]
    axes = [0, *range(2, logits.dim())]
    overlap = 2 * (guess * truth).sum(axes)
    soft = (overlap + smooth) / (guess.sum(axes) + truth.sum(axes) + smooth)
    return each / known.sum().clamp(min=1) + 1 - soft.mean()


def segmentation_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """`loss_fn` for `mmkit.fit`: `dice_ce_loss` of a batch (images, labels)."""
    return dice_ce_loss(model(batch[0]), batch[1])


class SegmentationLoss:
    """`segmentation_loss` that acts on settings of `FitConfig`: `loss_fn` for `mmkit.fit`.

    Args:
        label_smoothing, class_weights: see `dice_ce_loss`.
        cutmix: alpha of CutMix (arXiv 1905.04899), 0 for none: a box of each patch, or of cubes a box in space, comes with its labels from
            another patch of the batch. The labels stay hard, since every pixel has one.
        mixup_prob: share of the batches that are mixed.
    """

    acts_on = ("label_smoothing", "class_weights", "cutmix", "mixup_prob")

    def __init__(
        self,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
    ) -> None:
        self.label_smoothing, self.cutmix, self.mixup_prob = label_smoothing, cutmix, mixup_prob
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        if self.cutmix and torch.rand(()) < self.mixup_prob:
            images, labels = self._pasted(images, labels)
        weights = None if self.class_weights is None else self.class_weights.to(labels.device)
        return dice_ce_loss(model(images), labels, weights=weights, label_smoothing=self.label_smoothing)

    def _pasted(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each patch with a box of the one that mirrors it in the batch; the box takes 1 - lambda of it, lambda ~ Beta."""
        kept = torch.distributions.Beta(self.cutmix, self.cutmix).sample()
        edge = (1 - kept) ** (1 / (labels.dim() - 1))
        box = []
        for size in labels.shape[1:]:
            centre, half = int(torch.randint(size, ())), int(size * edge) / 2
            box.append(slice(max(0, round(centre - half)), min(size, round(centre + half))))
        images, labels = images.clone(), labels.clone()
        images[(slice(None), slice(None), *box)] = images.flip(0)[(slice(None), slice(None), *box)]
        labels[(slice(None), *box)] = labels.flip(0)[(slice(None), *box)]
        return images, labels


class Patches(Dataset[Case]):
    """Random patches of fixed size from a list of cases, mirrored and, for cubes or squares, turned by 90 degrees.

    Args:
        cases: (image, labels) pairs, or `Cases`, of which only what a patch needs is read.
        size: patch size per axis; shorter images are padded (image: repeated border, labels: `margin`).
        length: examples per epoch.
        foreground: share of patches centred on a foreground pixel.
        turn: also swap the first two axes at random; for data without a preferred orientation.
        mirror: axes that may be mirrored (0 is the first spatial axis); default all.
        weights: how often each case is drawn, in any unit; default all alike.
        augment: what else happens to a patch, such as `Microscopy`; default a change of gain and offset.
        balanced: centre every patch on a pixel of a class that is drawn, each as often as any other, background included; `foreground`
            and `weights` have no say then.
        margin: label beyond the end of an image: 0, background, or -1 (`IGNORED`), which is not trained on.

    Raises:
        InputError: no cases, sizes of image and labels that differ, or other than one weight per case.
    """

    acts_on = ("sampling",)

    def __init__(
        self,
        cases: Sequence[Case] | Cases,
        size: Sequence[int],
        length: int,
        foreground: float = 0.33,
        turn: bool = False,
        mirror: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        augment: Callable[[Tensor, Tensor], Case] | None = None,
        balanced: bool = False,
        margin: int = 0,
    ):
        if not len(cases):
            raise InputError("Patches needs at least one case.")
        for image, labels in () if isinstance(cases, Cases) else cases:
            if image.shape[1:] != labels.shape or labels.dim() != len(size):
                raise InputError(
                    f"Image {tuple(image.shape)} and labels {tuple(labels.shape)} do not fit a {len(size)}D patch."
                )
        if weights is not None and len(weights) != len(cases):
            raise InputError(f"There are {len(weights)} weights for {len(cases)} cases.")
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self.augment = augment or _exposure
        self.cases = cases if isinstance(cases, Cases) else list(cases)
        self.size, self.length, self.foreground, self.turn = list(size), length, foreground, turn
        self.mirror = tuple(range(len(size))) if mirror is None else tuple(mirror)
        self.margin = margin
        self.sampling = _holders(self.cases) if balanced else []  # so called: the setting says it, not the data

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Case:
        stored, starts = self._balanced() if self.sampling else self._drawn()
        image, labels = stored.cut(starts, self.size, self.margin)
        axes = [a for a in self.mirror if torch.rand(()) < 0.5]
        image, labels = image.flip([a + 1 for a in axes]), labels.flip(axes)
        if self.turn and torch.rand(()) < 0.5:
            image, labels = image.transpose(1, 2), labels.transpose(0, 1)
        image, labels = self.augment(image, labels)
        return image.contiguous(), labels.contiguous()

    def _drawn(self) -> tuple[Stored, list[int]]:
        """A case, and where the patch starts."""
        drawn = torch.randint(len(self.cases), ()) if self.weights is None else torch.multinomial(self.weights, 1)
        stored = self._stored(int(drawn))
        room = [max(0, s - w) for s, w in zip(stored.labels.shape, self.size, strict=True)]
        starts = [int(torch.randint(r + 1, ())) for r in room]
        if torch.rand(()) < self.foreground:
            starts = self._around(stored.labels, stored.labels > 0, starts)
        return stored, starts

    def _balanced(self) -> tuple[Stored, list[int]]:
        """A class, a case that holds it, and where a patch around a pixel of it starts."""
        label, cases = self.sampling[int(torch.randint(len(self.sampling), ()))]
        stored = self._stored(cases[int(torch.randint(len(cases), ()))])
        return stored, self._around(stored.labels, stored.labels == label, [])

    def _stored(self, index: int) -> Stored:
        return self.cases.stored(index) if isinstance(self.cases, Cases) else Stored(*self.cases[index])

    def _around(self, labels: Tensor, wanted: Tensor, otherwise: list[int]) -> list[int]:
        """Where a patch starts whose centre is one of the `wanted` pixels, as far as the borders let it."""
        places = wanted.flatten().nonzero()
        if not len(places):
            return otherwise
        centre = np.unravel_index(int(places[torch.randint(len(places), ())]), labels.shape)
        limits = zip(centre, self.size, labels.shape, strict=True)
        return [min(max(int(c) - w // 2, 0), max(0, s - w)) for c, w, s in limits]


def _holders(cases: list[Case] | Cases) -> list[tuple[int, list[int]]]:
    """Each class that occurs, with the cases that hold it."""
    if isinstance(cases, Cases):
        return [(k, np.flatnonzero(column).tolist()) for k, column in enumerate(cases.pixels.T) if column.any()]
    held: dict[int, list[int]] = {}
    for i, (_, labels) in enumerate(cases):
        for label in labels[labels >= 0].unique().tolist():
            held.setdefault(label, []).append(i)
    return sorted(held.items())


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
