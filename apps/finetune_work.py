"""What the fine-tune lab does, without its page: sessions, opening pictures, building, training in a thread, packing."""

from __future__ import annotations

import os
import queue
import shutil
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mmkit.apps import limits
from mmkit.apps.finetune_view import Curve
from mmkit.apps.limits import in_bytes
from mmkit.apps.sessions import Sessions, output_folder, require_space, workspace
from mmkit.data import ImageDataset, load_digits, open_dataset
from mmkit.errors import InputError, nearest
from mmkit.training import StepInfo
from mmkit.vision.classification import (
    FinetuneResult,
    ImageClassificationPipeline,
    Prepared,
    default_backbone,
    prepare,
)

DIGITS, UPLOAD = "Handwritten digits (sample)", "My pictures (zip)"


AUTOMATIC = "Automatic: what suits the pictures"

BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    AUTOMATIC: ("auto", {}),
    "Tiny ViT, 32 px, pre-trained (comes with mmkit)": ("tiny_vit", {}),
    "MobileNetV2, 160 px, knows photographs (comes with mmkit)": ("mobilenetv2", {"img_size": 160}),
    "ViT, 32 px, random weights": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3},
    ),
    "ConvNeXt atto, 64 px, random weights": (
        "convnext_atto",
        {"img_size": 64},
    ),
    "ResNet-10, 64 px, random weights": ("resnet10t", {"img_size": 64}),
}
"""Label -> `create_backbone` name and overrides. Visitors cannot name folders of the server."""


KEPT_SESSIONS, KEPT_RUNS, SHOWN = 16, 6, 12


MAX_ZIP_FILES, MAX_ZIP_BYTES = 20_000, 1_000_000_000


@dataclass
class Session:
    """What one visitor has on the server: a folder, the opened data, the last run and its result, and earlier runs.

    `curves` are kept by the pictures they were measured on: accuracies on different pictures do not compare.
    """

    key: str = ""
    folder: Path | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    data: tuple[str, ImageDataset] | None = None
    result: FinetuneResult | None = None
    last_run: Path | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, list[Curve]] = field(default_factory=dict)
    count: int = 0

    def new_folder(self, kind: str) -> Path:
        """A fresh path inside the session's folder, which is made when it is first needed."""
        if self.folder is None or not self.folder.exists():
            self.folder = output_folder()
        self.keep()
        return self.folder / f"{kind}-{uuid.uuid4().hex[:12]}"

    def keep(self) -> None:
        """It is in use: neither its files nor what it holds in memory are old."""
        SESSIONS.find(self.key)
        if self.folder is not None and self.folder.exists():
            os.utime(self.folder)


SESSIONS: Sessions[Session] = Sessions(KEPT_SESSIONS, on_drop=lambda session: session.stop.set())

_lock = threading.Lock()


def session_of(request: gr.Request | None) -> Session:
    """The visitor's session; the one unused for longest gives way when there are too many."""
    key = request.session_hash if request is not None and request.session_hash else uuid.uuid4().hex
    with _lock:
        session = SESSIONS.find(key)
        if session is None:
            session = Session(key)
            SESSIONS.add(session, key)
    return session


def forget(request: gr.Request) -> None:
    """The visitor closed the page: stop what runs and drop what was kept, also on disk."""
    session = SESSIONS.find(str(request.session_hash))
    SESSIONS.drop(str(request.session_hash))
    if session is not None and session.folder is not None:
        shutil.rmtree(session.folder, ignore_errors=True)


