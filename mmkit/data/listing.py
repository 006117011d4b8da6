"""One way to list the files of a folder: hidden and system files never count, order is natural, links are followed once."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from mmkit.errors import InputError

_SYSTEM = {
    *("__macosx", "__pycache__", "@eadir", "@tmp", "#recycle", "@recycle", "#snapshot", "$recycle.bin", "lost+found"),
    *(
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "system volume information",
        "network trash folder",
        "temporary items",
    ),
}
_DIGITS = re.compile("[0-9]+")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is the system's and not a person's: `.thumbnails`, `._x`, `@eaDir`, `__MACOSX`."""
    return name.startswith(".") or name.lower() in _SYSTEM


def natural(name: str) -> tuple[str, str]:
    """Key that sorts "2" before "10" and "frame 9" before "frame 10"; otherwise by code point."""
    return _DIGITS.sub(lambda m: m[0].lstrip("0").zfill(20), name), name


class PathList(Sequence[Path]):
    """Many paths, kept as strings: an item becomes a `Path` when it is asked for (making 50,000 takes a third of a second)."""

    def __init__(self, names: Iterable[str | os.PathLike[str]]) -> None:
        self.names = [os.fspath(name) for name in names]

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> PathList: ...

    def __getitem__(self, index: int | slice) -> Path | PathList:
        return PathList(self.names[index]) if isinstance(index, slice) else Path(self.names[index])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PathList):
            return self.names == other.names
        return list(self) == other if isinstance(other, list) else NotImplemented

    def __repr__(self) -> str:
        return f"PathList({self.names!r})"


@dataclass
class Folder:
    """What `list_folder` found in one folder.

    Attributes:
        path, name: of the folder.
        files: names of the wanted files directly in it, in natural order.
        folders: its sub-folders, in natural order, hidden ones left out.
        others: how many other files it holds, by suffix.
        repeated: links to folders that are listed elsewhere already.
    """

    path: str
    name: str
    files: list[str] = field(default_factory=list)
    folders: list[Folder] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    repeated: list[str] = field(default_factory=list)

    def walk(self) -> Iterator[Folder]:
        """This folder and all below it, depth first."""
        pending = [self]
        while pending:
            folder = pending.pop()
            yield folder
            pending += reversed(folder.folders)

    def paths(self) -> Iterator[str]:
        """The paths of all wanted files in and below this folder."""
        for folder in self.walk():
            yield from (os.path.join(folder.path, name) for name in folder.files)

    def count(self) -> int:
        """How many wanted files are in and below this folder."""
        return sum(len(folder.files) for folder in self.walk())


def list_folder(root: str | os.PathLike[str], suffixes: Sequence[str]) -> Folder:
    """List the files below `root` that end in one of `suffixes` (lower case, with dot).

    Linked folders are followed, each real folder once: a link in a circle, or to a folder that is listed anyway, adds nothing.

    Raises:
        InputError: a folder that cannot be listed.
    """
    top = Folder(os.fspath(root), os.path.basename(os.path.abspath(root)))
    endings, seen = tuple(suffixes), set()
    pending, links = [top], list[tuple[Folder, Folder]]()
    while pending or links:
        if not pending:  # real folders first: a link never takes the place of the folder it leads to
            parent, folder = links.pop(0)
            if _identity(folder.path) in seen:
                parent.repeated.append(folder.path)
                continue
            parent.folders.append(folder)
            parent.folders.sort(key=lambda f: natural(f.name))
            pending.append(folder)
        folder = pending.pop()
        seen.add(_identity(folder.path))
        links += [(folder, link) for link in _scan(folder, endings)]
        pending += folder.folders
    return top


def _scan(folder: Folder, endings: tuple[str, ...]) -> list[Folder]:
    """Fill in what `folder` holds; returns the linked folders."""
    links: list[Folder] = []
    try:
        with os.scandir(folder.path) as entries:
            for entry in entries:
                name = entry.name
                if is_hidden(name):
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else folder.folders).append(Folder(entry.path, name))
                elif name.lower().endswith(endings) and entry.is_file():
                    folder.files.append(name)
                else:
                    folder.others[os.path.splitext(name)[1].lower() or name] += 1
    except OSError as error:
        raise InputError(f"{folder.path} cannot be listed: {error.strerror or error}.") from error
    folder.files.sort(key=natural)
    folder.folders.sort(key=lambda f: natural(f.name))
    return sorted(links, key=lambda f: natural(f.name))


def _identity(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    return found.st_dev, found.st_ino
