"""Labelled pictures from a folder per class, a CSV file or a zip, and splits that are the same everywhere."""

from __future__ import annotations

import atexit
import copy
import csv
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch.utils.data import Dataset

from mmkit.data.archive import MAX_BYTES, MAX_FILES, extract_zip
from mmkit.data.images import MAX_PIXELS, SUFFIXES, load_image
from mmkit.errors import InputError

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "filepath")
_LABEL_COLUMNS = ("label", "class", "category", "target", "class_name")
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
        max_pixels: larger pictures are refused before they are decoded.
    """

    paths: list[Path]
    labels: list[int]
    class_names: list[str]
    transform: Callable[[Any], Any] | None = None
    splits: list[str] | None = None
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    max_pixels: int = MAX_PIXELS

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
        other.paths, other.labels = [self.paths[i] for i in indices], [self.labels[i] for i in indices]
        other.splits = None if self.splits is None else [self.splits[i] for i in indices]
        return other

    def split(self, name: str) -> Self:
        """The examples that the source assigns to "train", "val" or "test"; raises `InputError` when it has none."""
        chosen = [i for i, s in enumerate(self.splits or ()) if s == _SPLITS.get(name.lower(), name)]
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

    - A folder with one sub-folder per class; or `train/`, `val/`, `test/` folders that hold them.
    - A CSV file with the columns `path,label[,split]` (other usual names work), paths relative to it; or a folder that holds
      it as `index.csv`, `labels.csv`, `metadata.csv` or `data.csv`.
    - A zip of either.

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
    source = Path(path).expanduser()
    if not source.exists():
        raise InputError(f"{source} does not exist. Pass a folder with one sub-folder per class, a .csv or a .zip.")
    root, confined = source, False
    if source.is_file() and source.suffix.lower() == ".zip":
        root = Path(extract_to) if extract_to is not None else _temporary_folder() / "data"
        extract_zip(source, root, suffixes=(*SUFFIXES, ".csv"), max_files=max_files, max_bytes=max_bytes)
        root, confined = _unwrap(root), True
    index = _find_index(root)
    if index is not None:
        rows = _read_csv(index, confined)
    elif root.is_dir():
        rows = _read_folders(root, source)
    else:
        raise InputError(f"{source} is neither a folder nor a .csv or .zip file.")
    skipped: list[tuple[Path, str]] = []
    if verify:
        skipped = find_unreadable([row[0] for row in rows], max_pixels=max_pixels)
        _report(skipped, len(rows), source, on_error)
        gone = {p for p, _ in skipped}
        rows = [row for row in rows if row[0] not in gone]
    classes = sorted({label for _, label, _ in rows}, key=_natural)
    if len(classes) < min_classes:
        found = f"only the class {classes[0]!r}" if len(classes) == 1 else f"{len(classes)} classes"
        raise InputError(f"{source} holds {found}; at least {min_classes} are needed, one sub-folder each.")
    number = {name: i for i, name in enumerate(classes)}
    splits = [s for _, _, s in rows] if any(s for _, _, s in rows) else None
    if splits is not None and not all(splits):
        missing = next(row[0] for row in rows if not row[2])
        raise InputError(f"{source}: some pictures have a split and others, such as {missing}, have none.")
    labels = [number[label] for _, label, _ in rows]
    return ImageDataset([p for p, _, _ in rows], labels, classes, transform, splits, skipped, max_pixels)


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
        generator = torch.Generator().manual_seed(seed * 1_000_003 + label)
        order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        count = min(max(round(len(order) * share), 1), len(order) - 1)
        second += order[:count]
        first += order[count:]
    return sorted(first), sorted(second)


# ------------------------------------------------------------------------------------------------------------ readers

_Row = tuple[Path, str, str]


def _read_folders(root: Path, source: Path) -> list[_Row]:
    """`(file, class, split)` from class folders, or from split folders that hold class folders."""
    folders = _subfolders(root)
    if folders and all(f.name.lower() in _SPLITS for f in folders) and any(_subfolders(f) for f in folders):
        return [
            (p, c, _SPLITS[f.name.lower()]) for f in folders for p, c, _ in _read_folders(f, source) if _subfolders(f)
        ]
    rows = [(p, f.name, "") for f in folders for p in _pictures(f)]
    if not rows:
        loose = sum(1 for p in root.iterdir() if p.suffix.lower() in SUFFIXES)
        what = f"{loose} pictures but no sub-folders" if loose else "no pictures in sub-folders"
        raise InputError(
            f"{source} holds {what}. Put the pictures of each class into a sub-folder named after it, "
            "or add an index.csv with the columns path,label."
        )
    return rows


def _subfolders(folder: Path) -> list[Path]:
    return sorted((f for f in folder.iterdir() if f.is_dir() and not f.name.startswith((".", "__"))), key=_by_name)


def _pictures(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return sorted((p for p in found if not p.name.startswith(".")), key=lambda p: p.relative_to(folder).as_posix())


def _by_name(path: Path) -> Any:
    return _natural(path.name)


def _natural(name: str) -> tuple[Any, ...]:
    """Sort "2" before "10", and otherwise by name."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _find_index(root: Path) -> Path | None:
    if root.is_file():
        return root if root.suffix.lower() in (".csv", ".tsv") else None
    return next((root / n for n in _INDEX_NAMES if (root / n).is_file()), None)