def open_data(source: str, archive: str | None, session: Session) -> ImageDataset:
    """The chosen pictures, opened once per session. Raises `InputError` in words for the page."""
    key = DIGITS if source == DIGITS else str(archive)
    if session.data is not None and session.data[0] == key:
        return session.data[1]
    if source == DIGITS:
        data: ImageDataset = load_digits()
    elif not archive:
        raise InputError("Upload a zip with one folder of pictures per class, for example cats/1.jpg and dogs/1.jpg.")
    elif not zipfile.is_zipfile(archive):
        raise InputError("This file is not a zip. Pack one folder of pictures per class into a .zip file.")
    else:
        require_space(0)
        folder = session.new_folder("data")
        most = min(MAX_ZIP_BYTES, in_bytes(limits.DISK_QUOTA) - workspace().used())
        try:
            data = open_dataset(archive, on_error="skip", extract_to=folder, max_files=MAX_ZIP_FILES, max_bytes=most)
        except InputError as error:  # without the server's paths
            text = str(error)
            for path in (str(archive), str(folder.resolve()), str(folder)):
                text = text.replace(path, Path(archive).name if path == str(archive) else "the zip")
            raise InputError(text) from error
    session.data = (key, data)
    return data


def build_model(data: ImageDataset, backbone: str, method: str, seed: int = 0, augment: bool | None = None) -> Prepared:
    """`prepare` for a label of `BACKBONES` (or the name behind it) and a method. Raises `InputError`."""
    known = {**BACKBONES, **{name: (name, options) for name, options in BACKBONES.values()}}
    if backbone not in known:
        raise InputError(f"Unknown backbone {backbone!r}. {nearest(backbone, known)}")
    name, overrides = known[backbone]
    if name == "auto":
        name, overrides = known[default_backbone(data)]
    return prepare(data, name, method, seed=int(seed), augment=augment, overrides=overrides)


def train_in_thread(
    train: Callable[..., Any], stop: threading.Event, **options: Any
) -> Iterator[tuple[list[StepInfo], Any]]:
    """Call `train` in a thread and yield, a few times per second, the steps since the last time; at the end `([...], result)`.

    Closing the generator, or setting `stop`, ends the training after the step it is in.
    """
    steps: queue.SimpleQueue[StepInfo] = queue.SimpleQueue()
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(train(on_step=steps.put, should_stop=stop.is_set, progress=False, **options))
        except BaseException as error:  # handed to the generator below
            outcome.append(error)

    def drain() -> list[StepInfo]:
        found = []
        while not steps.empty():
            found.append(steps.get())
        return found

    thread = threading.Thread(target=work, name="mmkit-training", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.5)
            if thread.is_alive():
                yield drain(), None
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        yield drain(), outcome[0]
    finally:
        stop.set()
        thread.join(30)


def label_of(prepared: Prepared) -> str:
    """What the page calls the backbone in use."""
    label = next(k for k, (name, _) in BACKBONES.items() if name == prepared.backbone["name"])
    return label.split(",")[0]


def report_of(result: FinetuneResult) -> dict[str, Any]:
    """The run's report; accuracy is None when it was stopped before the first evaluation."""
    return {**result.report, "accuracy": result.accuracy if result.fit.best_metrics else None}


def pack(folder: Path, archive: Path, skip: str = "training") -> str:
    """Zip the files under `folder`, without the sub-folder `skip`, to `archive`; returns its path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and skip not in p.relative_to(folder).parts)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for path in files:
            target.write(path, path.relative_to(folder).as_posix())
    return str(archive)


def held_back(prepared: Prepared, count: int = SHOWN) -> list[tuple[Image.Image, int]]:
    """Validation pictures spread over the classes, with their labels."""
    plain = prepared.val.with_transform(None)
    indices = sorted(range(len(plain)), key=lambda i: (plain.labels[:i].count(plain.labels[i]), plain.labels[i]))
    return [plain[i] for i in indices[:count]]


def examples_with_predictions(prepared: Prepared) -> list[tuple[Image.Image, str]]:
    """`held_back` pictures, captioned with right or wrong, the prediction and its probability."""
    pictures = held_back(prepared)
    found = ImageClassificationPipeline(prepared.model)([p for p, _ in pictures], top_k=1)
    shown = []
    for (picture, label), result in zip(pictures, found, strict=True):
        mark = "✓" if result.label == prepared.class_names[label] else "✗"
        shown.append((enlarge(picture), f"{mark} {result.label} {100 * result.scores[0]:.0f} %"))
    return shown


def enlarge(picture: Image.Image, side: int = 128) -> Image.Image:
    """Small pictures are shown with their pixels, not blurred by the browser."""
    factor = max(1, side // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
