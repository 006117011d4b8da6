"""Fine-tune lab: adapt a backbone to your images with a few thousand parameters, and watch it happen.

It calls `mmkit.vision.classification`, as `mmkit finetune` does. What a visitor trains is kept on the server per session, never shared.
"""

from __future__ import annotations

import html
import os
import queue
import threading
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mmkit.apps import finetune_view as view
from mmkit.apps.frame import App, output_folder, readable
from mmkit.backbones import save_backbone
from mmkit.data import ImageDataset, load_digits, open_dataset
from mmkit.errors import InputError, MMKitError, nearest
from mmkit.training import StepInfo
from mmkit.vision.classification import (
    LEARNING_RATES,
    FinetuneResult,
    ImageClassificationPipeline,
    Prepared,
    prepare,
    train_prepared,
)

DIGITS, UPLOAD = "Handwritten digits (sample)", "My pictures (zip)"

BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "Tiny ViT, 32 px, pre-trained (comes with mmkit)": ("tiny_vit", {}),
    "ViT, 32 px, random weights": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3},
    ),
    "ConvNeXt atto, 64 px, random weights": (
        "convnext_atto",
        {"pretrained_cfg_overlay": {"input_size": [3, 64, 64]}},
    ),
    "ResNet-10, 64 px, random weights": ("resnet10t", {"pretrained_cfg_overlay": {"input_size": [3, 64, 64]}}),
}
"""Label -> `create_backbone` name and overrides. Visitors cannot name folders of the server."""

METHODS: dict[str, str] = {
    "ssf": "**SSF** scales and shifts the output of every layer. Can be merged: no cost afterwards.",
    "lora": "**LoRA** adds a low-rank update to the attention projections. Can be merged.",
    "bitfit": "**BitFit** trains the biases only. Can be merged.",
    "linear_probe": "**Linear probe** trains the classifier on frozen features: the baseline to beat.",
    "full": "**Full fine-tuning** trains every weight: the most to store, and the way to go with random weights.",
}
"""Methods for image classifiers, each with one sentence."""

LABELS = {"ssf": "SSF", "lora": "LoRA", "bitfit": "BitFit", "linear_probe": "Linear probe", "full": "All weights"}
KEPT_SESSIONS, KEPT_RUNS, SHOWN = 16, 6, 12
MAX_ZIP_FILES, MAX_ZIP_BYTES = 20_000, 1_000_000_000


@dataclass
class Session:
    """What one visitor has on the server: a folder, the opened data, the last result and earlier runs."""

    folder: Path = field(default_factory=output_folder)
    stop: threading.Event = field(default_factory=threading.Event)
    data: tuple[str, ImageDataset] | None = None
    result: FinetuneResult | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)
    curves: list[tuple[str, list[tuple[float, float]]]] = field(default_factory=list)
    count: int = 0

    def new_folder(self, kind: str) -> Path:
        """A fresh path inside the session's folder, which is marked as in use."""
        self.folder.mkdir(exist_ok=True)
        os.utime(self.folder)
        return self.folder / f"{kind}-{uuid.uuid4().hex[:12]}"


_sessions: OrderedDict[str, Session] = OrderedDict()
_lock = threading.Lock()


def _session(request: gr.Request | None) -> Session:
    """The visitor's session; the one unused for longest gives way when there are too many."""
    key = request.session_hash if request is not None and request.session_hash else uuid.uuid4().hex
    with _lock:
        session = _sessions.setdefault(key, Session())
        _sessions.move_to_end(key)
        while len(_sessions) > KEPT_SESSIONS:
            _sessions.popitem(last=False)[1].stop.set()
    return session


def forget(request: gr.Request) -> None:
    """The visitor closed the page: stop what runs and drop what was kept."""
    with _lock:
        session = _sessions.pop(str(request.session_hash), None)
    if session is not None:
        session.stop.set()


# ------------------------------------------------------------------------------------------------------------- work


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
        folder = session.new_folder("data")
        try:
            data = open_dataset(
                archive, on_error="skip", extract_to=folder, max_files=MAX_ZIP_FILES, max_bytes=MAX_ZIP_BYTES
            )
        except InputError as error:  # without the server's paths
            text = str(error)
            for path in (str(archive), str(folder.resolve()), str(folder)):
                text = text.replace(path, Path(archive).name if path == str(archive) else "the zip")
            raise InputError(text) from error
    session.data = (key, data)
    return data


