"""Photographs that may be used for anything as long as their makers are named, from folders that tell their licenses."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

from mmkit.errors import InputError

PERMISSIVE = ("CC0-1.0", "CC-BY-2.0", "CC-BY-4.0", "no-known-copyright-restrictions")
"""Licenses without share-alike, non-commercial or no-derivatives terms, as `permissive_pictures` spells them."""


def permissive_pictures(folder: str | os.PathLike[str]) -> list[Path]:
    """Sorted paths of the pictures of a folder whose license is among `PERMISSIVE`.

    The folder holds `index.csv` with the columns `path` and `license`, or `annotations.json`, a list of objects with `image` and
    `license`. Raises `InputError` when it has neither, or names no such picture.
    """
    folder = Path(folder)
    if (folder / "index.csv").is_file():
        with open(folder / "index.csv", newline="", encoding="utf-8") as file:
            rows = [(row.get("path"), row.get("license")) for row in csv.DictReader(file)]
    elif (folder / "annotations.json").is_file():
        listed = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
        rows = [(row.get("image"), row.get("license")) for row in listed]
    else:
        raise InputError(f"{folder} needs an index.csv (path, license) or an annotations.json (image, license).")
    found = sorted({folder / path for path, license in rows if path and license in PERMISSIVE})
    if not found:
        raise InputError(f"{folder} names no picture under {', '.join(PERMISSIVE)}: check its column 'license'.")
    return found
