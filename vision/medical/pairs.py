"""Folders of images and masks, as people keep them and as nnU-Net has them."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmkit.data.images import SUFFIXES
from mmkit.data.labels import read_text, split_of
from mmkit.data.listing import list_folder
from mmkit.errors import InputError
from mmkit.storage.files import expanded
from mmkit.vision.medical.cases import KEPT, Case, Cases, Pair, picture_case, volume_case
from mmkit.vision.medical.labels import label_values
from mmkit.vision.medical.volumes import VOLUME_SUFFIXES, is_volume

_UNNAMED = 64  # more classes than this are more likely object numbers, and have to be named
_VOID = 255  # "ignored" in VOC, Cityscapes, mmsegmentation and many others
_IMAGES, _MASKS = ("images", "imagesTr"), ("masks", "labels", "labelsTr")
_TESTS = ("imagesTs", "labelsTs")
Names = tuple[str, ...]


@dataclass(frozen=True)
class Pairs:
    """Pictures or volumes with their masks, as people keep them.

    Attributes:
        train, held: (image, mask) paths; `held` is a folder's own `val/`, `test/` or `imagesTs/`, None without one.
        volumes: whether these are volumes.
        class_names: background first.
        ignore: the number in the masks that does not count, or None.
    """

    train: list[Pair]
    held: list[Pair] | None
    volumes: bool
    class_names: Names
    ignore: int | None = None

    def case(self, pair: Pair) -> Case:
        """One pair, read; -1 (`IGNORED`) in the labels does not count."""
        return (volume_case if self.volumes else picture_case)(*pair, len(self.class_names), self.ignore)

    def cases(self, kept: int = KEPT) -> Cases:
        """All of them, those to train on first; see `Cases`."""
        return Cases([*self.train, *(self.held or [])], self.volumes, len(self.class_names), self.ignore, kept)


def find_pairs(folder: str | os.PathLike[str]) -> Pairs:
    """What lies in `images/` and `masks/` (or `labels/`) under the same names; `train/` and `val/` may lie around them or in them.

    nnU-Net's folders are known too: `imagesTr/`, `labelsTr/`, `imagesTs/` with `labelsTs/` as what is held back, images called
    `NAME_0000`, and the class names and the "ignore" label of `dataset.json`.

    `classes.txt` names the classes, one a line, background first; without it and `dataset.json` they are counted in the masks: 0 and one
    other value are two classes, others are numbers from 0 on. 255 is ignored where it can mean nothing else: beside three or more classes,
    where it is none, and beside 0 and 1. In masks of 0 and 255 it is the foreground.

    Raises:
        InputError: folders or masks that are missing, pictures beside volumes, numbers that are no classes, several channels.
    """
    root = expanded(folder)
    if not root.is_dir():
        raise InputError(f"{root} is not a folder. Give one that holds images/ and masks/.")
    found = _splits(root)
    train, held = ([*found.get(split, {}).values()] for split in ("train", "val" if "val" in found else "test"))
    every = [*train, *held]
    kinds = {is_volume(file) for pair in every for file in pair}
    if len(kinds) > 1:
        raise InputError(f"{root} holds pictures and volumes side by side; give each their own folder.")
    names, ignore = _class_names(root, [mask for _, mask in every])
    return Pairs(train, held or None, kinds.pop(), names, ignore)


def _splits(root: Path) -> dict[str, dict[str, Pair]]:
    """Split -> name -> image and mask; all is "train" where the folder has no splits."""
    parts = {split_of(p.name): p for p in sorted(root.iterdir()) if p.is_dir() and split_of(p.name)}
    if "train" in parts:
        return {split: _matched(part) for split, part in parts.items()}
    found: dict[str, dict[str, Pair]] = {}
    for name, pair in _matched(root).items():
        found.setdefault(split_of(Path(name).parts[0]) if os.sep in name else "", {})[name] = pair
    if "train" in found and "" not in found:
        return found
    found = {"train": {name: pair for part in found.values() for name, pair in part.items()}}
    if all((root / name).is_dir() for name in _TESTS):  # published test images often come without their masks
        found["test"] = _matched(root, *((name,) for name in _TESTS))
    return found


def _matched(folder: Path, images: Names = _IMAGES, masks: Names = _MASKS) -> dict[str, Pair]:
    """Image and mask by the name they share."""
    first, second = (next((folder / n for n in names if (folder / n).is_dir()), None) for names in (images, masks))
    if first is None or second is None:
        missing = "images/" if first is None else "masks/ (or labels/)"
        raise InputError(
            f"{folder} holds no {missing}. Put pictures into images/ and their masks into masks/, under the same names."
        )
    found, truth = _by_name(first), _by_name(second)
    if not found:
        raise InputError(f"{first} holds no pictures and no .nii or .nii.gz volumes.")
    found = _without_channel(first, found, truth)
    if lonely := [found[name].name for name in found if name not in truth]:
        raise InputError(
            f"{second} lacks the mask of {len(lonely)} of {len(found)} images: {_some(lonely)}. It has the name of its image."
        )
    if unused := [truth[name].name for name in truth if name not in found]:
        warnings.warn(
            f"{len(unused)} of {len(truth)} masks in {second} have no image in {first} and are not used: {_some(unused)}.",
            stacklevel=2,
        )
    return {name: (path, truth[name]) for name, path in found.items()}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


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


def _without_channel(folder: Path, found: dict[str, Path], truth: dict[str, Path]) -> dict[str, Path]:
    """nnU-Net's `NAME_0000` as `NAME`, where the mask is called so."""
    names: dict[str, Path] = {}
    for name, path in found.items():
        match = None if name in truth else re.fullmatch(r"(.+)_(\d{4})", name)
        if match is None or match[1] not in truth:
            names[name] = path
        elif match[2] != "0000":
            raise InputError(
                f"{path} is another channel of the image {match[1]}; images of one file each are trained on. Leave only the files "
                f"..._0000 in {folder}, or give it a copy with the channel you want."
            )
        else:
            names[match[1]] = path
    return names


