"""Which class and which split a file belongs to, read from folders or from a table; the same rules for pictures and clips."""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from mmkit.data.listing import Folder, natural
from mmkit.errors import InputError

Row: TypeAlias = tuple[str, str, str]
"""`(path, class, split)`; the split is "train", "val", "test", or "" when the source has none."""

MAX_TABLE_BYTES = 500_000_000
_SPLIT = re.compile(r"(train|val|test)(?:ing|id|idation)?(?:[-_ ]?(?:set|split|data|images?))?[-_ ]?\d{0,4}")
_OTHER_SPLITS = {"dev": "val", "eval": "val", "evaluation": "val"}
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "filepath")
_LABEL_COLUMNS = ("label", "class", "category", "target", "class_name")


def split_of(name: str) -> str:
    """ "train", "val" or "test" for what people call them (`training`, `valid`, `test_set`, `eval` ...), else ""."""
    match = _SPLIT.fullmatch(name.strip().lower())
    return match[1] if match else _OTHER_SPLITS.get(name.strip().lower(), "")


def class_order(labels: Iterable[str]) -> list[str]:
    """The distinct class names, numbers by value: the order is the same from folders, tables and lists."""
    return sorted(set(labels), key=natural)


def near_twins(class_names: Iterable[str]) -> list[str]:
    """A sentence for each group of class names that differ only in case or in how an accent is encoded."""
    groups: dict[str, list[str]] = {}
    for name in class_names:
        groups.setdefault(unicodedata.normalize("NFKC", name).casefold(), []).append(name)
    return [
        f"the classes {' and '.join(map(repr, group))} differ only in case or accents and are kept apart"
        for group in groups.values()
        if len(group) > 1
    ]


# ------------------------------------------------------------------------------------------------------------ folders


def from_folders(top: Folder, noun: str) -> tuple[list[Row], list[str]]:
    """The rows of a folder with one sub-folder per class, or with split folders that hold such folders.

    Split folders are recognised beside any other folders; those that hold no split are then left out. A class folder named
    like a split ("train", beside "bus" and "car") stays a class as long as it has no class folders of its own.

    Args:
        top: from `list_folder`. noun: what is listed, for messages ("pictures").

    Returns:
        The rows, and a sentence for everything that was left out.

    Raises:
        InputError: nothing that has a class, or `train` and `test` folders without class folders.
    """
    notes = _strangers(top)
    while True:
        full = [folder for folder in top.folders if folder.count()]
        notes += [f"{folder.name!r} holds no {noun}" for folder in top.folders if folder not in full]
        notes += [_loose(top, noun)] if top.files else []
        if len(full) != 1 or full[0].files or split_of(full[0].name):
            break
        top = full[0]  # step into the single folder that archives and downloads add
    rows, left_out = _by_split(full, noun)
    rows = rows or _split_in_classes(full)
    if not rows:
        _refuse_unlabelled_splits(top, full, noun)
        rows = [(path, folder.name, "") for folder in full for path in folder.paths()]
    if not rows:
        what = f"{len(top.files)} {noun} but no sub-folders" if top.files else f"no {noun} in sub-folders"
        raise InputError(
            f"{top.path} holds {what}. Put the {noun} of each class into a sub-folder named after it, "
            f"or list them in an index.csv with the columns path,label.{_sentence(notes)}"
        )
    return rows, notes + left_out


def _by_split(folders: list[Folder], noun: str) -> tuple[list[Row], list[str]]:
    """Rows of split folders with class folders in them; none when there are no such folders."""
    splits = {f.name: split_of(f.name) for f in folders}
    parts = [f for f in folders if splits[f.name] and any(inner.count() for inner in f.folders)]
    if not parts and len(folders) > 1:  # "birds_train", "birds_test": the same classes in each
        splits = {f.name: next(filter(None, map(split_of, re.split(r"[-_ .]+", f.name))), "") for f in folders}
        shared = set.intersection(*({inner.name for inner in f.folders if inner.count()} for f in folders))
        parts = folders if shared and all(splits.values()) and len(set(splits.values())) > 1 else []
    if not parts:
        return [], []
    others = [f for f in folders if f not in parts]
    rows, notes = [], []
    for part in parts:
        rows += [(path, inner.name, splits[part.name]) for inner in part.folders for path in inner.paths()]
        notes += [f"{part.name}/{inner.name} holds no {noun}" for inner in part.folders if not inner.count()]
        notes += [_loose(part, noun)] if part.files else []
    wanted = {label for _, label, _ in rows}
    if not any(split == "train" for _, _, split in rows) and wanted <= {f.name for f in others}:
        rows += [(path, f.name, "train") for f in others for path in f.paths()]  # class folders beside a test/ folder
    else:
        for f in others:
            why = "without classes" if split_of(f.name) else "in no split"
            notes.append(f"{f.name!r} holds {f.count()} {noun} {why}")
    return rows, notes


