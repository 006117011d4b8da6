"""Click segmentation: drop a photo, get a mask at once, correct it with clicks, take the cut-out."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw

from mmkit.apps.frame import App, Sessions, output_folder, readable
from mmkit.apps.handlers import moved, with_limit
from mmkit.apps.look import shows
from mmkit.errors import InputError
from mmkit.vision.clicks import RANDOM_WALKER, InteractiveSegmenter, Mask

MODELS_VARIABLE = "MMKIT_SEGMENT_MODELS"
"""Environment variable: folders of further models (ClickNet, SqueezeSAM, SAM, SAM 2), separated as in PATH."""

ADD, REMOVE, BOX = "Add", "Remove", "Box"
VIEW_SIDE = 1280
"""The photo is shown and clicked at this size at most, so that every click is quick."""
LARGEST_SIDE = 4096
"""Cut-outs have the size of the upload, up to this."""
LARGEST = 4_200_000
"""Pixels of a picture for the endpoint, which works at full size."""
_TINT = (0, 170, 160)
_BEGIN = "Drop a photo to begin, or try the sample below."

_SCRIPT = (Path(__file__).parent / "segment.js").read_text(encoding="utf-8")
_REMOVE_IF_WANTED = f"""(key, mode, ...rest) => {{
  const remove = window.segmentRemove;
  window.segmentRemove = false;
  return [key, remove ? '{REMOVE}' : mode, ...rest];
}}"""


@dataclass(frozen=True)
class Photo:
    """A visitor's photo: the session on its view, and the picture that cut-outs are made of."""

    segmenter: InteractiveSegmenter
    original: Image.Image

    def full(self, mask: Mask) -> Mask:
        """A mask of the view at the size of `original`."""
        return mask if mask.image.size == self.original.size else mask.resized(self.original)


SESSIONS: Sessions[Photo] = Sessions()


def model_choices() -> list[str]:
    """Bundled click models, the default first, the random walker, and the folders of `MODELS_VARIABLE`."""
    from mmkit.weights import list_weights, weight_entry

    bundled = [name for name in list_weights() if weight_entry(name).model.startswith(("clicknet", "squeeze_sam"))]
    folders = [f for f in os.environ.get(MODELS_VARIABLE, "").split(os.pathsep) if f]
    bundled.sort(key=lambda name: name != InteractiveSegmenter.default_weights)
    return [*bundled, RANDOM_WALKER, *folders]


@functools.lru_cache(maxsize=3)
def load_engine(name: str) -> Any:
    """The engine of one of `model_choices()`, loaded once."""
    if name not in model_choices():
        raise InputError("No model of that name is offered here.")
    return InteractiveSegmenter(name).predictor.engine


def draw(segmenter: InteractiveSegmenter, opacity: float, corner: tuple[int, int] | None = None) -> Image.Image:
    """The picture with mask, clicks (green adds, red removes) and box."""
    assert segmenter.image is not None
    mask = segmenter.mask
    picture = mask.overlay(_TINT, opacity) if mask else segmenter.image.copy()
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
    """The status line: latency, clicks, area, the overlap to be expected where that was measured."""
    mask = segmenter.mask
    if mask is None:
        return note or "Click the object you want."
    parts = [note] if note else []
    if seconds is not None:
        parts.append(f"**{1000 * seconds:.0f} ms**")
    parts.append(f"{len(segmenter.clicks)} click{'s' if len(segmenter.clicks) != 1 else ''}")
    if segmenter.box:
        parts.append("1 box")
    parts.append(f"{100 * mask.binary.mean():.1f} % of the picture")
    if segmenter.calibrated and np.isfinite(mask.iou):
        parts.append(f"masks like this overlap {100 * mask.iou:.0f} % with what was meant, on average")
    return " · ".join(parts)


def show(
    segmenter: InteractiveSegmenter, opacity: float, seconds: float | None, note: str = "", corner: Any = None
) -> tuple[Any, ...]:
    """What changes at once: picture, status, corner; the downloads wait for `finish`."""
    wait = gr.DownloadButton(interactive=False)
    return draw(segmenter, opacity, corner), describe(segmenter, seconds, note), corner, wait, wait


def finish(key: str | None) -> tuple[Any, ...]:
    """What may come a moment later: the cut-out shown, and the files of both downloads under a random folder.

    The session is read once: clicks and clearing may come while the files are written, and picture and files are of one mask.
    """
    photo = SESSIONS.find(key)
    mask = photo.segmenter.mask if photo else None
    if photo is None or mask is None:
        return None, gr.DownloadButton(value=None), gr.DownloadButton(value=None)
    folder = output_folder()
    full = photo.full(mask)
    png, record = str(full.save(folder / "cutout.png")), str(full.save(folder / "mask.json"))
    return (
        mask.cutout(),
        gr.DownloadButton(value=png, interactive=True),
        gr.DownloadButton(value=record, interactive=True),
    )


