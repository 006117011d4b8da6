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
from mmkit.errors import InputError

MODEL = "video_motion"
MAX_SECONDS = 600
"""Longer videos are refused on this page."""

ANY = "any direction"
DIRECTIONS = (ANY, "moves left", "moves right", "moves up", "moves down", "stands still")
FORWARDS, BACKWARDS = "Forwards", "Backwards"
SEPARATE, MERGED = "Adapters separate", "Adapters merged"

HELP = """
**1.** Draw a clip or drop a video of your own. **2.** Read what moves where, second by second. **3.** Play it *backwards*: the
frames are the same, only their order is new, and left becomes right. A model that averages frames cannot tell.
**4.** Switch to *merged*: same answer, fewer parameters, nothing left to compute for the adapters.

The bundled model is tiny and was trained on drawn clips: it tells where **one bright object** goes over a **darker, still background**.
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


def timeline(result: Any) -> Any:
    """A figure of every class's score over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    axes = figure.subplots()
    edges = [result.windows[0].start, *[w.end for w in result.windows]]
    if len(result.windows) == 1:
        best = np.argsort(result.windows[0].scores)
        axes.barh([result.class_names[i] for i in best], result.windows[0].scores[best], color="#0d9488")
        axes.set(xlim=(0, 1), xlabel="score for the whole clip")
    else:
        scores = np.array([w.scores for w in result.windows]).T
        image = axes.imshow(
            scores, aspect="auto", cmap="YlGnBu", vmin=0, vmax=1, extent=(edges[0], edges[-1], len(scores), 0)
        )
        axes.set_yticks(np.arange(len(scores)) + 0.5, result.class_names)
        axes.set_xlabel("seconds")
        figure.colorbar(image, ax=axes, label="score")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


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
        return None, None, None, None, "Draw a clip or drop a video."
    from mmkit.video import VideoReader

    try:
        with VideoReader(video) as reader:
            if reader.duration > MAX_SECONDS:
                raise InputError(f"The video is {reader.duration:.0f} s long; this page takes up to {MAX_SECONDS} s.")
        result = classifier(form == MERGED)(
            video, window=seconds_per_window, backwards=direction == BACKWARDS, progress=False
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


def make_playable(video: str | None) -> Any:
    """A copy that the browser plays, where it does not play the uploaded file (AVI and the like)."""
    from mmkit.video import browser_copy

    try:
        copy = str(browser_copy(video, output_folder())) if video else video
    except InputError:  # `classify` looks at the same file and says what is wrong
        return gr.skip()
    return gr.skip() if copy == video else copy


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
def head_map() -> Any:
    """A figure of the frame each head of each block looks at."""
    from matplotlib.figure import Figure

    table = np.array(classifier().model.adapter.offsets())
    figure = Figure(figsize=(7.2, 0.6 * len(table) + 1.2), layout="constrained")
    axes = figure.subplots()
    limit = max(1, int(np.abs(table).max()))
    axes.imshow(table, cmap="RdBu", vmin=-2 * limit, vmax=2 * limit, aspect="auto")
    words = {0: "own frame"}
    for (block, head), offset in np.ndenumerate(table):
        text = words.get(
            int(offset), f"{abs(offset)} frame{'s' if abs(offset) > 1 else ''}\n{'back' if offset < 0 else 'ahead'}"
        )
        axes.text(head, block, text, ha="center", va="center", fontsize=9)
    axes.set_xticks(range(table.shape[1]), [f"head {i + 1}" for i in range(table.shape[1])])
    axes.set_yticks(range(table.shape[0]), [f"block {i + 1}" for i in range(table.shape[0])])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def build() -> None:
    """The page."""
    gr.Markdown(HELP, elem_id="video-help")
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            video = gr.Video(label="Clip", sources=["upload"], height=280, elem_id="video-clip")
            wanted = gr.Dropdown(list(DIRECTIONS), value=ANY, label="Draw an object that", elem_id="video-direction")
            draw = gr.Button("Draw a clip", variant="primary", elem_id="video-draw")
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
                    plot = gr.Plot(label="Scores", show_label=False, elem_id="video-plot")
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
                    heads = gr.Plot(label="Frame offsets", show_label=False, elem_id="video-heads")
    controls: list[Any] = [video, window, play, form]
    gr.on(
        [c.change for c in controls],
        classify,
        inputs=controls,
        outputs=[label, strip, plot, table, status],
        api_name="video_classify",
        trigger_mode="always_last",
        show_progress="minimal",
    )
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
)