def build_model(data: ImageDataset, backbone: str, method: str, seed: int = 0, augment: bool = False) -> Prepared:
    """`prepare` for a label of `BACKBONES` (or the name behind it) and a method. Raises `InputError`."""
    known = {**BACKBONES, **{name: (name, options) for name, options in BACKBONES.values()}}
    if backbone not in known:
        raise InputError(f"Unknown backbone {backbone!r}. {nearest(backbone, known)}")
    name, overrides = known[backbone]
    return prepare(data, name, method, seed=int(seed), augment=augment, overrides=overrides)


def train_in_thread(
    prepared: Prepared, stop: threading.Event, **options: Any
) -> Iterator[tuple[list[StepInfo], FinetuneResult | None]]:
    """Train in a thread and yield, a few times per second, the steps since the last time; at the end `([...], result)`.

    Closing the generator, or setting `stop`, ends the training after the step it is in.
    """
    steps: queue.SimpleQueue[StepInfo] = queue.SimpleQueue()
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(
                train_prepared(prepared, on_step=steps.put, should_stop=stop.is_set, progress=False, **options)
            )
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


# ----------------------------------------------------------------------------------------------------------- handlers


def show_plan(
    source: str, archive: str | None, backbone: str, method: str, request: gr.Request
) -> tuple[Any, Any, Any, Any, Any, Any]:
    """What will be trained, before training: data summary, examples, figures, map, the method's sentence, Train enabled."""
    blank = ("", "", "", METHODS.get(method, ""), gr.update(interactive=False))
    try:
        data = open_data(source, archive, _session(request))
        prepared = build_model(data, backbone, method)
    except MMKitError as error:
        return (f"⚠️ {html.escape(str(error))}", *blank)
    firsts = [data.labels.index(i) for i in range(min(len(data.class_names), 10))]
    raw = data.with_transform(None)
    examples = view.strip([(raw[i][0], data.class_names[data.labels[i]]) for i in firsts])
    skipped = f" {len(data.skipped)} unreadable files are left out." if data.skipped else ""
    summary = (
        f"**{len(data.class_names)} classes**: {len(prepared.train):,} pictures to train on, {len(prepared.val):,} held back "
        f"to measure.{skipped}"
    )
    return (
        summary,
        examples,
        view.plan_figures(prepared),
        view.model_map(prepared),
        METHODS.get(method, ""),
        gr.update(interactive=True),
    )


def begin(request: gr.Request) -> tuple[Any, ...]:
    """Right after the click: a fresh stop flag, Stop enabled, the old result gone."""
    session = _session(request)
    session.stop = threading.Event()
    session.result = None
    return (
        gr.update(interactive=False),
        gr.update(interactive=True),
        "Waiting for a free place ...",
        gr.update(visible=False),
        None,
    )


def stop_training(request: gr.Request) -> tuple[str, Any]:
    """Ask the visitor's training to end; it does after the step it is in."""
    _session(request).stop.set()
    return "Stopping after this step ...", gr.update(interactive=False)


def end() -> tuple[Any, Any]:
    """After a run, however it ended."""
    return gr.update(interactive=True), gr.update(interactive=False)


@readable
def train(
    source: str,
    archive: str | None,
    backbone: str,
    method: str,
    epochs: int,
    lr: float | None,
    batch_size: int,
    seed: int,
    augment: bool,
    request: gr.Request,
) -> Iterator[tuple[Any, ...]]:
    """Train, with the curves growing: yields status, loss curve, accuracy curve, and at the end the result."""
    session = _session(request)
    stop = session.stop
    prepared = build_model(open_data(source, archive, session), backbone, method, seed, augment)
    session.count += 1
    run = f"{session.count}: {LABELS[method]}"
    losses: list[tuple[int, float]] = []
    points: list[tuple[float, float]] = []
    folder = session.new_folder("run")
    keep = (gr.skip(),) * 8
    yield (f"Run {run}: preparing ...", view.loss_curve([]), view.accuracy_curve(session.curves, epochs), *keep)
    options = {"epochs": int(epochs), "lr": lr or None, "batch_size": int(batch_size), "seed": int(seed)}
    result = None
    for steps, result in train_in_thread(prepared, stop, output_dir=folder, **options):
        losses += [(s.step, s.loss) for s in steps]
        for s in steps:
            if "accuracy" in s.metrics and (not points or points[-1][1] != s.metrics["accuracy"]):
                points.append((round(s.step * int(epochs) / s.total, 2), s.metrics["accuracy"]))
        os.utime(session.folder)
        if result is None and steps:
            last = steps[-1]
            status = f"Run {run}: step {last.step} of {last.total}, epoch {last.epoch}, loss {last.loss:.3f}"
            if points:
                status += f", {view.percent(points[-1][1])} right"
            curves = [*session.curves, (run, points)]
            yield (status, view.loss_curve(losses, last.total), view.accuracy_curve(curves, epochs), *keep)
    assert result is not None  # train_in_thread ends with it or raises
    history = [(h["epoch"], h["accuracy"]) for h in result.fit.history if "accuracy" in h]
    yield finish(session, result, run, backbone, losses, history)


