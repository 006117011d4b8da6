"""Click segmentation: drop a photo, get a mask at once, correct it with clicks, take the cut-out."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw

from mmkit.apps.frame import App, Sessions, output_folder, readable
from mmkit.errors import InputError
from mmkit.vision.interactive import RANDOM_WALKER, InteractiveSegmenter, Mask

MODELS_VARIABLE = "MMKIT_SEGMENT_MODELS"
"""Environment variable: folders of further models (SqueezeSAM, SAM, SAM 2), separated as in PATH."""

ADD, REMOVE, BOX = "Add", "Remove", "Box (two corners)"
LARGEST_SIDE = 2048
_TINT = (0, 170, 160)


SESSIONS: Sessions[InteractiveSegmenter] = Sessions()


def model_choices() -> list[str]:
    """Bundled SqueezeSAM weights, the random walker, and the folders of `MODELS_VARIABLE`."""
    from mmkit.weights import list_weights, weight_entry

    bundled = [name for name in list_weights() if weight_entry(name).model.startswith("squeeze_sam")]
    folders = [f for f in os.environ.get(MODELS_VARIABLE, "").split(os.pathsep) if f]
    return [*bundled, RANDOM_WALKER, *folders]


@functools.lru_cache(maxsize=3)
def load_engine(name: str) -> Any:
    """The engine of one of `model_choices()`, loaded once."""
    if name not in model_choices():
        raise InputError("No model of that name is offered here.")
    return InteractiveSegmenter(name).engine


def draw(segmenter: InteractiveSegmenter, opacity: float, corner: tuple[int, int] | None = None) -> Image.Image:
    """The picture with mask, clicks (green adds, red removes) and box."""
    assert segmenter.image is not None
    picture = segmenter.mask.overlay(_TINT, opacity) if segmenter.mask else segmenter.image.copy()
    pen = ImageDraw.Draw(picture)
    r = max(4, max(picture.size) // 90)
    if segmenter.box:
        pen.rectangle(segmenter.box, outline=(255, 200, 0), width=max(2, r // 3))
    for x, y, positive in segmenter.clicks:
        fill = (40, 190, 80) if positive else (225, 50, 50)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline="white", width=max(2, r // 4))
        pen.line((x - r / 2, y, x + r / 2, y), fill="white", width=max(2, r // 4))
        if positive:
            pen.line((x, y - r / 2, x, y + r / 2), fill="white", width=max(2, r // 4))
    if corner:
        x, y = corner
        pen.line((x - 2 * r, y, x + 2 * r, y), fill=(255, 200, 0), width=3)
        pen.line((x, y - 2 * r, x, y + 2 * r), fill=(255, 200, 0), width=3)
    return picture


def describe(segmenter: InteractiveSegmenter, seconds: float | None, note: str = "") -> str:
    """The status line: latency, clicks, area, the model's own estimate."""
    mask = segmenter.mask
    if mask is None:
        return note or "Click the object you want."
    parts = [note] if note else []
    if seconds is not None:
        parts.append(f"**{1000 * seconds:.0f} ms**")
    parts.append(f"{len(segmenter.clicks)} click{'s' if len(segmenter.clicks) != 1 else ''}")
    parts.append(f"{100 * mask.binary.mean():.1f} % of the picture")
    if np.isfinite(mask.iou):
        parts.append(f"the model expects {100 * min(max(mask.iou, 0), 1):.0f} % overlap")
    return " · ".join(parts)


def export(mask: Mask | None) -> tuple[str | None, str | None]:
    """Files for the download buttons: cut-out PNG and COCO RLE JSON, under a random folder."""
    if mask is None:
        return None, None
    folder = output_folder()
    return str(mask.save(folder / "cutout.png")), str(mask.save(folder / "mask.json"))


