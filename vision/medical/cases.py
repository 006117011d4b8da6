"""Images with their label maps: read when they are asked for, with as much kept in memory as is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from mmkit.data.images import load_image
from mmkit.errors import InputError
from mmkit.vision.medical.labels import load_labels
from mmkit.vision.medical.volumes import load_volume, normalize, ras, scale_of

Case = tuple[Tensor, Tensor]
"""One image (C, ...), normalised float32, and its labels (...), int64: 0 is background, -1 (`IGNORED`) does not count."""
Pair = tuple[Path, Path]
"""The files of an image and of its mask."""
KEPT = 1 << 30
"""Bytes of cases that stay in memory: a thousand pictures of 512 x 512. The others are read again whenever they are used."""
_SLAB = (
    1 << 26
)  # larger than what malloc ever takes from the heap, so that it comes from the system and in touched pages only


@dataclass(frozen=True)
class Stored:
    """A case as its files have it, a fifth of the bytes of a `Case` where that is a picture.

    Attributes:
        pixels: (C, ...), uint8 of pictures, float32 of volumes. labels: (...), of any integer type.
        mean, std: what `normalize` takes off the pixels and divides them by; None where they are normalised.
    """

    pixels: Tensor
    labels: Tensor
    mean: float | None = None
    std: float | None = None

    def case(self) -> Case:
        """All of it."""
        return self._normalised(self.pixels), self.labels.long()

    def cut(self, starts: Sequence[int], size: Sequence[int], margin: int = 0) -> Case:
        """A patch; where it reaches beyond the end, the image's border is repeated and the labels are `margin`."""
        place = tuple(slice(a, a + w) for a, w in zip(starts, size, strict=True))
        image, labels = self._normalised(self.pixels[(slice(None), *place)]), self.labels[place].long()
        beyond = [m for s, w in zip(reversed(labels.shape), reversed(size), strict=True) for m in (0, w - s)]
        if any(beyond):
            image = F.pad(image[None], beyond, mode="replicate")[0]
            labels = F.pad(labels, beyond, value=margin)
        return image, labels

    def _normalised(self, pixels: Tensor) -> Tensor:
        return pixels if self.mean is None or self.std is None else (pixels.float() - self.mean) / self.std

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes + self.labels.nbytes


def read_picture(image: Path, mask: Path, num_classes: int, ignore: int | None = None) -> tuple[Tensor, Tensor]:
    """A picture, uint8 RGB (3, H, W) whatever it was, and its labels (H, W).

    Raises `InputError` for what cannot be read or differs in size.
    """
    picture, labels = np.array(load_image(image)), load_labels(mask, num_classes, ignore)
    _same_size(image, picture.shape[:2], mask, labels.shape)
    return torch.from_numpy(picture).permute(2, 0, 1), torch.from_numpy(labels)


def read_volume(image: Path, mask: Path, num_classes: int, ignore: int | None = None) -> tuple[Tensor, Tensor]:
    """A volume, float32 (1, X, Y, Z), and its labels, both turned so that their axes point right, anterior and superior.

    Raises `InputError` for what cannot be read, and for labels of another size or that lie otherwise than the volume.
    """
    volume, truth = load_volume(image), load_volume(mask)
    _same_size(image, volume.data.shape, mask, truth.data.shape)
    if not np.allclose(volume.affine[:3, :3], truth.affine[:3, :3], atol=0.01 * max(volume.spacing)):
        raise InputError(
            f"{mask} lies otherwise in space than {image}: their voxel-to-world matrices differ. Resample it."
        )
    labels = np.ascontiguousarray(ras(load_labels(mask, num_classes, ignore), volume.affine))
    data = np.ascontiguousarray(ras(volume.data, volume.affine))
    return torch.from_numpy(data)[None], torch.from_numpy(labels)


def picture_case(image: Path, mask: Path, num_classes: int, ignore: int | None = None) -> Case:
    """`read_picture`, normalised."""
    pixels, labels = read_picture(image, mask, num_classes, ignore)
    return normalize(pixels.float()), labels.long()


def volume_case(image: Path, mask: Path, num_classes: int, ignore: int | None = None) -> Case:
    """`read_volume`, normalised."""
    pixels, labels = read_volume(image, mask, num_classes, ignore)
    return normalize(pixels), labels.long()


def _same_size(image: Path, size: tuple[int, ...], mask: Path, other: tuple[int, ...]) -> None:
    if size != other:
        shown = [" x ".join(map(str, s)) for s in (size, other)]
        raise InputError(
            f"{image} is {shown[0]} (height first), but {mask} is {shown[1]}. Each mask fits its picture pixel by pixel."
        )