def finish(
    session: Session,
    result: FinetuneResult,
    run: str,
    backbone: str,
    losses: list[tuple[int, float]],
    history: list[tuple[float, float]],
) -> tuple[Any, ...]:
    """Keep the result in the session and say what came out."""
    report = report_of(result)
    session.curves = [*session.curves, (run, history)][-KEPT_RUNS:]
    session.runs = [*session.runs, {**report, "run": run, "backbone": backbone.split(",")[0]}][-KEPT_RUNS:]
    ended = "stopped" if report["stopped"] == "cancelled" else report["stopped"]
    status = f"Run {run}: {ended} after {report['steps']} steps."
    table = view.runs_table(session.runs)
    curves = (view.loss_curve(losses), view.accuracy_curve(session.curves))
    if not report["steps"] or result.folder is None:
        return (status, *curves, gr.update(visible=False), "", None, None, table, "", gr.skip(), gr.skip())
    session.result = result
    adapted = result.prepared.adapter is not None
    archive = result.folder.with_name(f"mmkit-{report['method']}-{uuid.uuid4().hex[:6]}.zip")
    if report["accuracy"] is not None:
        status += f" {view.percent(report['accuracy'])} of {report['val_images']} held-back pictures are right."
    return (
        status,
        *curves,
        gr.update(visible=True),
        view.result_figures(report),
        examples_with_predictions(result.prepared),
        gr.update(value=pack(result.folder, archive), label=f"Download the {'adapter' if adapted else 'model'}"),
        table,
        "",
        gr.update(visible=adapted),
        gr.update(visible=False),
    )


def _trained(request: gr.Request) -> FinetuneResult:
    result = _session(request).result
    if result is None:
        raise InputError("Nothing is trained yet: press Train first.")
    return result


def pick(event: gr.SelectData, request: gr.Request) -> Image.Image | None:
    """The clicked held-back picture, as it is in the data."""
    result = _session(request).result
    return None if result is None else held_back(result.prepared)[event.index][0]


@readable
def classify(image: Any, request: gr.Request) -> dict[str, float] | None:
    """Probabilities of the classes for one picture, by the visitor's trained model."""
    if image is None:
        return None
    found = ImageClassificationPipeline(_trained(request).prepared.model)(image, top_k=5)
    return dict(zip(found.labels, found.scores, strict=True))


@readable
def merge(request: gr.Request) -> tuple[str, Any]:
    """Fold the adapter into the weights, save the plain model, load it again, and compare predictions."""
    result = _trained(request)
    prepared = result.prepared
    if prepared.adapter is None:
        raise InputError("All weights were trained: there is no adapter to merge. Download the model instead.")
    folder = _session(request).new_folder("merged")
    plain = prepared.val.with_transform(None)
    pictures = [plain[i][0] for i in range(min(64, len(plain)))]
    before = [r.label for r in ImageClassificationPipeline(prepared.model)(pictures, top_k=1)]
    prepared.adapter.merge()
    try:
        save_backbone(prepared.model, folder, class_names=tuple(prepared.class_names))
    finally:
        prepared.adapter.unmerge()
    after = [r.label for r in ImageClassificationPipeline(folder)(pictures, top_k=1)]
    agree = sum(a == b for a, b in zip(before, after, strict=True))
    text = (
        f"Merged, saved and loaded again: a plain {type(prepared.model).__name__} without any adapter code. It agrees with the "
        f"adapted model on {agree} of {len(pictures)} pictures; the largest change of a logit is {result.merge_error:.1e}."
    )
    return text, gr.update(value=pack(folder, folder.with_suffix(".zip")), visible=True)


@readable
def plan_endpoint(backbone: str = "tiny_vit", adapter: str = "ssf") -> dict[str, Any]:
    """What fine-tuning on the sample digits would train, without training.

    Args:
        backbone: "tiny_vit", "vit_tiny_patch16_224", "convnext_atto" or "resnet10t".
        adapter: "ssf", "lora", "bitfit", "linear_probe" or "full".

    Returns:
        trainable_parameters, total_parameters, sites and the sizes of the data.
    """
    return build_model(load_digits(), backbone, adapter).describe()