def _outputs(
    segmenter: InteractiveSegmenter, opacity: float, seconds: float | None, note: str = "", corner: Any = None
) -> tuple[Any, ...]:
    """Values of the shared outputs: picture, cut-out, status, corner, two downloads."""
    mask = segmenter.mask
    png, record = export(mask)
    return (
        draw(segmenter, opacity, corner),
        mask.cutout() if mask else None,
        describe(segmenter, seconds, note),
        corner,
        gr.DownloadButton(value=png, interactive=png is not None),
        gr.DownloadButton(value=record, interactive=record is not None),
    )


@readable
def on_upload(image: Image.Image | None, model: str, opacity: float) -> tuple[Any, ...]:
    """A new picture: a session of its own and a first proposal."""
    if image is None:
        return (None, *on_clear()[1:])
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    segmenter = InteractiveSegmenter(load_engine(model))
    start = time.perf_counter()
    segmenter.set_image(image)
    prompt = segmenter.propose()
    seconds = time.perf_counter() - start
    sure = "Proposed" if prompt.confidence >= 0.2 else "Nothing stands out, so this is a guess at the centre"
    return SESSIONS.add(segmenter), *_outputs(segmenter, opacity, seconds, sure)


def on_sample(model: str, opacity: float) -> tuple[Any, ...]:
    """The sample picture instead of one's own."""
    return on_upload(Image.open(sample_picture()).convert("RGB"), model, opacity)


def on_clear() -> tuple[Any, ...]:
    """The picture was removed: forget everything."""
    off = gr.DownloadButton(value=None, interactive=False)
    return None, None, None, "Drop a photo to begin.", None, off, off


@readable
def on_click(
    key: str | None, mode: str, corner: tuple[int, int] | None, opacity: float, event: gr.SelectData
) -> tuple[Any, ...]:
    """A click on the picture, in its own pixels."""
    segmenter = SESSIONS.get(key)
    x, y = (int(v) for v in event.index)
    start = time.perf_counter()
    if mode == BOX:
        if corner is None:
            return _outputs(segmenter, opacity, None, "Now click the opposite corner", (x, y))
        segmenter.set_box(corner[0], corner[1], x, y)
    else:
        segmenter.add_click(x, y, positive=mode == ADD)
    return _outputs(segmenter, opacity, time.perf_counter() - start)


@readable
def on_history(key: str | None, opacity: float, step: str) -> tuple[Any, ...]:
    """Undo, redo, or forget all clicks."""
    segmenter = SESSIONS.get(key)
    {"undo": segmenter.undo, "redo": segmenter.redo, "clear": segmenter.reset}[step]()
    return _outputs(segmenter, opacity, None)


@readable
def on_opacity(key: str | None, opacity: float) -> Any:
    """Redraw only."""
    return draw(SESSIONS.get(key), opacity) if key else gr.skip()


@readable
def on_model(key: str | None, model: str, opacity: float) -> tuple[Any, ...]:
    """Another model for the same picture: the same clicks again."""
    if not key:
        return (gr.skip(),) * 7
    old = SESSIONS.get(key)
    segmenter = InteractiveSegmenter(load_engine(model))
    start = time.perf_counter()
    segmenter.set_image(old.image)  # type: ignore[arg-type]
    if old.box:
        segmenter.set_box(*old.box)
    for x, y, positive in old.clicks:
        segmenter.add_click(x, y, positive)
    return SESSIONS.add(segmenter), *_outputs(
        segmenter, opacity, time.perf_counter() - start, "Same clicks, other model"
    )


