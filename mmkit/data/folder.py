"""Labelled pictures from a folder per class, a CSV file or a zip, and splits that are the same everywhere."""

from __future__ import annotations

import atexit
import copy
import glob
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch.utils.data import Dataset

from mmkit.data.archive import MAX_BYTES, MAX_FILES, extract_zip
from mmkit.data.images import MAX_PIXELS, SUFFIXES, load_image
from mmkit.data.labels import Row, class_order, from_folders, from_table, near_twins, split_of
from mmkit.data.listing import Folder, PathList, list_folder, natural
from mmkit.errors import InputError, check_seed
from mmkit.storage import clean, temporary_name
from mmkit.storage.files import absolute, expanded

_INDEX_NAMES = ("index.csv", "labels.csv", "metadata.csv", "data.csv")


@dataclass
class ImageDataset(Dataset[Any]):
    """Pictures with one class each: `dataset[i] -> (image, label)`.

    Attributes:
        paths: the files.
        labels: class index of each file.
        class_names: one per label.
        transform: applied to the upright RGB PIL image; None returns the PIL image itself.
        splits: "train", "val" or "test" for each file when the source says so, else None.
        skipped: `(path, reason)` of the files left out by `on_error="skip"`.
        left_out: a sentence for everything else in the source that was not taken: empty classes, loose pictures, other files.
        max_pixels: larger pictures are refused before they are decoded.
    """

    paths: Sequence[Path]
    labels: list[int]
    class_names: list[str]
    transform: Callable[[Any], Any] | None = None
    splits: list[str] | None = None
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if not isinstance(self.paths, PathList):
            self.paths = PathList(self.paths)

    @property
    def classes(self) -> list[str]:
        """`class_names`, under the name torchvision's data sets use."""
        return self.class_names

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Raises `InputError` naming the file when it cannot be read (any more)."""
        image = load_image(self.paths[index], max_pixels=self.max_pixels)
        return (image if self.transform is None else self.transform(image)), self.labels[index]

    def describe(self, index: int) -> str:
        """The file's path, for messages."""
        return str(self.paths[index])

    def with_transform(self, transform: Callable[[Any], Any] | None) -> Self:
        """A copy that applies `transform`."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def subset(self, indices: Iterable[int]) -> Self:
        """A copy with only these examples, in this order; the classes stay."""
        indices = list(indices)
        other = copy.copy(self)
        names = self.paths.names  # type: ignore[attr-defined]
        other.paths, other.labels = PathList(names[i] for i in indices), [self.labels[i] for i in indices]
        other.splits = None if self.splits is None else [self.splits[i] for i in indices]
        return other

    def split(self, name: str) -> Self:
        """The examples that the source assigns to "train", "val" or "test"; raises `InputError` when it has none."""
        chosen = [i for i, s in enumerate(self.splits or ()) if s == (split_of(name) or name)]
        if not chosen:
            found = sorted(set(self.splits or ())) or "no splits"
            raise InputError(f"The data set has no {name!r} examples; it has {found}.")
        return self.subset(chosen)

    def class_counts(self) -> dict[str, int]:
        """Number of examples by class name."""
        counts = torch.bincount(torch.tensor(self.labels, dtype=torch.long), minlength=len(self.class_names)).tolist()
        return dict(zip(self.class_names, counts, strict=True))


D = TypeVar("D", bound=ImageDataset)


def open_dataset(
    path: str | os.PathLike[str],
    *,
    transform: Callable[[Any], Any] | None = None,
    on_error: str = "raise",
    verify: bool = True,
    min_classes: int = 2,
    extract_to: str | os.PathLike[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    max_files: int = MAX_FILES,
    max_bytes: int = MAX_BYTES,
) -> ImageDataset:
    """Open labelled pictures.

    - A folder with one sub-folder per class; or `train/`, `val/`, `test/` folders (also `training`, `valid`, `test_set` ...)
      that hold them, whatever else lies beside.
    - A CSV file with the columns `path,label[,split]` (other usual names work), paths relative to it; or a folder that holds
      it as `index.csv`, `labels.csv`, `metadata.csv` or `data.csv`.
    - A zip of either.

    Hidden and system files never count. What else is left out is said in one warning and in `dataset.left_out`.

    Args:
        path: the folder, `.csv` or `.zip`.
        transform: see `ImageDataset`.
        on_error: "raise" reports unreadable pictures by path; "skip" leaves them out with a warning and lists them in
            `dataset.skipped`.
        verify: decode every picture once to find the unreadable ones now and not in the middle of a training.
        min_classes: fewer classes are an error.
        extract_to: where a zip is unpacked (a new folder); by default a temporary one, deleted when Python ends.
        max_pixels, max_files, max_bytes: limits of one picture, and of a zip's entries and unpacked size.

    Raises:
        InputError: missing, empty, unlabelled, fewer classes than `min_classes`, unreadable pictures, or an unsafe zip.
    """
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error must be 'raise' or 'skip', not {on_error!r}.")
    source = absolute(path)
    if not os.path.exists(source):
        raise InputError(f"{source} does not exist. Pass a folder with one sub-folder per class, a .csv or a .zip.")
    if source.is_dir():
        rows, notes = _read_folder(source)
    elif source.suffix.lower() == ".zip":
        root, others = _temporary_folder() / "data" if extract_to is None else Path(extract_to), Counter[str]()
        endings = (*SUFFIXES, ".csv")
        extract_zip(source, root, suffixes=endings, max_files=max_files, max_bytes=max_bytes, left_out=others)
        rows, notes = _read_folder(root.absolute(), confined=True)
        notes += [f"{count} other files in the zip ({suffix})" for suffix, count in others.most_common(8)]
    elif source.suffix.lower() in (".csv", ".tsv"):
        rows, notes = from_table(source, SUFFIXES)
    else:
        raise InputError(f"{source} is neither a folder nor a .csv or .zip file.")
    skipped: list[tuple[Path, str]] = []
    if verify:
        skipped = find_unreadable(PathList(row[0] for row in rows), max_pixels=max_pixels)
        _report(skipped, len(rows), source, on_error)
        gone = {str(p) for p, _ in skipped}
        rows = [row for row in rows if row[0] not in gone]
    class_names = class_order(label for _, label, _ in rows)
    if len(class_names) < min_classes:
        found = f"only the class {class_names[0]!r}" if len(class_names) == 1 else f"{len(class_names)} classes"
        raise InputError(f"{source} holds {found}; at least {min_classes} are needed, one sub-folder each.")
    for name in class_names:  # a file's name may be any bytes, what is written about it may not
        if not name.isprintable() and any("\ud800" <= c <= "\udfff" for c in name):
            raise InputError(f"{source}: the class name {name!r} is no UTF-8. Rename the folder.")
    number = {name: i for i, name in enumerate(class_names)}
    splits = [s for _, _, s in rows] if any(s for _, _, s in rows) else None
    if splits is not None:
        if not all(splits):
            missing = next(row[0] for row in rows if not row[2])
            raise InputError(f"{source}: some pictures have a split and others, such as {missing}, have none.")
        trained = {label for _, label, split in rows if split == "train"}
        notes += [f"class {c!r} has no training pictures" for c in class_names if trained and c not in trained]
    notes += near_twins(class_names)
    if notes:
        warnings.warn(f"{source}: {'; '.join(notes)}.", stacklevel=2)
    labels = [number[label] for _, label, _ in rows]
    paths = PathList(path for path, _, _ in rows)
    return ImageDataset(paths, labels, class_names, transform, splits, skipped, notes, max_pixels)


def list_pictures(sources: Iterable[str | os.PathLike[str]]) -> list[tuple[str, Path]]:
    """The pictures that files, folders, wildcards and zips stand for, with what to call each, in the order given.

    Folders and zips are listed with all below them, in natural order and without hidden files; a file is taken at its word,
    whatever its suffix, and also when it is missing, so that whoever reads it says what is wrong with it. Zips are unpacked
    to a temporary folder, deleted when Python ends; their pictures are called "photos.zip/cat.jpg".

    Raises:
        InputError: a folder or zip without pictures, a wildcard that matches nothing, or an unsafe zip.
    """
    found: list[tuple[str, Path]] = []
    for source in sources:
        name = str(expanded(source))
        if os.path.isdir(name):
            here = [(path, Path(path)) for path in list_folder(name, SUFFIXES).paths()]
        elif name.lower().endswith(".zip") and os.path.isfile(name):
            root = extract_zip(name, _temporary_folder() / "pictures", suffixes=SUFFIXES)
            paths = [Path(path) for path in list_folder(root, SUFFIXES).paths()]
            here = [(f"{name}/{path.relative_to(root).as_posix()}", path) for path in paths]
        elif not os.path.lexists(name) and glob.has_magic(name):
            matches = sorted((m for m in glob.glob(name, recursive=True) if not os.path.isdir(m)), key=natural)
            here = [(path, Path(path)) for path in matches if "**" not in name or path.lower().endswith(SUFFIXES)]
        else:
            here = [(name, Path(name))]
        if not here:
            raise InputError(f"{source} holds no pictures. Known suffixes: {', '.join(SUFFIXES)}.")
        found += here
    return found


def find_unreadable(paths: Sequence[Path], *, max_pixels: int = MAX_PIXELS) -> list[tuple[Path, str]]:
    """Decode all pictures (with a bar when it takes long) and return `(path, reason)` of those that fail."""
    from tqdm import tqdm

    def check(path: Path) -> str:
        try:
            load_image(path, max_pixels=max_pixels)
            return ""
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        reasons = list(tqdm(pool.map(check, paths), total=len(paths), desc="checking images", delay=2, leave=False))
    return [(p, r) for p, r in zip(paths, reasons, strict=True) if r]


def _report(bad: list[tuple[Path, str]], total: int, source: Path, on_error: str) -> None:
    if not bad:
        return
    reasons = "\n  ".join(reason for _, reason in bad[:8])
    more = f"\n  and {len(bad) - 8} more" if len(bad) > 8 else ""
    text = f"{len(bad)} of {total} pictures in {source} cannot be used:\n  {reasons}{more}"
    if on_error == "raise":
        raise InputError(f"{text}\nRemove them, or pass on_error='skip'.")
    warnings.warn(f"{text}\nThey are left out.", stacklevel=3)


def split_dataset(dataset: D, val: float = 0.2, seed: int = 0) -> tuple[D, D]:
    """Training and validation parts: the source's own when it has them, else a stratified random split.

    The split depends only on the order of the files (sorted by name), `val` and `seed`: it is the same on every machine.
    Every class with two or more pictures has at least one in each part. A source with "test" but no "val" validates on
    "test".

    Args:
        dataset: what to split.
        val: share for validation, in (0, 1).
        seed: of the shuffle.

    Raises:
        InputError: `val` out of range, or a part would be empty.
    """
    own = set(dataset.splits or ())
    if "train" in own and own & {"val", "test"}:
        return dataset.split("train"), dataset.split("val" if "val" in own else "test")
    if not 0 < val < 1:
        raise InputError(f"val must be a share between 0 and 1, not {val}.")
    first, second = stratified_split(dataset.labels, val, seed)
    if not first or not second:
        raise InputError(
            f"{len(dataset)} pictures in {len(dataset.class_names)} classes are too few to split off {val:.0%}."
        )
    return dataset.subset(first), dataset.subset(second)


def stratified_split(labels: Sequence[int], share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices of two parts, the second with about `share` of each class (at least one of each class of two or more)."""
    first: list[int] = []
    second: list[int] = []
    by_label: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        by_label.setdefault(int(label), []).append(i)
    for label, members in sorted(by_label.items()):
        generator = _generator(seed, label)
        order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        count = min(max(round(len(order) * share), 1), len(order) - 1)
        second += order[:count]
        first += order[count:]
    return sorted(first), sorted(second)