def _read_csv(path: Path, confined: bool) -> list[_Row]:
    """Rows of a CSV; `confined` refuses paths outside its folder (it came from a zip)."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as a UTF-8 CSV file: {error}") from error
    separator = max(",;\t", key=lines[0].count) if lines else ","
    table = [row for row in csv.reader(lines, delimiter=separator) if any(cell.strip() for cell in row)]
    if not table:
        raise InputError(f"{path} is empty; expected the columns path,label.")
    header = [cell.strip().lower() for cell in table[0]]
    file_column = next((header.index(n) for n in _PATH_COLUMNS if n in header), None)
    label_column = next((header.index(n) for n in _LABEL_COLUMNS if n in header), None)
    split_column = header.index("split") if "split" in header else None
    if file_column is None and label_column is None and Path(table[0][0].strip()).suffix.lower() in SUFFIXES:
        file_column, label_column, table = 0, 1, [[], *table]  # no header
    if file_column is None or label_column is None:
        raise InputError(f"{path} has the columns {table[0]}; expected path,label and optionally split.")
    root = path.parent.resolve()
    rows: list[_Row] = []
    for number, row in enumerate(table[1:], start=2):
        columns = (file_column, label_column, *(() if split_column is None else (split_column,)))
        cells = [row[c].strip() if c < len(row) else "" for c in columns]
        if not cells[0] or not cells[1]:
            raise InputError(f"{path}, row {number}: path or label is missing.")
        split = cells[2].lower() if len(cells) > 2 else ""
        if split and split not in _SPLITS:
            raise InputError(f"{path}, row {number}: unknown split {split!r}; use train, val or test.")
        target = root / cells[0]
        if confined and not target.resolve().is_relative_to(root):
            raise InputError(f"{path}, row {number}: {cells[0]!r} points outside the zip.")
        rows.append((target, cells[1], _SPLITS.get(split, "")))
    if not rows:
        raise InputError(f"{path} lists no pictures.")
    return rows


def _unwrap(root: Path) -> Path:
    """Step into the single top folder that zip programs add."""
    while _find_index(root) is None:
        entries = [p for p in root.iterdir() if not p.name.startswith((".", "__"))] if root.is_dir() else []
        if len(entries) != 1 or not entries[0].is_dir() or not (_subfolders(entries[0]) or _find_index(entries[0])):
            break
        root = entries[0]
    return root


def _temporary_folder() -> Path:
    folder, owner = tempfile.mkdtemp(prefix="mmkit-data-"), os.getpid()

    def clean() -> None:
        if os.getpid() == owner:  # not in forked data workers
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(clean)
    return Path(folder)
