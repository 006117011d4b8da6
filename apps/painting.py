"""What the pages around the bundled text-to-image model have in common: the model, its prompts, rows of pictures, the loss."""

from __future__ import annotations

import functools
import threading
from typing import Any

import gradio as gr
from PIL import Image

from mmkit.apps.handlers import plain
from mmkit.charts import Line, line_chart
from mmkit.diffusion import TextToImagePipeline
from mmkit.errors import InputError

EVERY = 25
"""Steps of a training between looks at what the model draws by now."""

_loading = threading.Lock()
drawing = threading.Lock()
"""Held while a pipeline is asked: its sampler keeps its place in itself."""


@functools.cache
def _load() -> TextToImagePipeline:
    return TextToImagePipeline()


def base() -> TextToImagePipeline:
    """The model as it comes, loaded at first use and shared by all visitors."""
    with _loading:
        return _load()


def prompts_of(text: str) -> list[str]:
    """The lines of the field. Raises `InputError` when there are none, or too many."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    if not 1 <= len(lines) <= 8:
        raise InputError(f"Give one to eight prompts, one a line; found {len(lines)}.")
    return lines


def words_about(prompts: list[str]) -> str:
    """A sentence about words the model does not know, or none."""
    unknown = list(dict.fromkeys(w for p in prompts for w in base().unknown_words(p)))
    return f"The model does not know: {', '.join(plain(w) for w in unknown)}." if unknown else ""


def row(
    draw: TextToImagePipeline, prompts: list[str], seed: int, strengths: dict[str, float] | None = None
) -> Image.Image:
    """One picture per prompt, side by side; at `strengths` of its adapters, by default as they stand."""
    with drawing:
        return draw(prompts, seed=seed, strengths=strengths).plot(len(prompts))


def loss_curve(losses: list[tuple[int, float]], total: int | None = None) -> str:
    """The loss against steps, averaged over ten."""
    values = [v for _, v in losses]
    smooth = [(step, sum(values[max(0, i - 9) : i + 1]) / min(i + 1, 10)) for i, (step, _) in enumerate(losses)]
    top = max((v for _, v in smooth), default=1.0) * 1.05
    end = float(total or (losses[-1][0] if losses else 1))
    note = f"{smooth[-1][1]:.3f}" if smooth else ""
    return line_chart("Loss", "step", [Line("", smooth)], (0, max(end, 2)), (0, top), note=note)


def pixels(elem_id: str, title: str) -> Any:
    """A heading and a place for a row of pictures, every pixel as it is."""
    gr.Markdown(f"#### {title}")
    return gr.Image(
        label=title, show_label=False, type="pil", format="png", interactive=False, buttons=["download"], elem_id=elem_id
    )  # fmt: skip