@readable
def segment(image: Image.Image | None, prompt: dict[str, Any] | None, model: str | None) -> dict[str, Any]:
    """Segment one object of a picture, without a session.

    Args:
        image: the picture.
        prompt: {"points": [[x, y], ...], "labels": [1 inside or 0 outside, ...], "box": [x0, y0, x1, y1]} in pixels, each part
            optional; without points and box the most salient object is taken.
        model: one of the offered models; the first if empty.

    Returns:
        {"segmentation": COCO run-length encoding, "polygons": [...], "predicted_iou": number or null}.
    """
    choices = model_choices()
    if image is None:
        raise InputError("Give a picture.")
    prompt = prompt or {}
    if not isinstance(prompt, dict) or set(prompt) - {"points", "labels", "box"}:
        raise InputError('The prompt must be like {"points": [[x, y]], "labels": [1], "box": [x0, y0, x1, y1]}.')
    segmenter = InteractiveSegmenter(load_engine(model or choices[0]))
    mask = segmenter(image, prompt.get("points") or [], prompt.get("labels"), prompt.get("box"))
    estimate = mask.iou if np.isfinite(mask.iou) else None
    return {"segmentation": mask.rle(), "polygons": mask.polygons(), "predicted_iou": estimate}


def sample_picture() -> Path:
    """A public-domain portrait that comes with matplotlib."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def build() -> None:
    """The page."""
    choices = model_choices()
    labelled = [(Path(name).name, name) for name in choices]
    key, corner = gr.State(None), gr.State(None)
    with gr.Row():
        with gr.Column(scale=3):
            picture = gr.Image(
                label="Photo: click what you want", type="pil", sources=["upload", "clipboard"], format="png", height=520,
                buttons=["fullscreen"], elem_id="segment-picture",
            )  # fmt: skip
            mode = gr.Radio([ADD, REMOVE, BOX], value=ADD, label="A click means", elem_id="segment-mode")
            with gr.Row():
                sample = gr.Button("Try a sample photo", elem_id="segment-sample")
                undo = gr.Button("Undo", elem_id="segment-undo")
                redo = gr.Button("Redo", elem_id="segment-redo")
                clear = gr.Button("Clear clicks", elem_id="segment-clear")
            status = gr.Markdown("Drop a photo to begin.", elem_id="segment-status")
        with gr.Column(scale=2):
            cutout = gr.Image(
                label="Cut-out", type="pil", interactive=False, format="png", image_mode="RGBA", height=400,
                buttons=["fullscreen"], elem_id="segment-cutout",
            )  # fmt: skip
            with gr.Row():
                png = gr.DownloadButton("Cut-out (PNG)", interactive=False, variant="primary", elem_id="segment-png")
                record = gr.DownloadButton("Mask (COCO JSON)", interactive=False, elem_id="segment-json")
            opacity = gr.Slider(0, 1, value=0.5, step=0.05, label="Mask opacity", elem_id="segment-opacity")
            model = gr.Dropdown(
                labelled, value=choices[0], label="Model", elem_id="segment-model",
                info="squeezesam-photo is small and was trained mostly on cats and dogs; random-walker follows colours only.",
            )  # fmt: skip
    shared = [picture, cutout, status, corner, png, record]
    quick: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private"}
    picture.upload(on_upload, [picture, model, opacity], [key, *shared], **quick)
    sample.click(on_sample, [model, opacity], [key, *shared], **quick)
    picture.clear(on_clear, None, [key, *shared], **quick)
    picture.select(on_click, [key, mode, corner, opacity], shared, trigger_mode="always_last", **quick)
    for button, step in ((undo, "undo"), (redo, "redo"), (clear, "clear")):
        button.click(functools.partial(on_history, step=step), [key, opacity], shared, **quick)
    opacity.release(on_opacity, [key, opacity], picture, **quick)
    mode.change(lambda: None, None, corner, **quick)
    model.input(on_model, [key, model, opacity], [key, *shared], **quick)
    endpoint = [gr.Image(type="pil", visible=False), gr.JSON(visible=False), gr.Textbox(visible=False)]
    gr.Button(visible=False).click(segment, endpoint, gr.JSON(visible=False), api_name="segment")


APP = App(
    "segment",
    "Click segmentation",
    "Drop a photo: the most salient object is selected at once. Click to add, switch to Remove to take parts away, undo freely, "
    "and download the cut-out.",
    build,
)
