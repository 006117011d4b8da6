"""Medical segmentation: drop a picture or a volume, look through the slices, read the measures, compare with the truth."""

from __future__ import annotations

import contextlib
import functools
import html
import math
import os
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from mmkit.apps.frame import App, Sessions, output_folder, readable
from mmkit.apps.handlers import moved, plain, wanted, with_limit
from mmkit.apps.look import shows
from mmkit.errors import InputError
from mmkit.storage import write_json
from mmkit.vision.medical import (
    MedicalSegmentationPipeline,
    SegmentationResult,
    Volume,
    color_of,
    is_volume,
    load_labels,
)

MODELS_VARIABLE = "MMKIT_MEDICAL_MODELS"
"""Environment variable: folders of further models (written by `save_pretrained`), separated as in PATH."""

AUTOMATIC = "Automatic"
AXES = {"Axial (Z)": 2, "Coronal (Y)": 1, "Sagittal (X)": 0}
PREDICTION, OUTLINES, TRUTH, NOTHING = "Prediction", "Outlines", "Ground truth", "Nothing"
MAX_PICTURE = 4_200_000
"""Pixels of a picture on this page: about a minute on one core. `MedicalSegmentationPipeline` itself takes larger ones."""
MAX_WINDOWS = 256
"""Inputs that need more windows than this are refused: they would take minutes on a CPU."""

BEGIN = "Drop a picture or a volume to begin, or try a sample."
FAILED = "No result: see the message."
_HEADERS = ["Class", "Objects", "Size", "Share", "Mean score", "Dice"]
SESSIONS: Sessions[Any] = Sessions(limit=12)
_PROGRESS = gr.Progress()


def model_choices() -> list[str]:
    """Bundled weights, the default first, then the folders of `MODELS_VARIABLE`."""
    from mmkit.weights import list_weights, weight_entry

    bundled = [name for name in list_weights() if weight_entry(name).model.startswith(("lightm_unet", "unet"))]
    bundled.sort(key=lambda name: name != MedicalSegmentationPipeline.default_weights)
    return [*bundled, *(f for f in os.environ.get(MODELS_VARIABLE, "").split(os.pathsep) if f)]


@functools.lru_cache(maxsize=8)
def load_pipeline(name: str) -> MedicalSegmentationPipeline:
    """The pipeline of one of `model_choices()`, loaded once."""
    if name not in model_choices():
        raise InputError("No model of that name is offered here.")
    return MedicalSegmentationPipeline(name)


def choose_pipeline(name: str | None, source: Any) -> MedicalSegmentationPipeline:
    """The named model; with "Automatic" the one for pictures or volumes whose training data the input resembles most."""
    if name and name != AUTOMATIC:
        return load_pipeline(name)
    volume = is_volume(source)
    fitting = [p for p in map(load_pipeline, model_choices()) if (p.dims == 3) == volume]
    if not fitting:
        kind = "volumes" if volume else "pictures"
        raise InputError(f"No model for {kind} is installed; train one and name its folder in {MODELS_VARIABLE}.")
    return (
        min(fitting, key=lambda p: math.inf if (far := p.unlike(source)) is None else far)
        if fitting[1:]
        else fitting[0]
    )


def predict(
    source: Any, model: str | None, truth: Any = None, progress: Any = None
) -> tuple[SegmentationResult, np.ndarray | None]:
    """Result and ground truth (or None) of a file, array or volume.

    Raises `InputError` when they cannot be read or do not fit together; it names files, not where the server keeps them.
    """
    try:
        return _predict(source, model, truth, progress)
    except InputError as error:
        message = str(error)
        for file in (source, truth):
            message = message.replace(file, Path(file).name) if isinstance(file, str) else message
        raise InputError(message) from error


