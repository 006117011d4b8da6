"""Fine-tune lab: adapt a backbone to your images with a few thousand parameters, and watch it happen.

It calls `mmkit.vision.classification`, as `mmkit finetune` does. What a visitor trains is kept on the server per session, never shared.
"""

from __future__ import annotations

import functools
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mmkit.apps import finetune_view as view
from mmkit.apps.finetune_work import (
    AUTOMATIC,
    BACKBONES,
    DIGITS,
    KEPT_RUNS,
    UPLOAD,
    Session,
    build_model,
    examples_with_predictions,
    forget,
    held_back,
    label_of,
    open_data,
    pack,
    report_of,
    session_of,
    train_in_thread,
)
from mmkit.apps.frame import App, readable
from mmkit.apps.handlers import number, plain
from mmkit.apps.look import shows
from mmkit.backbones import load_weights, save_backbone
from mmkit.data import load_digits
from mmkit.errors import InputError, MMKitError, RunDiffersError
from mmkit.vision.classification import (
    LEARNING_RATES,
    FinetuneResult,
    ImageClassificationPipeline,
    train_prepared,
)

METHODS: dict[str, str] = {
    "ssf": "**SSF** scales and shifts the output of every layer. Can be merged: no cost afterwards.",
    "lora": "**LoRA** adds a low-rank update to the attention projections. Can be merged.",
    "bitfit": "**BitFit** trains the biases only. Can be merged.",
    "linear_probe": "**Linear probe** trains the classifier on frozen features: the baseline to beat.",
    "full": "**Full fine-tuning** trains every weight: the most to store, and the way to go with random weights.",
}
"""Methods for image classifiers, each with one sentence."""


CONTINUE = "Continue the last run"
AUGMENT = {"For photographs": None, "Always": True, "Never": False}
LABELS = {"ssf": "SSF", "lora": "LoRA", "bitfit": "BitFit", "linear_probe": "Linear probe", "full": "All weights"}


