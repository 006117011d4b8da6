"""Cases for training and tests as (image, labels) pairs: nuclei, hippocampus, drawn volumes."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmkit.data.drawn.scans import sample_volume
from mmkit.data.images import open_image
from mmkit.errors import InputError
from mmkit.vision.medical.cases import Case, picture_case, volume_case
from mmkit.vision.medical.volumes import normalize


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
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{folder}/splits.json with a split {split!r} is needed: {error}") from error
    cases = []
    for name in names:
        file = str(name) if str(name).endswith(".nii.gz") else f"{name}.nii.gz"
        cases.append(volume_case(folder / "images" / file, folder / "labels" / file, 3))
    return cases


def drawn_cases(seeds: Sequence[int]) -> list[Case]:
    """`sample_volume` for each seed, normalised."""
    drawn = (sample_volume(seed) for seed in seeds)
    return [(normalize(torch.from_numpy(x)[None]), torch.from_numpy(y.astype(np.int64))) for x, y in drawn]