def _predict(source: Any, model: str | None, truth: Any, progress: Any) -> tuple[SegmentationResult, np.ndarray | None]:
    if not is_volume(source) and isinstance(source, str):
        with contextlib.suppress(OSError), Image.open(source) as header:  # what PIL cannot open is refused below
            with_limit(header, MAX_PICTURE, "this page")
    pipeline = choose_pipeline(model, source)
    check = wanted()

    def report(done: int, total: int) -> None:
        check()
        if total > MAX_WINDOWS:
            raise InputError(f"This input needs {total} windows; the page takes at most {MAX_WINDOWS}. Crop it first.")
        if progress is not None:
            progress(done / total, desc=f"Window {done} of {total}")

    result = pipeline(source, progress=False, on_progress=report)
    labels = None if truth is None else load_labels(truth, len(result.class_names))
    if labels is not None and labels.shape != result.mask.shape:
        raise InputError(
            f"The ground truth has shape {labels.shape}, the image {result.mask.shape}; they must be equal."
        )
    return result, labels


def table(result: SegmentationResult, truth: np.ndarray | None) -> str:
    """The measures as an HTML table, which wraps on a phone where `gr.Dataframe` widens the page."""
    rows = [_HEADERS]
    for row in result.measures(truth):
        size = f"{row['volume_mm3']:,.0f} mm³" if "volume_mm3" in row else f"{row['area_px']:,.0f} px"
        score = "-" if row["mean_score"] is None else f"{row['mean_score']:.2f}"
        overlap = f"{row['dice']:.3f}" if "dice" in row else "-"
        rows.append([row["class"], str(row["objects"]), size, f"{row['percent']:.2f} %", score, overlap])
    style = "padding:6px 4px;text-align:left;border:0;border-bottom:1px solid var(--border-color-primary)"
    lines = [
        "".join(f'<{tag} style="{style}">{html.escape(cell)}</{tag}>' for cell in row)
        for tag, row in zip(["th"] + ["td"] * len(rows), rows, strict=False)
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    table_style = "width:100%;margin:0;border-collapse:collapse;font-size:.85em"
    return f'<div style="width:0;min-width:100%;overflow-x:auto"><table style="{table_style}">{body}</table></div>'


def alert(result: SegmentationResult) -> str:
    """The result's warning, to stand above everything else that is said; "" without one."""
    style = "border-left:4px solid #d97706;padding:2px 12px;margin:0 0 8px"
    return f'<p role="alert" style="{style}"><b>{plain(result.warning)}</b></p>\n\n' if result.warning else ""


def legend(result: SegmentationResult) -> str:
    """Colored squares with the class names, as Markdown."""
    color = result.outline_color if result.stained else color_of
    squares = [
        f'<i class="studio-swatch" style="background:rgb{color(i)}"></i>{plain(name)}'
        for i, name in enumerate(result.class_names)
        if i
    ]
    return " &nbsp; ".join(squares)


def draw(
    result: SegmentationResult, truth: np.ndarray | None, show: str, opacity: float, axis: str, index: float
) -> Image.Image:
    """The picture, or a slice in true proportions, under the chosen labels; enlarged when it is small."""
    number = AXES.get(axis, 2)
    labels = truth if show == TRUTH and truth is not None else result.mask
    lines = show == OUTLINES or (show == TRUTH and result.stained)
    fill = 0.0 if lines or show == NOTHING else opacity
    picture = result.overlay(fill, int(index), number, labels, outline=result.outline_width if lines else 0)
    flat = result.mask.ndim == 2
    right, up = (1.0, 1.0) if flat else (s for a, s in enumerate(result.upright_spacing) if a != number)
    right, up = min(right / min(right, up), 20.0), min(up / min(right, up), 20.0)  # a header can claim any spacing
    scale = max(1.0, 480 / max(picture.width * right, picture.height * up))
    return picture.resize(
        (round(picture.width * right * scale), round(picture.height * up * scale)), Image.Resampling.BICUBIC
    )


def export(result: SegmentationResult, truth: np.ndarray | None) -> tuple[str, str]:
    """Files for the download buttons: the mask (PNG or NIfTI) and the measures (JSON), under a random folder."""
    folder = output_folder()
    mask = result.save(folder / ("mask.png" if result.mask.ndim == 2 else "mask.nii.gz"))
    write_json(folder / "measures.json", result.record(truth))
    return str(mask), str(folder / "measures.json")


def _show(result: SegmentationResult, truth: np.ndarray | None, opacity: float) -> list[Any]:
    """Every output of the page after a prediction."""
    volume = result.mask.ndim == 3
    axis, best = "Axial (Z)", result.best_slice() if volume else 0
    size = " x ".join(map(str, result.mask.shape))
    note = f"**{size} {'voxels' if volume else 'pixels'}** in {result.seconds:.1f} s"
    if volume:
        note += " · spacing " + " x ".join(f"{s:g}" for s in result.spacing) + " mm"
    mask, record = export(result, truth)
    first = OUTLINES if result.stained else PREDICTION
    layers = [PREDICTION, OUTLINES, *([] if truth is None else [TRUTH]), NOTHING]
    depth = result.upright(result.mask).shape[2] - 1 if volume else 1
    return [
        SESSIONS.add((result, truth)),
        draw(result, truth, first, opacity, axis, best),
        f"{alert(result)}{note} &nbsp; {legend(result)}",
        table(result, truth),
        gr.update(value=axis, visible=volume),
        gr.update(value=best, maximum=depth, visible=volume),
        gr.update(value=first, choices=layers),
        gr.update(value=mask, interactive=True),
        gr.update(value=record, interactive=True),
    ]


@readable
def on_file(file: str | None, truth: str | None, model: str, opacity: float, progress: Any = _PROGRESS) -> list[Any]:
    """A file was dropped, or its truth or the model changed: segment it. The old result is void from here on."""
    SESSIONS.forget()
    if file is None:
        return on_clear()
    progress(0, desc="Reading")
    return _show(*predict(file, model, truth, progress), opacity)


@readable
def on_sample(volume: bool, opacity: float, progress: Any = _PROGRESS) -> list[Any]:
    """A drawn sample with its truth; the file boxes are emptied."""
    from mmkit.data.drawn.scans import sample_picture, sample_volume

    SESSIONS.forget()
    progress(0, desc="Drawing")
    if volume:
        image, labels = sample_volume(7)
        source: Any = Volume(image, (1.0, 1.0, 1.2), np.diag([1.0, 1.0, 1.2, 1.0]))
    else:
        source, labels = sample_picture(7)
    return [None, None, *_show(*predict(source, AUTOMATIC, labels, progress), opacity)]


def on_clear(status: str = BEGIN) -> list[Any]:
    """The file was taken away, or could not be read: an empty page again."""
    SESSIONS.forget()
    hidden = gr.update(visible=False)
    off = gr.update(value=None, interactive=False)
    return [None, None, status, "", hidden, hidden, gr.update(), off, off]


@readable
def on_view(key: str | None, show: str, opacity: float, axis: str, index: float) -> Any:
    """Another slice, opacity or layer."""
    state: Any = SESSIONS.find(key)  # none while another input is at work: its answer will come
    if state is None:
        return gr.skip()
    result, truth = state
    return draw(result, truth, show, opacity, axis, index)


@readable
def on_axis(key: str | None, show: str, opacity: float, axis: str) -> tuple[Any, Any]:
    """Another viewing direction: the slider gets its length and stands at the fullest slice."""
    state: Any = SESSIONS.find(key)
    if state is None:
        return gr.skip(), gr.skip()
    result, truth = state
    best = result.best_slice(AXES[axis])
    slider = gr.update(value=best, maximum=result.upright(result.mask).shape[AXES[axis]] - 1)
    return draw(result, truth, show, opacity, axis, best), slider


@readable
def segment_medical(file: str | None, model: str | None = None, truth: str | None = None) -> tuple[str, dict[str, Any]]:
    """Segment a picture or a NIfTI volume.

    Args:
        file: the picture, .nii or .nii.gz file.
        model: a bundled name; empty chooses by the kind of file.
        truth: a label map of the same size; adds Dice to the measures.

    Returns:
        The mask file (PNG or .nii.gz), and {"spacing": [...], "classes": [measures per class], "unlike": distance from the training
        data over the limit or null, "warning": text to show when that is above 1}.
    """
    if file is None:
        raise InputError("Give a file.")
    result, labels = predict(file, model, truth)
    return export(result, labels)[0], result.record(labels)


def build() -> None:
    """The page."""
    choices = model_choices()
    key = gr.State(None)
    if not choices:
        gr.Markdown(
            f"**No model found.** Train one with `python examples/train_nuclei.py`, or name folders in `{MODELS_VARIABLE}`.",
            elem_id="medical-missing",
        )
    with gr.Row():
        with gr.Column(scale=2):
            file = gr.File(
                label="Picture or NIfTI volume",
                type="filepath",
                height=180,
                elem_id="medical-file",
                elem_classes=shows("medical-view"),
            )
            with gr.Row():
                picture = gr.Button(
                    "Sample picture", elem_id="medical-sample-picture", elem_classes=shows("medical-view")
                )
                volume = gr.Button("Sample volume", elem_id="medical-sample-volume", elem_classes=shows("medical-view"))
            with gr.Accordion("Compare with ground truth", open=False, elem_id="medical-truth-box"):
                truth = gr.File(
                    label="Label map of the same size (PNG or NIfTI)",
                    type="filepath",
                    height=150,
                    elem_id="medical-truth",
                )
            model = gr.Dropdown(
                [AUTOMATIC, *choices], value=AUTOMATIC, label="Model", elem_id="medical-model",
                info="The bundled ones are small: cell nuclei in microscopy, the hippocampus in crops of MRI, blobs in drawn volumes.",
            )  # fmt: skip
            gr.Markdown(
                "Not a medical device: nothing here was validated for clinical decisions.", elem_id="medical-notice"
            )
        with gr.Column(scale=3):
            view = gr.Image(
                label="Segmentation", type="pil", interactive=False, format="png", height=500, buttons=["fullscreen"],
                elem_id="medical-view",
            )  # fmt: skip
            status = gr.Markdown(BEGIN, elem_id="medical-status")
            with gr.Row():
                axis = gr.Radio(
                    list(AXES), value="Axial (Z)", label="View", visible=False, scale=3, elem_id="medical-axis"
                )
                index = gr.Slider(0, 1, value=0, step=1, label="Slice", visible=False, scale=2, elem_id="medical-slice")
            with gr.Row():
                show = gr.Radio(
                    [PREDICTION, OUTLINES, NOTHING], value=PREDICTION, label="Show", scale=3, elem_id="medical-show"
                )
                opacity = gr.Slider(0, 1, value=0.45, step=0.05, label="Opacity", scale=2, elem_id="medical-opacity")
            measures = gr.HTML(padding=False, elem_id="medical-measures")
            with gr.Row():
                mask = gr.DownloadButton("Download mask", interactive=False, variant="primary", elem_id="medical-mask")
                record = gr.DownloadButton("Download measures", interactive=False, elem_id="medical-json")
    shared = [key, view, status, measures, axis, index, show, mask, record]
    private: dict[str, Any] = {"api_visibility": "private", "show_progress_on": view}
    given = [file, truth, model, opacity]
    for asked in (file.upload, truth.upload, truth.clear, model.input):
        asked(on_file, given, shared, **private).failure(functools.partial(on_clear, FAILED), None, shared, **private)
    file.clear(on_clear, None, shared, concurrency_id="medical-view", **private)
    picture.click(functools.partial(on_sample, False), opacity, [file, truth, *shared], **private)
    volume.click(functools.partial(on_sample, True), opacity, [file, truth, *shared], **private)
    # Quick ones in one queue: a view of what was cleared never comes after the clearing.
    view_queue: dict[str, Any] = {"concurrency_id": "medical-view", **private}
    quick: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", **view_queue}
    gr.on(moved(index, opacity, show), on_view, [key, show, opacity, axis, index], view, **quick)
    axis.input(on_axis, [key, show, opacity, axis], [view, index], **quick)
    endpoint = [gr.File(visible=False), gr.Textbox(visible=False), gr.File(visible=False)]
    gr.Button(visible=False).click(
        segment_medical, endpoint, [gr.File(visible=False), gr.JSON(visible=False)], api_name="segment_medical"
    )


APP = App(
    "medical",
    "Medical segmentation",
    "Drop a microscopy picture (PNG, JPEG, TIFF) or a NIfTI volume (.nii, .nii.gz): see the segmentation slice by slice, "
    "read objects and volumes per class, compare with a ground truth, download the mask.",
    build,
    sample="medical-sample-picture",
    picture="medical-view",
    load=lambda: [load_pipeline(name) for name in model_choices()],
)
