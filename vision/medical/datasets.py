"""Cases for training and tests as (image, labels) pairs: folders of images and masks, nuclei, hippocampus, drawn volumes."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkit.data.drawn.scans import sample_volume
from mmkit.data.images import SUFFIXES, load_image, open_image
from mmkit.data.labels import read_text, split_of
from mmkit.data.listing import list_folder
from mmkit.errors import InputError
from mmkit.vision.medical.labels import label_values, load_labels
from mmkit.vision.medical.volumes import VOLUME_SUFFIXES, is_volume, load_volume, normalize, ras

Case = tuple[Tensor, Tensor]
"""One image (C, ...), normalised float32, and its labels (...), int64."""
_UNNAMED = 64  # more classes than this are more likely object numbers, and have to be named


def nuclei_cases(folder: str | os.PathLike[str], split: str) -> list[Case]:
    """Pictures of the 2018 Data Science Bowl (BBBC038, CC0) and their masks, from a folder with `index.csv`.

    The columns `id`, `kind` and `split` ("train" or "test") are read; pictures are RGB, labels 1 inside nuclei. Raises `InputError`
    when the folder or split is missing.
    """
    folder = Path(folder)
    cases = []
    for row in _nuclei_rows(folder, split):
        cases.append(picture_case(folder / "images" / f"{row['id']}.png", folder / "labels" / f"{row['id']}.png", 2))
    return cases


def nuclei_kinds(folder: str | os.PathLike[str], split: str) -> list[str]:
    """What each of `nuclei_cases` is: "fluorescence" or "brightfield_colour"."""
    return [row["kind"] for row in _nuclei_rows(Path(folder), split)]


def nuclei_instances(folder: str | os.PathLike[str], split: str) -> list[np.ndarray]:
    """The single nuclei of each of `nuclei_cases`: int32 (H, W), numbers from 1, 0 outside."""
    folder = Path(folder)
    files = (folder / "labels" / f"{row['id']}.png" for row in _nuclei_rows(folder, split))
    return [np.asarray(open_image(file)).astype(np.int32) for file in files]


def _nuclei_rows(folder: Path, split: str) -> list[dict[str, str]]:
    try:
        with open(folder / "index.csv", newline="", encoding="utf-8") as f:
            rows = [row for row in csv.DictReader(f) if row["split"] == split]
    except FileNotFoundError:
        raise InputError(f"{folder} has no index.csv.") from None
    if not rows:
        raise InputError(f"{folder}/index.csv has no rows of split {split!r}.")
    return rows


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
        cases.append(volume_case(folder / "images" / file, folder / "labels" / file, 3))
    return cases


def picture_case(image: Path, mask: Path, num_classes: int) -> Case:
    """A picture, RGB whatever it was, and its label map. Raises `InputError` for what cannot be read or differs in size."""
    picture, labels = np.array(load_image(image)), load_labels(mask, num_classes)
    _same_size(image, picture.shape[:2], mask, labels.shape)
    return normalize(torch.from_numpy(picture).float().permute(2, 0, 1)), torch.from_numpy(labels.astype(np.int64))


def volume_case(image: Path, mask: Path, num_classes: int) -> Case:
    """A volume and its labels, both turned so that their axes point right, anterior and superior.

    Raises `InputError` for what cannot be read, and for labels of another size or that lie otherwise than the volume.
    """
    volume, truth = load_volume(image), load_volume(mask)
    _same_size(image, volume.data.shape, mask, truth.data.shape)
    if not np.allclose(volume.affine[:3, :3], truth.affine[:3, :3], atol=0.01 * max(volume.spacing)):
        raise InputError(
            f"{mask} lies otherwise in space than {image}: their voxel-to-world matrices differ. Resample it."
        )
    labels = np.ascontiguousarray(ras(load_labels(mask, num_classes), volume.affine).astype(np.int64))
    data = np.ascontiguousarray(ras(volume.data, volume.affine))
    return normalize(torch.from_numpy(data)[None]), torch.from_numpy(labels)


def _same_size(image: Path, size: tuple[int, ...], mask: Path, other: tuple[int, ...]) -> None:
    if size != other:
        shown = [" x ".join(map(str, s)) for s in (size, other)]
        raise InputError(
            f"{image} is {shown[0]} (height first), but {mask} is {shown[1]}. Each mask fits its picture pixel by pixel."
        )


@dataclass(frozen=True)
class Pairs:
    """Pictures or volumes with their masks, as people keep them.

    Attributes:
        train, held: (image, mask) paths; `held` is a folder's own `val/` or `test/`, None without one.
        volumes: whether these are volumes.
        class_names: background first.
    """

    train: list[tuple[Path, Path]]
    held: list[tuple[Path, Path]] | None
    volumes: bool
    class_names: tuple[str, ...]

    def case(self, pair: tuple[Path, Path]) -> Case:
        """One pair, read."""
        return (volume_case if self.volumes else picture_case)(*pair, len(self.class_names))


def find_pairs(folder: str | os.PathLike[str]) -> Pairs:
    """What lies in `images/` and `masks/` (or `labels/`) under the same names; `train/` and `val/` may lie around them or in them.

    `classes.txt` names the classes, one a line, background first; without it they are counted in the masks: 0 and one other value
    are two classes, others are numbers from 0 on.

    Raises:
        InputError: folders or masks that are missing, pictures beside volumes, numbers that are no classes.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InputError(f"{root} is not a folder. Give one that holds images/ and masks/.")
    parts = {split_of(p.name): p for p in sorted(root.iterdir()) if p.is_dir() and split_of(p.name)}
    if "train" in parts:
        found = {split: _matched(part) for split, part in parts.items()}
    else:
        found = {}
        for name, pair in _matched(root).items():
            found.setdefault(split_of(Path(name).parts[0]) if os.sep in name else "", {})[name] = pair
        if "train" not in found or "" in found:
            found = {"train": {name: pair for part in found.values() for name, pair in part.items()}}
    train, held = ([*found.get(split, {}).values()] for split in ("train", "val" if "val" in found else "test"))
    every = [*train, *held]
    kinds = {is_volume(file) for pair in every for file in pair}
    if len(kinds) > 1:
        raise InputError(f"{root} holds pictures and volumes side by side; give each their own folder.")
    return Pairs(train, held or None, kinds.pop(), _class_names(root, [mask for _, mask in every]))


