"""Video: what happens in a clip, when, and which heads look at which frame; play it backwards, merge the adapters."""

from __future__ import annotations

import functools
import random
import threading
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageDraw

from mmkit.apps.frame import App, output_folder, readable
from mmkit.apps.handlers import wanted
from mmkit.apps.look import shows
from mmkit.charts import heat_chart
from mmkit.errors import InputError

MODEL = "video_motion"
MAX_SECONDS = 600
"""Longer videos are refused on this page."""
MAX_PIXELS = 10_000_000_000
"""Pixels of all frames together: a minute or two of work, three minutes of 1920 x 1080 at 30 frames a second."""

ANY = "any direction"
DIRECTIONS = (ANY, "moves left", "moves right", "moves up", "moves down", "stands still")
BEGIN = "Draw a clip or drop a video."
FORWARDS, BACKWARDS = "Forwards", "Backwards"
SEPARATE, MERGED = "Adapters separate", "Adapters merged"

HELP = """
**1.** Draw a clip or drop a video of your own. **2.** Read what moves where, second by second. **3.** Play it *backwards*: the
frames are the same, only their order is new, and left becomes right. A model that averages frames cannot tell.
**4.** Switch to *merged*: same answer, fewer parameters, nothing left to compute for the adapters.

The bundled model is tiny and was trained on drawn clips: it tells where **one object** goes over **still ground**, or that the whole
picture moves, as under a panning camera. Several objects that go different ways and actions are out of its reach.
"""


@functools.cache
def _load(merged: bool) -> Any:
    from mmkit.backbones import load_weights
    from mmkit.pipelines import pipeline

    model: Any = load_weights(MODEL)
    return pipeline("video-classification", model.merge() if merged else model)


_lock = threading.Lock()


def classifier(merged: bool = False) -> Any:
    """The pipeline behind the page, loaded at first use and shared by all visitors."""
    with _lock:
        return _load(merged)


@readable
def draw_clip(direction: str = ANY) -> str:
    """Draw a two-second clip of one moving object.

    Args:
        direction: "moves left", "moves right", "moves up", "moves down", "stands still" or "any direction".
    """
    from mmkit.data.drawn.motion import MOTIONS, drawn_motion
    from mmkit.video import write_video

    if direction not in DIRECTIONS:
        raise InputError(f"direction must be one of {DIRECTIONS}, not {direction!r}.")
    label = random.randrange(4) if direction == ANY else MOTIONS.index(direction)
    clips, _ = drawn_motion(
        1, torch.Generator().manual_seed(random.getrandbits(31)), size=240, num_frames=24, label=label
    )
    frames = (clips[0] * 255).byte().permute(0, 2, 3, 1).contiguous()
    return str(write_video(output_folder() / "drawn clip.mp4", frames, fps=12))


def film_strip(frames: np.ndarray[Any, Any], seconds: np.ndarray[Any, Any], height: int = 120) -> Image.Image:
    """The frames in a row with transparent gaps, the time of each written into its corner."""
    width = max(1, round(frames.shape[2] * height / frames.shape[1]))
    strip = Image.new("RGBA", (len(frames) * (width + 6) - 6, height))
    pen = ImageDraw.Draw(strip)
    for i, (frame, second) in enumerate(zip(frames, seconds, strict=True)):
        x = i * (width + 6)
        strip.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST), (x, 0))
        pen.rectangle((x, height - 22, x + 56, height), fill=(15, 23, 42))
        pen.text((x + 4, height - 19), f"{second:.2f} s", fill="white", font_size=15)
    return strip


def timeline(result: Any) -> str:
    """A chart of every class's score over time."""
    stretches = [(w.start, w.end, [float(v) for v in w.scores]) for w in result.windows]
    return heat_chart("Scores over time", result.class_names, stretches)


def nothing(status: str = BEGIN) -> tuple[Any, ...]:
    """The page without an answer."""
    return None, None, "", None, status