def _photo(key: str | None) -> Photo:
    """The photo that an event was meant for. Raises `InputError` when another has taken its place."""
    photo = SESSIONS.find(key)
    if photo is None:
        raise InputError("This photo has gone; do it again on the new one." if key else "Load a photo first.")
    return photo


@readable
def on_upload(image: Image.Image | None, model: str, opacity: float) -> tuple[Any, ...]:
    """A new picture: a session of its own and a first proposal."""
    SESSIONS.forget()
    if image is None:
        return on_clear()
    size = image.size
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    view = image.copy()
    view.thumbnail((VIEW_SIDE, VIEW_SIDE))
    segmenter = InteractiveSegmenter(load_engine(model))
    start = time.perf_counter()
    segmenter.set_image(view)
    prompt = segmenter.propose()
    seconds = time.perf_counter() - start
    note = "Proposed" if prompt.confidence >= 0.2 else "Nothing stands out, so this is a guess at the centre"
    if size != image.size:
        note = f"Reduced to {image.width}x{image.height} · {note}"
    return SESSIONS.add(Photo(segmenter, image)), *show(segmenter, opacity, seconds, note)


def on_sample(model: str, opacity: float) -> tuple[Any, ...]:
    """The sample picture instead of one's own."""
    return on_upload(Image.open(sample_picture()).convert("RGB"), model, opacity)


def on_clear() -> tuple[Any, ...]:
    """The picture was removed: forget everything."""
    SESSIONS.forget()
    off = gr.DownloadButton(value=None, interactive=False)
    return None, None, _BEGIN, None, off, off


@readable
def on_click(
    key: str | None, mode: str, corner: tuple[int, int] | None, opacity: float, event: gr.SelectData
) -> tuple[Any, ...]:
    """A click on the picture, in the pixels of the view."""
    segmenter = _photo(key).segmenter
    x, y = (int(v) for v in event.index)
    start = time.perf_counter()
    if mode != BOX:
        segmenter.add_click(x, y, positive=mode == ADD)
    elif corner is None:
        return show(segmenter, opacity, None, "Now click the opposite corner", (x, y))
    else:
        segmenter.set_box(corner[0], corner[1], x, y)
    return show(segmenter, opacity, time.perf_counter() - start)


@readable
def on_history(key: str | None, opacity: float, step: str) -> tuple[Any, ...]:
    """Undo, redo, forget all clicks, or another of the masks that fit the same clicks."""
    segmenter = _photo(key).segmenter
    {
        "undo": segmenter.undo,
        "redo": segmenter.redo,
        "clear": segmenter.reset,
        "smaller": segmenter.smaller,
        "larger": segmenter.larger,
    }[step]()
    return show(segmenter, opacity, None)


@readable
def on_opacity(key: str | None, opacity: float, corner: tuple[int, int] | None = None) -> Any:
    """Redraw only."""
    photo = SESSIONS.find(key)
    return draw(photo.segmenter, opacity, corner) if photo else gr.skip()


def on_mode(key: str | None, opacity: float) -> tuple[Any, None]:
    """Another kind of click: a first corner is forgotten."""
    return on_opacity(key, opacity), None


@readable
def on_model(key: str | None, model: str, opacity: float) -> tuple[Any, ...]:
    """Another model for the same picture: the same clicks again."""
    if not key:
        return (gr.skip(),) * 6
    photo = _photo(key)
    old, segmenter = photo.segmenter, InteractiveSegmenter(load_engine(model))
    start = time.perf_counter()
    segmenter.set_image(old.image)  # type: ignore[arg-type]
    if old.box:
        segmenter.set_box(*old.box)
    for x, y, positive in old.clicks:
        segmenter.add_click(x, y, positive)
    shown = show(segmenter, opacity, time.perf_counter() - start, "Same clicks, other model")
    return SESSIONS.add(Photo(segmenter, photo.original)), *shown


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
    with_limit(image, LARGEST, "this endpoint")
    prompt = prompt or {}
    if not isinstance(prompt, dict) or set(prompt) - {"points", "labels", "box"}:
        raise InputError('The prompt must be like {"points": [[x, y]], "labels": [1], "box": [x0, y0, x1, y1]}.')
    segmenter = InteractiveSegmenter(load_engine(model or choices[0]))
    return segmenter(image, prompt.get("points") or [], prompt.get("labels"), prompt.get("box")).record()