def show_plan(
    source: str, archive: str | None, backbone: str, method: str, request: gr.Request
) -> tuple[Any, Any, Any, Any, Any, Any]:
    """What will be trained, before training: data summary, examples, figures, map, the method's sentence, Train enabled."""
    blank = ("", "", "", METHODS.get(method, ""), gr.update(interactive=False))
    try:
        data = open_data(source, archive, session_of(request))
        prepared = build_model(data, backbone, method)
    except MMKitError as error:
        return (f"⚠️ {plain(error)}", *blank)
    firsts = [data.labels.index(i) for i in range(min(len(data.class_names), 10))]
    raw = data.with_transform(None)
    examples = view.strip([(raw[i][0], data.class_names[data.labels[i]]) for i in firsts])
    skipped = f" {len(data.skipped)} unreadable files are left out." if data.skipped else ""
    summary = (
        f"**{len(data.class_names)} classes**: {len(prepared.train):,} pictures to train on, {len(prepared.val):,} held back "
        f"to measure.{skipped}" + (f" Automatic takes {label_of(prepared)}." if backbone == AUTOMATIC else "")
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
    session = session_of(request)
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
    session_of(request).stop.set()
    return "Stopping after this step ...", gr.update(interactive=False)


def end() -> tuple[Any, Any]:
    """After a run, however it ended."""
    return gr.update(interactive=True), gr.update(interactive=False)


_FIELDS = {
    "data": "Pictures", "data held back": "Pictures held back", "adapter": "Adapter", "backbone": "Backbone",
    "epochs": "Epochs", "lr": "Learning rate", "batch_size": "Batch size", "seed": "Seed", "augment": "Random crops and flips",
}  # fmt: skip


def _in_words_of_the_page(steps: Iterator[Any]) -> Iterator[Any]:
    """A run that differs is told with the names of the page's fields."""
    try:
        yield from steps
    except RunDiffersError as error:
        advice = f"Set them as they were, or untick '{CONTINUE}' to start over."
        raise error.reworded("The page", _FIELDS, advice) from None


def _whole(name: str, value: Any, low: int, high: int) -> int:
    return int(number(name, value, low, high, whole=True))


def _seed(value: Any) -> int:
    return _whole("Seed", value, 0, 2**31 - 1)


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
    augment: str,
    resume: bool,
    request: gr.Request,
) -> Iterator[tuple[Any, ...]]:
    """Train, with the curves growing: yields status, loss curve, accuracy curve, and at the end the result.

    With `resume` the visitor's last run goes on, if it is the same; else a message says what differs.
    """
    session = session_of(request)
    stop = session.stop
    epochs, batch_size, seed = _whole("Epochs", epochs, 1, 50), _whole("Batch size", batch_size, 1, 512), _seed(seed)
    lr = None if lr in (None, "", 0) else number("Learning rate", lr, 1e-7, 1)
    prepared = build_model(open_data(source, archive, session), backbone, method, seed, AUGMENT[augment])
    pictures = session.data[0] if session.data else source
    earlier = session.curves.get(pictures, [])
    session.count += 1
    run = f"{session.count}: {LABELS[method]}"
    losses: list[tuple[int, float]] = []
    points: list[tuple[float, float]] = []
    if resume and session.last_run is None:
        raise InputError(f"There is no run to continue yet. Untick '{CONTINUE}'.")
    folder = session.last_run if resume and session.last_run is not None else session.new_folder("run")
    session.last_run = folder
    keep = (gr.skip(),) * 8
    yield (
        f"Run {run}: preparing ...",
        view.loss_curve([]),
        view.accuracy_curve(earlier, name_of(pictures), epochs),
        *keep,
    )
    options = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed}
    result = None
    for steps, result in _in_words_of_the_page(
        train_in_thread(functools.partial(train_prepared, prepared), stop, output_dir=folder, **options)
    ):
        losses += [(s.step, s.loss) for s in steps]
        for s in steps:
            if "accuracy" in s.metrics and (not points or points[-1][1] != s.metrics["accuracy"]):
                points.append((round(s.step * epochs / s.total, 2), s.metrics["accuracy"]))
        session.keep()
        if result is None and steps:
            last = steps[-1]
            status = f"Run {run}: step {last.step} of {last.total}, epoch {last.epoch}, loss {last.loss:.3f}"
            if points:
                status += f", {view.percent(points[-1][1])} right"
            curves = view.accuracy_curve([*earlier, (run, points)], name_of(pictures), epochs)
            yield (status, view.loss_curve(losses, last.total), curves, *keep)
    assert result is not None  # train_in_thread ends with it or raises
    history = [(h["epoch"], h["accuracy"]) for h in result.fit.history if "accuracy" in h]
    yield finish(session, result, run, pictures, losses, history)


def finish(
    session: Session,
    result: FinetuneResult,
    run: str,
    pictures: str,
    losses: list[tuple[int, float]],
    history: list[tuple[float, float]],
) -> tuple[Any, ...]:
    """Keep the result in the session and say what came out."""
    report = report_of(result)
    session.curves[pictures] = [*session.curves.get(pictures, []), (run, history)][-KEPT_RUNS:]
    shown = {"run": run, "pictures": name_of(pictures), "backbone": label_of(result.prepared)}
    session.runs = [*session.runs, {**report, **shown}][-KEPT_RUNS:]
    ended = "stopped" if report["stopped"] == "cancelled" else report["stopped"]
    status = f"Run {run}: {ended} after {report['steps']} steps."
    table = view.runs_table(session.runs)
    curves = (view.loss_curve(losses), view.accuracy_curve(session.curves[pictures], name_of(pictures)))
    if not report["steps"] or result.folder is None:
        return (status, *curves, gr.update(visible=False), "", None, None, table, "", gr.skip(), gr.skip())
    session.result = result
    adapted = result.prepared.adapter is not None
    archive = result.folder.with_name(f"mmkit-{report['method']}-{uuid.uuid4().hex[:6]}.zip")
    if report["accuracy"] is not None:
        status += (
            f" {view.percent(report['accuracy'])} of {report['val_images']} held-back pictures are right (best epoch)."
        )
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