@readable
def classify(
    video: str | None, seconds_per_window: float = 2.0, direction: str = FORWARDS, form: str = SEPARATE
) -> tuple[Any, ...]:
    """Say what moves where in a video, and when.

    Args:
        video: the clip.
        seconds_per_window: length of the stretches that get their own answer.
        direction: "Forwards" or "Backwards".
        form: "Adapters separate" or "Adapters merged".
    """
    if video is None:
        return nothing()
    check = wanted()
    try:
        _require_short(video)
        result = classifier(form == MERGED)(
            video,
            window=seconds_per_window,
            backwards=direction == BACKWARDS,
            progress=False,
            on_progress=lambda done, total: check(),
        )
    except InputError as error:  # the visitor knows the file's name, not where the server keeps it
        raise InputError(str(error).replace(video, Path(video).name)) from error
    label = dict(zip(result.labels, result.scores, strict=True))
    rows = [[f"{s['start']:.1f} - {s['end']:.1f} s", s["label"], f"{s['score']:.0%}"] for s in result.segments()]
    status = (
        f"{result.num_frames} frames, {result.duration:.1f} s at {result.fps:.4g} fps, {len(rows)} "
        f"window{'s' if len(rows) > 1 else ''}, played {direction.lower()}: {result.label} ({result.scores[0]:.0%}). {result.damage}"
    ).rstrip()
    return label, film_strip(result.strip, result.strip_seconds), timeline(result), rows, status


def _require_short(video: str) -> None:
    """Raise `InputError` when a video would take longer than this page wants to work."""
    from mmkit.video import VideoReader

    with VideoReader(video) as reader:
        if reader.duration > MAX_SECONDS:
            raise InputError(f"The video is {reader.duration:.0f} s long; this page takes up to {MAX_SECONDS} s.")
        if len(reader) * reader.width * reader.height > MAX_PIXELS:
            raise InputError(
                f"The video has {len(reader)} frames of {reader.width} x {reader.height}, more than this page decodes. Cut it, or make "
                "its frames smaller."
            )


def _needs_copy(video: str | None) -> bool:
    """Whether the page will put a playable copy in the place of an uploaded file (AVI and the like)."""
    from mmkit.video import plays_in_browser

    try:
        return bool(video) and not plays_in_browser(str(video))
    except InputError:  # `classify` looks at the same file and says what is wrong
        return False


@readable
def make_playable(video: str | None) -> Any:
    """A copy that the browser plays, where it does not play the uploaded file."""
    from mmkit.video import browser_copy

    if video is None or not _needs_copy(video):
        return gr.skip()
    try:
        _require_short(video)
        return str(browser_copy(video, output_folder()))
    except InputError as error:
        raise InputError(str(error).replace(video, Path(video).name)) from error


def on_change(video: str | None, *settings: Any) -> tuple[Any, ...]:
    """Classify what the page shows, once: a file whose playable copy is on its way waits for it."""
    return (gr.skip(),) * 5 if _needs_copy(video) else classify(video, *settings)


@readable
def compare() -> tuple[list[list[str]], str]:
    """Run one clip through the model with separate and with merged adapters: same answer, cheaper."""
    found = classifier().compare_merged(rounds=15)
    rows = [
        [name, f"{found['parameters'][key]:,}", f"{found['milliseconds'][key]:.1f} ms"]
        for name, key in ((SEPARATE, "unmerged"), (MERGED, "merged"))
    ]
    return rows, (
        f"Largest difference between the two answers: {found['difference']:.1e} (logits). "
        f"Merged takes {found['time_ratio']:.2f} x the time."
    )