@readable
def train_endpoint(
    archive: str | None, backbone: str, adapter: str, epochs: float, seed: float
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Fine-tune and return the report and a zip of the adapter.

    Args:
        archive: a zip with one folder of pictures per class, or None for the sample digits.
        backbone: "tiny_vit", "vit_tiny_patch16_224", "convnext_atto" or "resnet10t".
        adapter: "ssf", "lora", "bitfit", "linear_probe" or "full".
        epochs: passes over the pictures, 1 to 50.
        seed: of the split and the start.
    """
    if not 1 <= epochs <= 50:
        raise InputError(f"epochs must lie in 1..50, not {epochs:g}.")
    session = Session()
    prepared = build_model(open_data(UPLOAD if archive else DIGITS, archive, session), backbone, adapter, int(seed))
    folder = session.new_folder("run")
    for steps, result in train_in_thread(prepared, session.stop, output_dir=folder, epochs=int(epochs), seed=int(seed)):
        if result is not None:
            yield report_of(result), pack(folder, folder.with_suffix(".zip"))
        elif steps:
            yield {"step": steps[-1].step, "steps": steps[-1].total, "loss": steps[-1].loss}, None


# --------------------------------------------------------------------------------------------------------------- page


def _controls() -> dict[str, Any]:
    """The left column: data, method, settings, buttons."""
    c: dict[str, Any] = {}
    gr.Markdown("### 1 · Data")
    c["source"] = gr.Radio([DIGITS, UPLOAD], value=DIGITS, label="Pictures", elem_id="finetune-source")
    c["archive"] = gr.File(
        label="Zip with one folder of pictures per class", file_types=[".zip"], visible=False, height=110,
        elem_id="finetune-zip",
    )  # fmt: skip
    c["data"] = gr.Markdown(elem_id="finetune-data")
    c["examples"] = gr.HTML(elem_id="finetune-examples", padding=False)
    gr.Markdown("### 2 · Model and method")
    first = next(iter(BACKBONES))
    c["backbone"] = gr.Dropdown(list(BACKBONES), value=first, label="Backbone", elem_id="finetune-backbone")
    c["method"] = gr.Radio([(LABELS[m], m) for m in METHODS], value="ssf", label="Adapter", elem_id="finetune-adapter")
    c["method_text"] = gr.Markdown(METHODS["ssf"], elem_id="finetune-adapter-text")
    c["epochs"] = gr.Slider(1, 50, 8, step=1, label="Epochs (passes over the pictures)", elem_id="finetune-epochs")
    with gr.Accordion("More settings", open=False, elem_id="finetune-settings"):
        c["lr"] = gr.Number(
            label="Learning rate", info="Empty: the usual one of the method, " + ", ".join(
                f"{LABELS[m]} {LEARNING_RATES.get(m, 2e-3):g}" for m in METHODS),
            value=None, minimum=0, maximum=1, step=1e-4, elem_id="finetune-lr",
        )  # fmt: skip
        c["batch"] = gr.Slider(4, 128, 32, step=4, label="Batch size", elem_id="finetune-batch")
        c["seed"] = gr.Number(label="Seed", value=0, precision=0, minimum=0, elem_id="finetune-seed")
        c["augment"] = gr.Checkbox(
            label="Random crops and flips", info="Not for digits or text", elem_id="finetune-augment"
        )
    with gr.Row():
        c["train"] = gr.Button("Train", variant="primary", interactive=False, elem_id="finetune-train")
        c["stop"] = gr.Button("Stop", variant="stop", interactive=False, elem_id="finetune-stop")
    return c


def _results(c: dict[str, Any]) -> None:
    """The right column: the plan, the curves, the result."""
    gr.Markdown("### What will be trained")
    c["figures"] = gr.HTML("Preparing ...", elem_id="finetune-figures")
    with gr.Accordion("Where in the model", open=True, elem_id="finetune-where"):
        c["map"] = gr.HTML(elem_id="finetune-map")
    gr.Markdown("### 3 · Training")
    c["status"] = gr.Textbox("Press Train.", label="Status", interactive=False, lines=1, elem_id="finetune-status")
    with gr.Row():
        with gr.Column(min_width=280):
            c["loss"] = gr.HTML(view.loss_curve([]), elem_id="finetune-loss", min_height=200)
        with gr.Column(min_width=280):
            c["accuracy"] = gr.HTML(view.accuracy_curve([]), elem_id="finetune-accuracy", min_height=200)
    with gr.Column(visible=False, elem_id="finetune-result") as c["result"]:
        gr.Markdown("### 4 · Result")
        c["result_figures"] = gr.HTML(elem_id="finetune-result-figures")
        with gr.Row():
            c["download"] = gr.DownloadButton("Download the adapter", variant="primary", elem_id="finetune-download")
            c["merge"] = gr.Button("Merge into the weights", elem_id="finetune-merge")
            c["merged"] = gr.DownloadButton("Download the merged model", visible=False, elem_id="finetune-merged")
        c["merge_text"] = gr.Markdown(elem_id="finetune-merge-text")
        gr.Markdown(
            "What the model says about held-back pictures; ✗ is wrong. Click one to try it below, or bring your own."
        )
        c["shown"] = gr.Gallery(
            label="Held-back pictures", show_label=False, columns=6, height=265, object_fit="contain", format="png", buttons=[],
            interactive=False, allow_preview=False, elem_id="finetune-shown",
        )  # fmt: skip
        with gr.Row():
            c["image"] = gr.Image(
                label="Try a picture", format="png", type="pil", image_mode="RGB", height=230, sources=["upload", "clipboard"],
                elem_id="finetune-image",
            )  # fmt: skip
            c["label"] = gr.Label(label="It is", num_top_classes=5, elem_id="finetune-label")
        gr.Markdown(
            "Unpack the download and use it in Python: "
            '`mmkit.pipeline("image-classification", "FOLDER")("picture.png").label`'
        )
    with gr.Accordion("Runs of this visit", open=False, elem_id="finetune-runs"):
        c["runs"] = gr.Dataframe(headers=view.RUN_HEADERS, interactive=False, label="Newest first")


def build() -> None:
    """The page."""
    gr.HTML(view.CSS, padding=False)
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            c = _controls()
        with gr.Column(scale=7, min_width=420):
            _results(c)
    private: dict[str, Any] = {"api_visibility": "private"}
    chosen = [c["source"], c["archive"], c["backbone"], c["method"]]
    plan = [c["data"], c["examples"], c["figures"], c["map"], c["method_text"], c["train"]]
    gr.on(None, show_plan, chosen, plan, trigger_mode="always_last", show_progress="minimal", **private)
    c["source"].change(
        lambda source: gr.update(visible=source == UPLOAD), c["source"], c["archive"], queue=False, **private
    )
    buttons = [c["train"], c["stop"]]
    settings = [c["epochs"], c["lr"], c["batch"], c["seed"], c["augment"]]
    outputs = [
        c["status"], c["loss"], c["accuracy"], c["result"], c["result_figures"], c["shown"], c["download"], c["runs"],
        c["merge_text"], c["merge"], c["merged"],
    ]  # fmt: skip
    limit: dict[str, Any] = {"concurrency_id": "training", "concurrency_limit": 1}
    started = c["train"].click(begin, None, [*buttons, c["status"], c["result"], c["image"]], queue=False, **private)
    done = started.then(train, [*chosen, *settings], outputs, show_progress="hidden", **limit, **private)
    done.then(end, None, buttons, queue=False, **private)
    c["stop"].click(stop_training, None, [c["status"], c["stop"]], queue=False, show_progress="hidden", **private)
    c["merge"].click(merge, None, [c["merge_text"], c["merged"]], **private)
    c["image"].change(classify, c["image"], c["label"], show_progress="minimal", **private)
    c["shown"].select(pick, None, c["image"], show_progress="hidden", **private)
    _endpoints(limit)


def _endpoints(limit: dict[str, Any]) -> None:
    """Named endpoints that need no session, for `gradio_client` and others."""
    gr.api(plan_endpoint, api_name="finetune_plan")
    with gr.Row(visible=False):
        archive, report, zipped = gr.File(label="archive"), gr.JSON(label="report"), gr.File(label="adapter")
        backbone, adapter = gr.Textbox("tiny_vit", label="backbone"), gr.Textbox("ssf", label="adapter")
        epochs, seed = gr.Number(8, label="epochs"), gr.Number(0, label="seed")
        run: Callable[..., Any] = gr.Button().click
    run(
        train_endpoint, [archive, backbone, adapter, epochs, seed], [report, zipped], api_name="finetune_train", **limit
    )


APP = App(
    "finetune",
    "Fine-tune lab",
    "Adapt a vision model to your pictures with a few thousand numbers, watch it learn, and take the adapter away as a small file.",
    build,
    forget,
)
