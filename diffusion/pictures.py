"""Folders of captioned pictures: `metadata.jsonl` or `.csv`, a text file beside each picture, or one sub-folder per class."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from mmkit.data.images import SUFFIXES, load_image
from mmkit.errors import InputError
from mmkit.storage.files import expanded

_FILE_COLUMNS, _TEXT_COLUMNS = ("file_name", "path", "image", "file"), ("text", "caption", "prompt")


@dataclass
class Captioned:
    """Pictures and what they show.

    Attributes:
        paths: the files.
        captions: one sentence each.
    """

    paths: list[Path]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def tensor(self, size: int) -> Tensor:
        """All pictures as (N, 3, size, size) in -1..1: the shorter side is resized to `size` and the centre kept."""
        pictures = [ImageOps.fit(load_image(path), (size, size)) for path in self.paths]
        return torch.stack([picture_tensor(picture) for picture in pictures])


def picture_tensor(picture: Any) -> Tensor:
    """An RGB picture as (3, H, W) in -1..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 127.5 - 1).movedim(-1, 0)


def open_captions(source: str | os.PathLike[str], template: str = "a picture of a {}") -> Captioned:
    """Read a folder of captioned pictures.

    Args:
        source: a folder with `metadata.jsonl` or `metadata.csv` (columns `file_name` and `text`, as Hugging Face writes them), with
            `name.txt` beside each `name.jpg`, or with one sub-folder per class.
        template: the caption of a class.

    Raises:
        InputError: no pictures, pictures without captions (they are named), or a table that names missing files.
    """
    folder = expanded(source)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder of pictures.")
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).is_file():
            return _from_table(folder, folder / name)
    loose = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if loose:
        return _from_text_files(folder, loose)
    pairs = [
        (path, template.format(sub.name.replace("_", " ")))
        for sub in sorted(folder.iterdir())
        if sub.is_dir()
        for path in sorted(sub.rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not pairs:
        raise InputError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
    return Captioned([p for p, _ in pairs], [c for _, c in pairs])


def _from_text_files(folder: Path, pictures: Sequence[Path]) -> Captioned:
    texts = {p: p.with_suffix(".txt") for p in pictures}
    missing = [p.name for p, text in texts.items() if not text.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(pictures)} pictures in {folder} have no caption, such as {missing[:3]}. Write "
            "`name.txt` beside each picture, a metadata.jsonl with file_name and text, or sort them into one folder per class."
        )
    captions = [text.read_text(encoding="utf-8", errors="replace").strip() for text in texts.values()]
    return Captioned(list(pictures), captions)


def _from_table(folder: Path, table: Path) -> Captioned:
    with table.open(encoding="utf-8", errors="replace", newline="") as file:
        try:
            rows = (
                [json.loads(line) for line in file if line.strip()]
                if table.suffix == ".jsonl"
                else list(csv.DictReader(file))
            )
        except (ValueError, RecursionError) as error:
            raise InputError(f"{table} is damaged: {error}.") from error
    if not rows:
        raise InputError(f"{table} lists no pictures.")
    paths, captions = [], []
    for number, row in enumerate(rows, 1):
        name = next((row[k] for k in _FILE_COLUMNS if isinstance(row, dict) and row.get(k)), None)
        text = next((row[k] for k in _TEXT_COLUMNS if isinstance(row, dict) and row.get(k)), None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise InputError(f"{table}, entry {number}: a file_name and a text are needed, found {str(row)[:120]}.")
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            raise InputError(f"{table}, entry {number}: there is no {name!r} in {folder}.")
        paths.append(path)
        captions.append(text)
    return Captioned(paths, captions)