def _generator(seed: int, label: int) -> torch.Generator:
    """Of the shuffle of one class."""
    check_seed(seed)
    return torch.Generator().manual_seed(seed * 1_000_003 + label)


def fold_dataset(dataset: D, fold: int, folds: int, seed: int = 0) -> tuple[D, D]:
    """Training and validation parts of fold `fold` (1 to `folds`) of a stratified cross validation.

    Every picture is in the validation part of exactly one fold; each fold has about as many of each class. A "test" split of the source
    is left out of both; its "train" and "val" pictures are taken together.

    Raises:
        InputError: a fold that does not exist, or a class with fewer pictures than there are folds.
    """
    if folds < 2 or not 1 <= fold <= folds:
        raise InputError(f"There is no fold {fold} of {folds}: give 2 folds or more, counted from 1.")
    kept = [i for i in range(len(dataset)) if dataset.splits is None or dataset.splits[i] != "test"]
    by_label: dict[int, list[int]] = {}
    for i in kept:
        by_label.setdefault(dataset.labels[i], []).append(i)
    held: list[int] = []
    for place, (label, members) in enumerate(sorted(by_label.items())):
        if len(members) < folds:
            name = dataset.class_names[label]
            raise InputError(f"Class {name!r} has {len(members)} pictures, too few for {folds} folds.")
        generator = _generator(seed, label)
        order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        held += order[
            (fold - 1 + place) % folds :: folds
        ]  # so that not all classes give their one more to the same fold
    chosen = set(held)
    return dataset.subset(i for i in kept if i not in chosen), dataset.subset(sorted(held))