@dataclass(frozen=True)
class Facts:
    """What one look at a case tells: its spatial `shape`, `channels`, `pixels` of each class, `mean` and `std` of its values.

    Plain numbers: a tensor of one number each, kept between pictures that go, would keep megabytes of the heap from being used again.
    """

    shape: tuple[int, ...]
    channels: int
    pixels: tuple[int, ...]
    mean: float
    std: float


class _Shelf:
    """What stays in memory, by the files; `room` is left. It decides nothing of a run, so it has no identity."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.slab = torch.empty(0, dtype=torch.uint8)
        self.stored: dict[Pair, Stored] = {}
        self.facts: dict[Pair, Facts] = {}

    def identity(self) -> str:
        return "memory"

    def keep(self, pair: Pair, case: Stored) -> None:
        """Put a case into memory, if there is room for it."""
        if case.nbytes <= self.room:
            self.room -= case.nbytes
            self.stored[pair] = Stored(self._moved(case.pixels), self._moved(case.labels), case.mean, case.std)

    def _moved(self, tensor: Tensor) -> Tensor:
        """A copy in a large block of its own: left in the heap, it would keep what lies between such copies from being used again."""
        size = -(-tensor.nbytes // 64) * 64
        if size > len(self.slab):
            self.slab = torch.empty(max(_SLAB, size), dtype=torch.uint8)
        place, self.slab = self.slab[: tensor.nbytes], self.slab[size:]
        return (
            place.view(tensor.dtype)
            .as_strided(tensor.shape, tensor.stride(), place.storage_offset() // tensor.itemsize)
            .copy_(tensor)
        )


class Cases(Dataset[Case]):
    """Cases of files. All are read once, here, so that a broken one is named; then they are read when they are asked for.

    The first ones stay in memory as the files have them (pictures as bytes, volumes as float32), up to `kept` bytes; a case that does
    not fit is decoded whenever it is used. What comes out does not depend on it. `Cases[i]` is normalised, see `Case`.

    Args:
        samples: image and mask of each case. volumes: whether they are volumes, and not pictures.
        num_classes: background included. ignore: the number in the masks that does not count, see `load_labels`.

    Raises:
        InputError: what cannot be read, or does not fit.
    """

    def __init__(
        self, samples: Sequence[Pair], volumes: bool, num_classes: int, ignore: int | None = None, kept: int = KEPT
    ) -> None:
        self.samples, self.volumes, self.num_classes, self.ignore = list(samples), volumes, num_classes, ignore
        self._shelf = _Shelf(kept)
        for pair in self.samples:
            self._look(pair)

    def part(self, indices: Sequence[int]) -> Cases:
        """Some of them; what is in memory is shared."""
        found = Cases([], self.volumes, self.num_classes, self.ignore)
        found.samples, found._shelf = [self.samples[i] for i in indices], self._shelf
        return found

    def _read(self, pair: Pair) -> tuple[Tensor, Tensor]:
        return (read_volume if self.volumes else read_picture)(*pair, self.num_classes, self.ignore)

    def _look(self, pair: Pair) -> None:
        pixels, labels = self._read(pair)
        mean, std = scale_of(pixels.float())
        counts = np.bincount(labels[labels >= 0].numpy(), minlength=self.num_classes)
        facts = Facts(tuple(labels.shape), len(pixels), tuple(counts.tolist()), float(mean), float(std))
        self._shelf.facts[pair] = facts
        self._shelf.keep(pair, Stored(pixels, labels, facts.mean, facts.std))

    def stored(self, index: int) -> Stored:
        """A case as its files have it."""
        pair = self.samples[index]
        if pair in self._shelf.stored:
            return self._shelf.stored[pair]
        facts = self._shelf.facts[pair]
        return Stored(*self._read(pair), facts.mean, facts.std)

    @property
    def facts(self) -> list[Facts]:
        """What is known of each case without reading it."""
        return [self._shelf.facts[pair] for pair in self.samples]

    @property
    def pixels(self) -> np.ndarray:
        """(N, K) pixels of each class in each case."""
        return np.array([facts.pixels for facts in self.facts]).reshape(-1, self.num_classes)

    @property
    def ignored(self) -> float:
        """Share of the pixels that do not count, 0..1."""
        every = sum(int(np.prod(facts.shape)) for facts in self.facts)
        return 1 - float(self.pixels.sum()) / every if every else 0.0

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Case]:
        return (self[i] for i in range(len(self)))

    def describe(self, index: int) -> str:
        """The file of the image."""
        return str(self.samples[index][0])

    def __getitem__(self, index: int) -> Case:
        return self.stored(index).case()
