"""Labelled videos as a map-style data set, from the folder and list formats people have.

Items are `(clip (T, C, H, W) float32, label)`, or `(views (V, T, C, H, W), label)` when the sampler or transform makes
several views. What an item holds depends on (seed, epoch, index) only, not on the number of workers.
"""

from __future__ import annotations

import json
import math
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

from mmkit.data.images import SUFFIXES
from mmkit.data.labels import class_order, from_folders, near_twins, read_table, read_text, split_of
from mmkit.data.listing import Folder, list_folder
from mmkit.errors import InputError
from mmkit.storage.files import expanded
from mmkit.video.frames import VideoDecodeError
from mmkit.video.io import VIDEO_SUFFIXES, VideoReader
from mmkit.video.samplers import Sampler, UniformSampler
from mmkit.video.transforms import ClipTransform

_REPLACEMENTS = 10
_MAX_CLASSES = 100_000
_MAX_LINE = 5000


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
    def labels(self) -> list[int]:
        """The class of every video."""
        return [s.label for s in self.samples]

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

        Labels that are all whole numbers, also as text, are class numbers, as in `from_list`.
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
                label = lookup.get(str(label), _number(label))
                if label is None:
                    raise InputError(f"{path}: class {row[1]!r} is not among the {len(names)} classes.")
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
        """From `root/<class>/<video>` or `root/<split>/<class>/<video>`; a video is a file, or a folder of numbered frames.

        The classes are those of all splits, in natural order, so that they are the same for each split.

        Args:
            root: the folder.
            split: "train", "val" or "test" (or what the folder is called); needed where there are splits.

        Raises:
            InputError: no folder, no class folders with videos, no such split, or splits and none chosen.
        """
        folder = expanded(root)
        if split is not None and not split_of(split):
            folder, split = folder / split, None
        if not os.path.isdir(folder):
            raise InputError(f"{folder} is not a folder.")
        top = list_folder(folder, VIDEO_SUFFIXES)
        if not top.count():
            top = _frame_folders(list_folder(folder, SUFFIXES))
        rows, notes = from_folders(top, "videos")
        names, splits = class_order(row[1] for row in rows), sorted({row[2] for row in rows} - {""})
        if (split is None) != (not splits) or (split is not None and split_of(split) not in splits):
            raise InputError(f"{folder} has the splits {splits}, but split={split!r} was asked for.")
        notes += near_twins(names)
        if notes:
            warnings.warn(f"{folder}: {'; '.join(notes)}.", stacklevel=2)
        wanted = [(path, label) for path, label, own in rows if own == split_of(split or "")]
        return cls.from_samples(wanted, names, **options)

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
            match = re.fullmatch(r"(.+?)(?:[,\s]+\d+)?[,\s]+(\d{1,9})", line[:_MAX_LINE])
            if not match:
                raise InputError(f"{file}, line {number}: expected 'path label', found {line[:200]!r}.")
            rows.append((Path(root) / match[1].strip(), int(match[2])))
        if not rows:
            raise InputError(f"{file} lists no videos.")
        return cls.from_samples(rows, class_names, **options)

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
                start, end = (_seconds(row.get(k, ""), file, k) for k in ("start", "end"))
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
            start, end = (int(_seconds(row[k], file, k) or 0) for k in ("time_start", "time_end"))
            name = f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4"
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
        numbers = {name: _number(value) for name, value in table.items()}
        if sorted(n for n in numbers.values() if n is not None) != list(range(len(table))):
            raise InputError(f"{labels} must number its {len(table)} classes from 0.")
        class_names = sorted(table, key=lambda name: numbers[name] or 0)
        rows = []
        for item in items:
            if not isinstance(item, dict) or "id" not in item:
                raise InputError(f"{file}: each video needs an id and a template, found {str(item)[:200]}.")
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
    """Class names for labels given as numbers or names."""
    numbers = [_number(label) for label in labels]
    if any(number is None for number in numbers):
        return class_order(str(label) for label in labels)
    top = max((n for n in numbers if n is not None), default=-1)
    if top >= _MAX_CLASSES:
        raise InputError(
            f"Labels that are numbers count the classes from 0 to at most {_MAX_CLASSES - 1}; found {top}."
        )
    return [str(i) for i in range(top + 1)]


def _number(label: Any) -> int | None:
    """The class number that a label is, also as text."""
    if isinstance(label, (int, np.integer)):
        return int(label)
    return int(label) if str(label).isdecimal() and len(str(label)) < 10 else None


def _frame_folders(top: Folder) -> Folder:
    """A listing of pictures as a listing of videos: each folder that holds pictures is one."""
    for folder in top.walk():
        folder.files = [inner.name for inner in folder.folders if inner.files]
        folder.folders = [inner for inner in folder.folders if not inner.files]
    return top


def _lines(file: str | os.PathLike[str]) -> list[tuple[int, str]]:
    text = read_text(expanded(file)).splitlines()
    return [(i, line.strip()) for i, line in enumerate(text, 1) if line.strip() and not line.startswith("#")]


def _table(file: str | os.PathLike[str], needed: set[str]) -> list[dict[str, str]]:
    """Rows by column; cells that are not there are empty."""
    header, *rows = read_table(expanded(file)) or [[]]
    absent = needed - set(header)
    if absent:
        raise InputError(f"{file} lacks the columns {sorted(absent)}; it has {header[:20]}.")
    return [dict(zip(header, [*row, *[""] * len(header)], strict=False)) for row in rows]


def _seconds(text: str, file: Any, name: str) -> float | None:
    """A time of a table, None when its cell is empty."""
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not 0 <= value < 1e9:
        raise InputError(f"{file}: {name} must be seconds, found {text!r}.")
    return value


def _json(file: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(read_text(expanded(file)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error