def _split_in_classes(folders: list[Folder]) -> list[Row]:
    """Rows of class folders that each hold `train`, `test` ... folders; none when there are others."""
    if any(f.files or not all(split_of(inner.name) for inner in f.folders if inner.count()) for f in folders):
        return []
    rows = [(p, f.name, split_of(inner.name)) for f in folders for inner in f.folders for p in inner.paths()]
    return rows if len({split for _, _, split in rows}) > 1 else []


def _refuse_unlabelled_splits(top: Folder, folders: list[Folder], noun: str) -> None:
    """A model must never learn to tell training from test pictures."""
    splits = [split_of(f.name) for f in folders]
    if {"train", "test"} <= set(splits) or (len(splits) > 1 and all(splits)):
        names = ", ".join(f"{f.name}/" for f in folders if split_of(f.name))
        raise InputError(f"{top.path}: {names} hold {noun} but no class folders. Put one folder per class into each.")


def _strangers(top: Folder) -> list[str]:
    """What lies in the folder that is neither a wanted file nor a folder."""
    suffixes: Counter[str] = Counter()
    repeated: list[str] = []
    for folder in top.walk():
        suffixes += folder.others
        repeated += folder.repeated
    notes = [f"{link} leads to a folder that is listed already" for link in repeated]
    if suffixes:
        shown = ", ".join(f"{suffix} {count}" for suffix, count in suffixes.most_common(8))
        notes.append(f"{suffixes.total()} other files ({shown}{', ...' if len(suffixes) > 8 else ''})")
    return notes


def _loose(folder: Folder, noun: str) -> str:
    return f"{len(folder.files)} {noun} lie outside the class folders, such as {os.path.join(folder.path, folder.files[0])}"


def _sentence(notes: Sequence[str]) -> str:
    return f" ({'; '.join(notes)}.)" if notes else ""


# ------------------------------------------------------------------------------------------------------------- tables


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark; raises `InputError` when it cannot be read."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"{path} is no file.")  # a pipe would be waited for
        if os.path.getsize(path) > MAX_TABLE_BYTES:
            raise InputError(f"{path} is larger than {MAX_TABLE_BYTES / 1e6:.0f} MB; split it.")
        content = Path(path).read_bytes()
        wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        return content.decode("utf-16" if wide else "utf-8-sig")
    except (ValueError, OSError) as error:  # not text, or a name that no file can have
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as a UTF-8 text file: {error}") from error


def read_table(path: str | os.PathLike[str]) -> list[list[str]]:
    """The rows of a CSV file with commas, semicolons or tabs, cells stripped, empty rows left out."""
    text = read_text(path)
    first = text.lstrip("\r\n").split("\n", 1)[0]
    separator = max(",;\t", key=first.count)
    try:
        rows = [
            [cell.strip() for cell in row] for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        ]
    except csv.Error as error:
        raise InputError(f"{path} is not a readable CSV file: {error}.") from error
    return [row for row in rows if any(row)]


def from_table(path: Path, suffixes: tuple[str, ...], confined: bool = False) -> tuple[list[Row], list[str]]:
    """The rows of a CSV file with the columns `path,label[,split]`, and a sentence for everything that was left out.

    Args:
        path: of the table; the paths in it are relative to its folder.
        suffixes: a table without a header is recognised by a first cell that ends so.
        confined: refuse paths outside the folder (the table came from a zip).

    Raises:
        InputError: not such a table, cells that are missing, an unknown split, nothing listed.
    """
    table = read_table(path)
    if not table:
        raise InputError(f"{path} is empty; expected the columns path,label.")
    columns = _columns(table[0])
    if columns[0] is None and columns[1] is None and table[0][0].lower().endswith(suffixes):
        columns, table = (0, 1, None), [[], *table]  # no header
    if columns[0] is None or columns[1] is None:
        raise InputError(f"{path} has the columns {table[0][:20]}; expected path,label and optionally split.")
    root = os.path.abspath(path.parent)
    rows: list[Row] = []
    unlabelled = 0
    for number, cells in enumerate(table[1:], start=2):
        name, label, given = ("" if c is None or c >= len(cells) else cells[c] for c in columns)
        split = split_of(given)
        if given and not split:
            raise InputError(f"{path}, row {number}: unknown split {given!r}; use train, val or test.")
        if not label and name and split == "test":
            unlabelled += 1
            continue
        if not name or not label:
            raise InputError(f"{path}, row {number}: path or label is missing.")
        target = os.path.normpath(os.path.join(root, name))
        if confined and not os.path.realpath(target).startswith(os.path.realpath(root) + os.sep):
            raise InputError(f"{path}, row {number}: {name!r} points outside the zip.")
        rows.append((target, label, split))
    if not rows:
        raise InputError(f"{path} lists no pictures.")
    return rows, [f"{unlabelled} test rows of {path} have no label"] if unlabelled else []


def _columns(header: list[str]) -> tuple[int | None, int | None, int | None]:
    """Where path, label and split stand."""
    names = [cell.lower() for cell in header]
    file = next((names.index(n) for n in _PATH_COLUMNS if n in names), None)
    label = next((names.index(n) for n in _LABEL_COLUMNS if n in names), None)
    return file, label, names.index("split") if "split" in names else None