# ------------------------------------------------------------------------------------------------------------ the classes


def _class_names(root: Path, masks: Sequence[Path]) -> tuple[Names, int | None]:
    """Background first, and the number that is ignored."""
    if (root / "classes.txt").exists():
        names = _listed(root / "classes.txt")
        return names, _void(names, masks)
    if (root / "dataset.json").exists() and (described := _described(root / "dataset.json", masks)) is not None:
        return described
    each = [label_values(mask) for mask in masks]
    values = sorted(set().union(*each))
    if values == [0]:
        raise InputError(f"The masks of {root} hold nothing but 0, the background.")
    if len(values) == 2 and values[0] == 0:
        return ("background", "class 1"), None
    numbers = [v for v in values if v != _VOID] or values
    if numbers[-1] >= _UNNAMED or (_VOID in values and {0, *numbers} != {*range(numbers[-1] + 1)}):
        raise InputError(
            f"The masks of {root} hold {len(values)} numbers up to {values[-1]}. Number the classes 0, 1, 2 ...; beside them 255 means "
            "\"ignored\". Object numbers, or grey borders around one class, become one with a classes.txt of the lines \"background\" and "
            f"its name; more than {_UNNAMED} classes, and classes that no mask holds, are named there as well."
        )  # fmt: skip
    if numbers[-1] == 1 and _VOID in values and not any({1, _VOID} <= {*found} for found in each):
        raise InputError(
            f"Some masks of {root} hold 0 and 1, others 0 and 255, none 1 and 255: whether 255 is the foreground or ignored is unclear. "
            'Save them alike, or, if it is the foreground, write a classes.txt of the lines "background" and its name.'
        )
    return ("background", *(f"class {i}" for i in range(1, numbers[-1] + 1))), _VOID if _VOID in values else None


def _listed(file: Path) -> Names:
    names = tuple(line.strip() for line in read_text(file).splitlines() if line.strip())
    if not 2 <= len(names) <= 256:
        raise InputError(f"{file} names {len(names)} classes; 2 to 256 are needed, one a line, the background first.")
    if len(names) == 2 and names[0].lower() != "background":  # else two foreground classes would silently become one
        raise InputError(f"{file}: of two classes the first is called background, not {names[0]!r}.")
    return names


def _void(names: Names, masks: Sequence[Path]) -> int | None:
    """255, where it is none of the classes that were named."""
    fits = len(names) <= _VOID if len(names) > 2 else _beside_one(masks)
    return _VOID if fits else None


def _beside_one(masks: Iterable[Path]) -> bool:
    """Whether the masks hold 1 and 255, and nothing else but 0: object numbers, colors and grey borders hold more."""
    together = False
    for mask in masks:
        try:
            values = {*label_values(mask)}
        except InputError:
            return False
        if not values <= {0, 1, _VOID}:
            return False
        together |= {1, _VOID} <= values
    return together


def _described(file: Path, masks: Sequence[Path]) -> tuple[Names, int | None] | None:
    """The labels of nnU-Net's dataset.json, either edition's; None where it is another program's file."""
    try:
        content = json.loads(read_text(file))
        labels = content.get("labels") if isinstance(content, dict) else None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged: {error}. Mend it, or name the classes in a classes.txt.") from error
    if not isinstance(labels, dict):
        return None
    first = all(re.fullmatch(r"\d+", str(key)) for key in labels)  # {"1": "liver"}; later {"liver": 1}
    try:
        numbers = {str(v): int(k) for k, v in labels.items()} if first else {k: int(v) for k, v in labels.items()}
    except (TypeError, ValueError):
        raise InputError(
            f"{file}: labels that are regions of several numbers are not known here; give one number to each, or name the classes "
            "in a classes.txt."
        ) from None
    ignore = numbers.pop("ignore", None)
    if len(numbers) < 2 or len(numbers) > 256 or sorted(numbers.values()) != [*range(len(numbers))]:
        raise InputError(
            f"{file}: labels must number the classes 0, 1, 2 ..., 0 the background; found {sorted(numbers.values())[:12]}."
        )
    names = tuple(sorted(numbers, key=lambda name: numbers[name]))
    return names, _void(names, masks) if ignore is None else ignore