def _matched(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Image and mask by the name they share."""
    images, masks = (
        next((folder / n for n in names if (folder / n).is_dir()), None) for names in (("images",), ("masks", "labels"))
    )
    if images is None or masks is None:
        missing = "images/" if images is None else "masks/ (or labels/)"
        raise InputError(
            f"{folder} holds no {missing}. Put pictures into images/ and their masks into masks/, under the same names."
        )
    found, truth = _by_name(images), _by_name(masks)
    if not found:
        raise InputError(f"{images} holds no pictures and no .nii or .nii.gz volumes.")
    if lonely := [found[name].name for name in found if name not in truth]:
        shown = ", ".join(lonely[:5]) + (", ..." if len(lonely) > 5 else "")
        raise InputError(
            f"{masks} lacks the mask of {len(lonely)} of {len(found)} images: {shown}. It has the name of its image."
        )
    return {name: (path, truth[name]) for name, path in found.items()}


def _by_name(folder: Path) -> dict[str, Path]:
    """The files below `folder` by their path without its ending."""
    found: dict[str, Path] = {}
    for path in map(Path, list_folder(folder, (*SUFFIXES, *VOLUME_SUFFIXES)).paths()):
        inner = str(path.relative_to(folder))
        name = re.sub(r"(\.nii)?\.[^.]+$", "", inner)
        if name in found:
            raise InputError(f"{found[name]} and {path} have the same name; which belongs to the mask is unclear.")
        found[name] = path
    return found


def _class_names(root: Path, masks: Sequence[Path]) -> tuple[str, ...]:
    listed = root / "classes.txt"
    if listed.exists():
        names = [line.strip() for line in read_text(listed).splitlines() if line.strip()]
        if not 2 <= len(names) <= 256:
            raise InputError(
                f"{listed} names {len(names)} classes; 2 to 256 are needed, one a line, the background first."
            )
        if (
            len(names) == 2 and names[0].lower() != "background"
        ):  # else two foreground classes would silently become one
            raise InputError(f"{listed}: of two classes the first is called background, not {names[0]!r}.")
        return tuple(names)
    values = sorted(set().union(*(label_values(mask) for mask in masks)))
    if values == [0]:
        raise InputError(f"The masks of {root} hold nothing but 0, the background.")
    if len(values) > 2 or 0 not in values:
        if values[-1] >= _UNNAMED:
            raise InputError(
                f"The masks of {root} hold {len(values)} numbers up to {values[-1]}. Number the classes 0, 1, 2 ...; no number "
                f'means "ignore" here, 255 neither. Object numbers, or grey borders around one class, become one with a classes.txt of '
                f'the lines "background" and its name; more than {_UNNAMED} classes are named there as well.'
            )
        return ("background", *(f"class {i}" for i in range(1, values[-1] + 1)))
    return ("background", "class 1")


def drawn_cases(seeds: Sequence[int]) -> list[Case]:
    """`sample_volume` for each seed, normalised."""
    drawn = (sample_volume(seed) for seed in seeds)
    return [(normalize(torch.from_numpy(x)[None]), torch.from_numpy(y.astype(np.int64))) for x, y in drawn]
