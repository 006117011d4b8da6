"""Training segmentation networks through `mmkit.fit`: random patches, cross entropy plus soft Dice, Dice per image.

The recipe follows nnU-Net (arXiv 1809.10486) where it matters for small data: a third of the patches is centred on foreground,
the loss is the sum of cross entropy and soft Dice, patches are mirrored.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmkit.data.images import load_image
from mmkit.errors import InputError
from mmkit.vision.medical.pipeline import dice, load_labels, load_volume, normalise, sliding_window

Case = tuple[Tensor, Tensor]
"""One image (C, ...), normalised float32, and its labels (...), int64."""


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


def dice_per_class(model: nn.Module, cases: Sequence[Case], window: Sequence[int], num_classes: int) -> list[float]:
    """Mean Dice over whole images, predicted with the sliding window, for every foreground class."""
    device = next(model.parameters()).device
    model.eval()
    scores = []
    for image, labels in cases:
        mask = sliding_window(model, image.to(device), window, progress=False).argmax(0).cpu().numpy()
        scores.append([dice(mask, labels.numpy(), k) for k in range(1, num_classes)])
    return [float(x) for x in np.mean(scores, 0)]


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


def nuclei_cases(folder: str | os.PathLike[str], split: str) -> list[Case]:
    """Pictures of the 2018 Data Science Bowl (BBBC038, CC0) and their masks, from a folder with `index.csv`.

    The columns `id`, `kind` and `split` ("train" or "test") are read; pictures are RGB, labels 1 inside nuclei. Raises `InputError`
    when the folder or split is missing.
    """
    folder = Path(folder)
    try:
        with open(folder / "index.csv", newline="", encoding="utf-8") as f:
            rows = [row for row in csv.DictReader(f) if row["split"] == split]
    except FileNotFoundError:
        raise InputError(f"{folder} has no index.csv.") from None
    if not rows:
        raise InputError(f"{folder}/index.csv has no rows of split {split!r}.")
    cases = []
    for row in rows:
        picture = np.array(load_image(folder / "images" / f"{row['id']}.png"))
        labels = load_labels(folder / "labels" / f"{row['id']}.png", 2)
        image = normalise(torch.from_numpy(picture).float().permute(2, 0, 1))
        cases.append((image, torch.from_numpy(labels.astype(np.int64))))
    return cases


def hippocampus_cases(folder: str | os.PathLike[str], split: str) -> list[Case]:
    """MRI crops of the Medical Segmentation Decathlon's Task04 and their labels (1 anterior, 2 posterior).

    `folder` holds `images/`, `labels/` and `splits.json` with lists of file names per split. Raises `InputError` when something is
    missing.
    """
    folder = Path(folder)
    try:
        names: list[Any] = json.loads((folder / "splits.json").read_text(encoding="utf-8"))[split]
    except (FileNotFoundError, KeyError) as error:
        raise InputError(f"{folder}/splits.json with a split {split!r} is needed: {error}") from error
    cases = []
    for name in names:
        file = str(name) if str(name).endswith(".nii.gz") else f"{name}.nii.gz"
        volume = load_volume(folder / "images" / file)
        labels = load_labels(folder / "labels" / file, 3)
        cases.append((normalise(torch.from_numpy(volume.data)[None]), torch.from_numpy(labels.astype(np.int64))))
    return cases


def sample_picture(seed: int, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """A drawn fluorescence picture for demos: uint8 (size, size) and its labels (1 inside nuclei)."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    image, labels = np.zeros((size, size)), np.zeros((size, size), np.uint8)
    for _ in range(size // 7):
        inside = _ellipsoid(rng, (size, size), rng.uniform(7, 13, 2)) < 1
        image[inside] = rng.uniform(60, 160)
        labels[inside] = 1
    image = 12 + gaussian_filter(image, 1.5) * (1 + 0.15 * gaussian_filter(rng.normal(size=image.shape), 3) * 10)
    return np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8), labels


def sample_volume(seed: int, size: Sequence[int] = (48, 48, 40)) -> tuple[np.ndarray, np.ndarray]:
    """A drawn volume for demos and training: float32 (X, Y, Z) and labels, 1 in bright and 2 in dark blobs.

    Blobs are ellipsoids of random size and contrast on a sloping, textured background with noise.
    """
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    grid = np.indices(size) / np.reshape(size, (3, 1, 1, 1)) - 0.5
    image = np.tensordot(rng.normal(0, 0.6, 3), grid, 1) + 6 * rng.uniform(0.5, 1) * gaussian_filter(
        rng.normal(size=size), 4
    )
    labels = np.zeros(size, np.uint8)
    for _ in range(rng.integers(3, 8)):
        kind = int(rng.integers(1, 3))
        inside = _ellipsoid(rng, size, rng.uniform(3, 9, 3)) < 1
        inside &= labels == 0
        image[inside] += rng.uniform(0.9, 1.8) * (1 if kind == 1 else -1)
        labels[inside] = kind
    noise = rng.normal(0, rng.uniform(0.2, 0.5), size)
    return (gaussian_filter(image, 0.6) + noise).astype(np.float32), labels


def _ellipsoid(rng: np.random.Generator, size: Sequence[int], radii: np.ndarray) -> np.ndarray:
    """Squared distance from a random centre in units of `radii`."""
    centre = [rng.uniform(0.08 * s, 0.92 * s) for s in size]
    offset = np.indices(size) - np.reshape(centre, (-1, *[1] * len(size)))
    return ((offset / np.reshape(radii, (-1, *[1] * len(size)))) ** 2).sum(0)


def drawn_cases(seeds: Sequence[int]) -> list[Case]:
    """`sample_volume` for each seed, normalised."""
    drawn = (sample_volume(seed) for seed in seeds)
    return [(normalise(torch.from_numpy(x)[None]), torch.from_numpy(y.astype(np.int64))) for x, y in drawn]