def name_of(pictures: str) -> str:
    """How the page calls the pictures of a run: the zip by its name."""
    return pictures if pictures == DIGITS else Path(pictures).name


def _trained(request: gr.Request) -> FinetuneResult:
    result = session_of(request).result
    if result is None:
        raise InputError("Nothing is trained yet: press Train first.")
    return result


def pick(event: gr.SelectData, request: gr.Request) -> Image.Image | None:
    """The clicked held-back picture, as it is in the data."""
    result = session_of(request).result
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
    folder = session_of(request).new_folder("merged")
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
        backbone: "auto" (by the size of the pictures), "tiny_vit", "mobilenetv2", "vit_tiny_patch16_224", "convnext_atto" or "resnet10t".
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
        backbone: "auto" (by the size of the pictures), "tiny_vit", "mobilenetv2", "vit_tiny_patch16_224", "convnext_atto" or "resnet10t".
        adapter: "ssf", "lora", "bitfit", "linear_probe" or "full".
        epochs: passes over the pictures, 1 to 50.
        seed: of the split and the start.
    """
    epochs, seed = _whole("epochs", epochs, 1, 50), _seed(seed)
    session = Session()
    prepared = build_model(open_data(UPLOAD if archive else DIGITS, archive, session), backbone, adapter, seed)
    folder = session.new_folder("run")
    training = functools.partial(train_prepared, prepared)
    for steps, result in train_in_thread(training, session.stop, output_dir=folder, epochs=epochs, seed=seed):
        if result is not None:
            yield report_of(result), pack(folder, folder.with_suffix(".zip"))
        elif steps:
            yield {"step": steps[-1].step, "steps": steps[-1].total, "loss": steps[-1].loss}, None


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
        c["seed"] = gr.Number(label="Seed", value=0, precision=0, minimum=0, maximum=2**31 - 1, elem_id="finetune-seed")
        c["augment"] = gr.Radio(
            list(AUGMENT), value="For photographs", label="Random crops and flips", info="Not for digits or text",
            elem_id="finetune-augment",
        )  # fmt: skip
        c["resume"] = gr.Checkbox(
            label=CONTINUE, info="Goes on where it was stopped, or for more epochs", elem_id="finetune-resume"
        )
    with gr.Row():
        c["train"] = gr.Button(
            "Train",
            variant="primary",
            interactive=False,
            elem_id="finetune-train",
            elem_classes=shows("finetune-status", work=True),
        )
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
    settings = [c["epochs"], c["lr"], c["batch"], c["seed"], c["augment"], c["resume"]]
    outputs = [
        c["status"], c["loss"], c["accuracy"], c["result"], c["result_figures"], c["shown"], c["download"], c["runs"],
        c["merge_text"], c["merge"], c["merged"],
    ]  # fmt: skip
    limit: dict[str, Any] = {"concurrency_id": "training", "concurrency_limit": 1}
    started = c["train"].click(begin, None, [*buttons, c["status"], c["result"], c["image"]], queue=False, **private)
    done = started.then(
        train, [*chosen, *settings], outputs, show_progress="minimal", show_progress_on=c["status"], **limit, **private
    )
    for ended in (done.success, done.failure):  # `then` does not come when a field is refused before the handler runs
        ended(end, None, buttons, queue=False, **private)
    c["stop"].click(stop_training, None, [c["status"], c["stop"]], queue=False, show_progress="hidden", **private)
    c["merge"].click(merge, None, [c["merge_text"], c["merged"]], **private)
    tried = c["image"].change(classify, c["image"], c["label"], show_progress="minimal", **private)
    tried.failure(lambda: None, None, c["label"], **private)
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
    sample="finetune-train",
    picture="finetune-accuracy",
    load=lambda: [load_weights(name) for name in ("tiny_vit", "mobilenetv2")],
)