def sample_picture() -> Path:
    """A public-domain portrait that comes with matplotlib."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def build() -> None:
    """The page."""
    choices = model_choices()
    labelled = [(Path(name).name, name) for name in choices]
    # Held by the page, not by the server: a click tells which photo it was meant for, also while another is on its way.
    key, corner = gr.Textbox(visible=False), gr.State(None)
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            picture = gr.Image(
                label="Photo", type="pil", sources=["upload", "clipboard"], format="jpeg", height=520,
                placeholder="# Drop a photo here\nor click to choose one", buttons=["fullscreen"], elem_id="segment-picture",
            )  # fmt: skip
            status = gr.Markdown(_BEGIN, elem_id="segment-status")
            mode = gr.Radio(
                [ADD, REMOVE, BOX], value=ADD, label="A click means", elem_id="segment-mode",
                info="A right click, or a long press on a touch screen, always removes. A box takes two clicks: opposite corners. "
                "By keyboard: Tab to the photo, move the cross with the arrow keys (Shift for small steps), Enter clicks, "
                "Shift+Enter or Backspace removes.",
            )  # fmt: skip
            with gr.Row():
                undo = gr.Button("Undo", min_width=90, elem_id="segment-undo")
                redo = gr.Button("Redo", min_width=90, elem_id="segment-redo")
                clear = gr.Button("Clear", min_width=90, elem_id="segment-clear")
            with gr.Row():
                smaller = gr.Button("Smaller mask", min_width=130, elem_id="segment-smaller")
                larger = gr.Button("Larger mask", min_width=130, elem_id="segment-larger")
            sample = gr.Button("Try a sample photo", elem_id="segment-sample", elem_classes=shows("segment-picture"))
        with gr.Column(scale=2, min_width=300):
            cutout = gr.Image(
                label="Cut-out", type="pil", interactive=False, format="png", image_mode="RGBA", height=400,
                buttons=["fullscreen"], elem_id="segment-cutout",
            )  # fmt: skip
            with gr.Row():
                png = gr.DownloadButton(
                    "Save cut-out", interactive=False, variant="primary", min_width=130, elem_id="segment-png"
                )
                record = gr.DownloadButton("Save mask", interactive=False, min_width=130, elem_id="segment-json")
            opacity = gr.Slider(0, 1, value=0.5, step=0.05, label="Mask opacity", elem_id="segment-opacity")
            model = gr.Dropdown(
                labelled, value=choices[0], label="Model", elem_id="segment-model",
                info="clicknet-photo is small and learnt from a thousand photos, clicknet-permissive without share-alike ones; "
                "random-walker follows colors only.",
            )  # fmt: skip
    gr.HTML(js_on_load=_SCRIPT, padding=False)
    first, downloads = [picture, status, corner, png, record], [cutout, png, record]
    # One queue, so that clicks, uploads and undo keep their order.
    quick: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private", "concurrency_id": "segment"}
    steps = {"undo": undo, "redo": redo, "clear": clear, "smaller": smaller, "larger": larger}
    history = [
        button.click(functools.partial(on_history, step=step), [key, opacity], first, **quick)
        for step, button in steps.items()
    ]
    uploaded = picture.upload(on_upload, [picture, model, opacity], [key, *first], **quick)
    for changed in (
        uploaded,
        uploaded.failure(on_clear, None, [key, *first], **quick),
        picture.clear(on_clear, None, [key, *first], **quick),
        picture.select(
            on_click, [key, mode, corner, opacity], first, trigger_mode="multiple", js=_REMOVE_IF_WANTED, **quick
        ),
        sample.click(on_sample, [model, opacity], [key, *first], **quick),
        model.input(on_model, [key, model, opacity], [key, *first], **quick),
        *history,
    ):
        changed.success(finish, key, downloads, show_progress="hidden", api_visibility="private")
    gr.on(moved(opacity), on_opacity, [key, opacity, corner], picture, trigger_mode="always_last", **quick)
    mode.input(on_mode, [key, opacity], [picture, corner], **quick)
    endpoint = [gr.Image(type="pil", visible=False), gr.JSON(visible=False), gr.Textbox(visible=False)]
    gr.Button(visible=False).click(segment, endpoint, gr.JSON(visible=False), api_name="segment")


APP = App(
    "segment",
    "Click segmentation",
    "Drop a photo: what stands out is selected at once. Click what is missing, remove what is too much, and take the cut-out.",
    build,
    sample="segment-sample",
    picture="segment-picture",
    load=lambda: load_engine(model_choices()[0]),
)