@readable
def head_map() -> str:
    """A table of the frame each head of each block looks at, as HTML."""

    def cell(offset: int) -> str:
        frames = f"{abs(offset)} frame{'s' if abs(offset) > 1 else ''}"
        return (
            f'<td class="{"back" if offset < 0 else "ahead"}">{frames} {"back" if offset < 0 else "ahead"}</td>'
            if offset
            else "<td>own frame</td>"
        )

    offsets = classifier().model.adapter.offsets()
    head = "".join(f"<th>head {i + 1}</th>" for i in range(len(offsets[0])))
    rows = "".join(
        f"<tr><th>block {i + 1}</th>{''.join(cell(int(v)) for v in row)}</tr>" for i, row in enumerate(offsets)
    )
    return f'<table class="video-heads"><tr><th></th>{head}</tr>{rows}</table>'


def build() -> None:
    """The page."""
    gr.Markdown(HELP, elem_id="video-help")
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            video = gr.Video(label="Clip", sources=["upload"], height=280, elem_id="video-clip")
            wanted = gr.Dropdown(list(DIRECTIONS), value=ANY, label="Draw an object that", elem_id="video-direction")
            draw = gr.Button("Draw a clip", variant="primary", elem_id="video-draw", elem_classes=shows("video-label"))
            play = gr.Radio([FORWARDS, BACKWARDS], value=FORWARDS, label="Play it to the model", elem_id="video-play")
            form = gr.Radio([SEPARATE, MERGED], value=SEPARATE, label="Model", elem_id="video-form")
            window = gr.Slider(
                0.5,
                10,
                2,
                step=0.5,
                label="Seconds per answer",
                info="eight frames are spread over each stretch",
                elem_id="video-window",
            )
        with gr.Column(scale=2, min_width=320):
            label = gr.Label(label="What it sees", num_top_classes=3, elem_id="video-label")
            gr.Markdown("**The frames the model sees**: those of the first stretch, in the order played.")
            strip = gr.Image(
                label="Frames",
                show_label=False,
                type="pil",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="video-strip",
            )
            status = gr.Textbox(label="Summary", interactive=False, elem_id="video-status")
            with gr.Tabs():
                with gr.Tab("Over time"):
                    plot = gr.HTML(elem_id="video-plot")
                    table = gr.Dataframe(
                        headers=["When", "What", "Score"], interactive=False, label="Answers", elem_id="video-table"
                    )
                with gr.Tab("Merged or not", id="merge"):
                    run = gr.Button("Measure both forms", elem_id="video-compare")
                    forms = gr.Dataframe(
                        headers=["Form", "Parameters", "CPU time of one clip"],
                        interactive=False,
                        label="Cost",
                        elem_id="video-forms",
                    )
                    verdict = gr.Textbox(label="Difference", interactive=False, elem_id="video-verdict")
                with gr.Tab("Heads") as heads_tab:
                    gr.Markdown(
                        "Each attention head reads one frame: its own, or a neighbour's. That is all that sees motion."
                    )
                    heads = gr.HTML(elem_id="video-heads")
    controls: list[Any] = [video, window, play, form]
    answer: list[Any] = [label, strip, plot, table, status]
    asked = gr.on(
        [c.change for c in controls],
        on_change,
        inputs=controls,
        outputs=answer,
        api_visibility="private",
        trigger_mode="always_last",
        show_progress="minimal",
    )
    asked.failure(lambda: nothing("No answer: see the message."), outputs=answer, api_visibility="private")
    gr.Button(visible=False).click(classify, controls, answer, api_name="video_classify")
    video.upload(make_playable, inputs=video, outputs=video, api_visibility="private", show_progress="minimal")
    draw.click(draw_clip, inputs=wanted, outputs=video, api_name="video_draw")
    gr.on(None, draw_clip, outputs=video, api_visibility="private")  # once, when the page opens
    run.click(compare, outputs=[forms, verdict], api_name="video_compare")
    heads_tab.select(head_map, outputs=heads, api_visibility="private")


APP = App(
    "video",
    "Video",
    "See what moves where in a clip, and when. A small image transformer recognises motion because some of its heads look at "
    "neighbouring frames; play the clip backwards, or merge its adapters, and compare.",
    build,
    picture="video-strip",
    load=classifier,
)