def _read_folder(root: Path, confined: bool = False) -> tuple[list[Row], list[str]]:
    """Rows of a folder's index, or else of its class folders; `confined` refuses an index that points outside."""
    top = list_folder(root, SUFFIXES)
    strays: list[InputError] = []
    for index in _indices(top):
        try:
            rows, notes = from_table(index, SUFFIXES, confined)
            if not any(os.path.exists(path) for path, _, _ in rows[:100]):
                raise InputError(f"{index} lists pictures that are not there: {rows[0][0]} does not exist.")
            unlisted = set(top.paths()).difference(path for path, _, _ in rows)
            if unlisted:
                notes.append(f"{len(unlisted)} pictures are not listed in {index.name}, such as {min(unlisted)}")
            return rows, notes
        except InputError as error:
            if index.name == "index.csv":
                raise
            strays.append(error)  # another table of that name is no obstacle where the folders tell the classes
    try:
        rows, notes = from_folders(top, "pictures")
    except InputError as error:
        raise (strays or [error])[0] from None
    return rows, notes + [f"not used as an index: {error}" for error in strays]


def _indices(top: Folder) -> list[Path]:
    """The tables that may list the pictures, also below the single top folder that zip programs add."""
    while True:
        found = [Path(top.path, name) for name in _INDEX_NAMES if os.path.isfile(os.path.join(top.path, name))]
        if found or len(top.folders) != 1 or top.files:
            return found
        top = top.folders[0]


def _temporary_folder() -> Path:
    """A folder that goes with this process; those of killed ones go now."""
    place, owner = Path(tempfile.gettempdir()), os.getpid()
    clean(place)
    folder = place / temporary_name()
    folder.mkdir(mode=0o700)

    def leave() -> None:
        if os.getpid() == owner:  # not in forked data workers
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(leave)
    return folder
