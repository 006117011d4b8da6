"""Labelled videos as a map-style data set, from the folder and list formats people have.

Items are `(clip (T, C, H, W) float32, label)`, or `(views (V, T, C, H, W), label)` when the sampler or transform makes
several views. What an item holds depends on (seed, epoch, index) only, not on the number of workers.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from mmkit.errors import InputError
from mmkit.video.io import VIDEO_SUFFIXES, VideoDecodeError, VideoReader
from mmkit.video.samplers import Sampler, UniformSampler
from mmkit.video.transforms import ClipTransform

logger = logging.getLogger("mmkit.video")
_REPLACEMENTS = 10


@dataclass(frozen=True)
class VideoSample:
    """One labelled video, or the part from `start` to `end` seconds of it."""

    path: str
    label: int
    start: float | None = None
    end: float | None = None


class VideoClassificationDataset(Dataset[Any]):
    """Labelled videos, decoded when they are asked for. Picklable; files are opened inside the worker.

    Args:
        samples: what there is; the `from_*` constructors make them.
        class_names: in label order.
        sampler: which frames; default `UniformSampler(8)`.
        transform: frames to model input; default `ClipTransform(224)`.
        train: random sampling and, with the default transform, augmentation.
        seed: fixes every random choice together with the epoch (`set_epoch`) and the index.
        on_error: "raise", or "replace" an unreadable video by another one, warning once per file (`broken` lists them).
        short_side: short side frames are decoded to, before the transform; `None` keeps the video's size.
        backend, tolerance: see `mmkit.video.VideoReader`.

    Raises:
        InputError: no samples, labels outside the classes, or an unknown `on_error`.
    """

    def __init__(
        self,
        samples: Sequence[VideoSample],
        class_names: Sequence[str],
        *,
        sampler: Sampler | None = None,
        transform: Callable[..., tuple[Tensor, int]] | None = None,
        train: bool = False,
        seed: int = 0,
        on_error: str = "raise",
        short_side: int | None = 256,
        backend: str = "auto",
        tolerance: float = 0.5,
    ):
        if not samples:
            raise InputError("The video data set is empty.")
        if on_error not in ("raise", "replace"):
            raise InputError(f"on_error must be 'raise' or 'replace', not {on_error!r}.")
        outside = [s for s in samples if not 0 <= s.label < len(class_names)]
        if outside:
            raise InputError(f"{outside[0].path}: label {outside[0].label} is outside the {len(class_names)} classes.")
        self.samples, self.class_names = list(samples), list(class_names)
        self.sampler = sampler if sampler is not None else UniformSampler(8)
        self.transform = transform if transform is not None else ClipTransform(224, train=train)
        self.train, self.seed, self.on_error, self.epoch = train, seed, on_error, 0
        self.short_side, self.backend, self.tolerance = short_side, backend, tolerance
        self.broken: dict[str, str] = {}
        self.missing: list[str] = []

    @property
    def classes(self) -> list[str]:
        """`class_names`, under the name torchvision's data sets use."""
        return self.class_names

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass draw other random crops and frames."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng([self.seed, self.epoch, index])
        for attempt in range(_REPLACEMENTS + 1):
            sample = self.samples[index]
            try:
                return self._load(sample, rng)
            except VideoDecodeError as error:
                if self.on_error == "raise" or attempt == _REPLACEMENTS:
                    raise
                if sample.path not in self.broken:
                    self.broken[sample.path] = str(error)
                    warnings.warn(f"Using another video in its place: {error}", stacklevel=2)
                index = int(rng.integers(len(self.samples)))
        raise AssertionError("unreachable")

    def _load(self, sample: VideoSample, rng: np.random.Generator) -> tuple[Tensor, int]:
        with VideoReader(sample.path, backend=self.backend, tolerance=self.tolerance) as reader:
            first = reader.index_at(sample.start) if sample.start is not None else 0
            last = reader.index_at(sample.end) if sample.end is not None else len(reader) - 1
            count = max(last - first + 1, 1)
            indices = first + self.sampler.sample(count, train=self.train, rng=rng, fps=reader.fps)
            clip = reader.read(indices.reshape(-1), size=self.short_side)
        frames = clip.tensor().unflatten(0, indices.shape)  # (clips, T, C, H, W)
        label, views = sample.label, []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**62)))
            for part in frames:
                view, label = self.transform(part, sample.label)
                views.append(view if view.dim() == 5 else view[None])
        stacked = torch.cat(views)
        return (stacked[0] if len(stacked) == 1 else stacked), label

    # -- formats

    @classmethod
    def from_samples(
        cls, rows: Iterable[tuple[Any, ...]], class_names: Sequence[str] | None = None, **options: Any
    ) -> VideoClassificationDataset:
        """From `(path, label)` or `(path, label, start, end)` rows; labels are integers or class names.

        Files that do not exist are left out with one warning and listed in `.missing`; none at all is an error.
        """
        rows = list(rows)
        names = list(class_names) if class_names is not None else _class_names([r[1] for r in rows])
        lookup = {name: i for i, name in enumerate(names)}
        found: list[VideoSample] = []
        missing: list[VideoSample] = []
        for row in rows:
            path, label = os.fspath(row[0]), row[1]
            if not isinstance(label, (int, np.integer)):
                if label not in lookup:
                    raise InputError(f"{path}: class {label!r} is not among the {len(names)} classes.")
                label = lookup[label]
            start, end = (row[2], row[3]) if len(row) == 4 else (None, None)
            (found if os.path.exists(path) else missing).append(VideoSample(path, int(label), start, end))
        if missing:
            if not found:
                raise InputError(f"None of the {len(rows)} listed videos exist, for example {missing[0].path}.")
            warnings.warn(
                f"{len(missing)} of {len(rows)} listed videos are missing, e.g. {missing[0].path}", stacklevel=2
            )
        dataset = cls(found, names, **options)
        dataset.missing = [s.path for s in missing]
        return dataset

    @classmethod
    def from_folder(
        cls, root: str | os.PathLike[str], split: str | None = None, **options: Any
    ) -> VideoClassificationDataset:
        """From `root[/split]/<class>/<video>`; classes are the folder names, sorted."""
        folder = Path(root).expanduser() / (split or "")
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder.")
        class_names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        rows = [
            (path, label)
            for label in class_names
            for path in sorted((folder / label).rglob("*"))
            if path.suffix.lower() in VIDEO_SUFFIXES
        ]
        if not rows:
            raise InputError(
                f"{folder} must hold one folder per class with videos in it ({', '.join(VIDEO_SUFFIXES)})."
            )
        return cls.from_samples(rows, class_names, **options)

    @classmethod
    def from_list(
        cls,
        file: str | os.PathLike[str],
        root: str | os.PathLike[str] = "",
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> VideoClassificationDataset:
        """From lines `path label` or `path,label` (mmaction2, SlowFast, VideoMAE), or `folder total_frames label`.

        `label` is an integer from 0. Paths may hold spaces. Lines that start with `#` are skipped.
        """
        rows = []
        for number, line in _lines(file):
            match = re.fullmatch(r"(.+?)(?:[,\s]+\d+)?[,\s]+(\d+)", line)
            if not match:
                raise InputError(f"{file}, line {number}: expected 'path label', found {line!r}.")
            rows.append((Path(root) / match[1].strip(), int(match[2])))
        if not rows:
            raise InputError(f"{file} lists no videos.")
        names = class_names if class_names is not None else [str(i) for i in range(max(r[1] for r in rows) + 1)]
        return cls.from_samples(rows, names, **options)

    @classmethod
    def from_csv(
        cls,
        file: str | os.PathLike[str],
        root: str | os.PathLike[str] = "",
        split: str | None = None,
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> VideoClassificationDataset:
        """From a CSV file with the columns `path,label` and, if wanted, `start,end` (seconds) and `split`."""
        rows = []
        for row in _table(file, {"path", "label"}):
            if split is None or row.get("split") == split:
                start, end = (float(row[k]) if row.get(k) else None for k in ("start", "end"))
                rows.append((Path(root) / row["path"], row["label"], start, end))
        if not rows:
            raise InputError(f"{file} has no rows{f' with split={split!r}' if split else ''}.")
        return cls.from_samples(rows, class_names, **options)

    @classmethod
    def from_kinetics_csv(
        cls,
        file: str | os.PathLike[str],
        root: str | os.PathLike[str],
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> VideoClassificationDataset:
        """From the official Kinetics CSV (`label,youtube_id,time_start,time_end,split`).

        Files are `root/[label/]{youtube_id}_{time_start:06d}_{time_end:06d}.mp4`. Missing ones are reported, not fatal.
        """
        rows = []
        for row in _table(file, {"label", "youtube_id", "time_start", "time_end"}):
            name = f"{row['youtube_id']}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}.mp4"
            nested = Path(root) / row["label"] / name
            rows.append((nested if nested.exists() else Path(root) / name, row["label"]))
        if not rows:
            raise InputError(f"{file} has no rows.")
        return cls.from_samples(rows, class_names, **options)

    @classmethod
    def from_ssv2_json(
        cls,
        file: str | os.PathLike[str],
        labels: str | os.PathLike[str],
        root: str | os.PathLike[str],
        **options: Any,
    ) -> VideoClassificationDataset:
        """From Something-Something v2: the annotation list, `...-labels.json`, and the folder of `{id}.webm` files."""
        table, items = _json(labels), _json(file)
        if not isinstance(table, dict) or not isinstance(items, list):
            raise InputError(f"{labels} must hold an object and {file} a list.")
        class_names = [name for name, _ in sorted(table.items(), key=lambda kv: int(kv[1]))]
        rows = []
        for item in items:
            template = str(item.get("template", "")).replace("[", "").replace("]", "")
            if template not in table:
                raise InputError(
                    f"{file}: video {item.get('id')!r} has template {template!r}, which is not in {labels}."
                )
            rows.append((Path(root) / f"{item['id']}.webm", template))
        return cls.from_samples(rows, class_names, **options)


def check_videos(paths: Iterable[str | os.PathLike[str]], *, tolerance: float = 0.5) -> dict[str, str]:
    """Try to read the first, middle and last frame of each video; returns path -> problem for those that fail."""
    problems: dict[str, str] = {}
    for path in tqdm(list(paths), desc="checking videos", unit="video", leave=False):
        try:
            with VideoReader(path, tolerance=tolerance) as reader:
                reader.read([0, len(reader) // 2, len(reader) - 1], size=32)
        except VideoDecodeError as error:
            problems[os.fspath(path)] = str(error)
    return problems


def _class_names(labels: list[Any]) -> list[str]:
    if all(isinstance(v, (int, np.integer)) for v in labels):
        return [str(i) for i in range(max(labels) + 1)] if labels else []
    return sorted({str(v) for v in labels})


def _read_text(file: str | os.PathLike[str]) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as a text file: {error}") from error


def _lines(file: str | os.PathLike[str]) -> list[tuple[int, str]]:
    text = _read_text(file).splitlines()
    return [(i, line.strip()) for i, line in enumerate(text, 1) if line.strip() and not line.startswith("#")]


def _table(file: str | os.PathLike[str], needed: set[str]) -> list[dict[str, str]]:
    reader = csv.DictReader(_read_text(file).splitlines())
    absent = needed - set(reader.fieldnames or [])
    if absent:
        raise InputError(f"{file} lacks the columns {sorted(absent)}; it has {reader.fieldnames}.")
    return list(reader)


def _json(file: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error
