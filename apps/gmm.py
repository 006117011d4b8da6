"""Distance masks: see how far each attention head looks, bend its mask, and watch attention and prediction change."""

from __future__ import annotations

import functools
import math
import random
import threading
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from mmkit.apps.frame import App, readable
from mmkit.apps.handlers import moved
from mmkit.charts import Line, line_chart
from mmkit.data.drawn.pictures import class_names, draw

LAYERS, HEADS, GRID = 3, 4, 8
"""Size of the bundled model `gmm_vit_drawn`; the sliders need it before the model is loaded."""

VIEW = 384
"""Width of the heat maps, in pixels."""

SCOPES = {"This head": "head", "All heads of the layer": "layer", "The whole model": "model"}

CHIP = "color:#fff;border-radius:4px;padding:0 6px;background:"

HELP = f"""
<p><b>1.</b> Draw or upload a picture. <b>2.</b> Pick a layer and a head, and click a patch in any heat map ({GRID} x {GRID}
patches; the white frame is the patch that looks around). <b>3.</b> Move the two sliders.</p>
<p style="margin-top:8px">The mask is a mixture of five Gaussians of the distance between two patches. It multiplies the attention
logits before the softmax: <span style="{CHIP}#b2182b">red</span> strengthens what the head compares,
<span style="{CHIP}#2166ac">blue</span> flips attraction into repulsion, and where it is clear the head ignores content.</p>
"""


@functools.cache
def _load() -> Any:
    from mmkit.pipelines import pipeline

    return pipeline("mask-explorer")


_lock = threading.Lock()


def explorer() -> Any:
    """The model behind the page, loaded at first use and shared by all visitors."""
    with _lock:
        return _load()


def draw_picture() -> Image.Image:
    """A random drawn shape or texture of a class the bundled model knows."""
    names = [n for n in class_names() if not n.startswith("glyph_")]
    return draw(random.choice(names), np.random.default_rng(), 192)


def first_picture(seed: int = 0) -> Image.Image:
    """The picture the page opens with: the first drawn one that the model itself reads right."""
    rng = np.random.default_rng(seed)
    names = [n for n in class_names() if not n.startswith("glyph_")]
    while True:
        name = str(rng.choice(names))
        picture = draw(name, rng, 192)
        scores = explorer()(picture).predictions["trained"]
        if max(scores, key=scores.get) == name:
            return picture


def nothing(status: str = "Draw or upload a picture.") -> tuple[Any, ...]:
    """The page without an answer."""
    return None, None, None, "", None, None, None, status


def profile_chart(view: Any) -> str:
    """The mask against the distance, as trained and with the edit."""
    lines = [
        Line("as trained", list(zip(view.distances, view.trained_profile, strict=True)), dashed=True),
        Line("with your edit", list(zip(view.distances, view.profile, strict=True))),
    ]
    values = [0.0, *view.trained_profile, *view.profile]
    low, high = math.floor(min(values)), max(math.ceil(max(values)), math.floor(min(values)) + 1)
    return line_chart(
        "Factor on the attention logit",
        "distance in patches",
        lines,
        (0, float(max(view.distances))),
        (low, high),
        "{:.1f}",
    )


@readable
def explore(
    image: Image.Image | None,
    layer: int,
    head: int,
    row: int,
    column: int,
    alpha_scale: float,
    sigma_scale: float,
    scope: str,
) -> tuple[Any, ...]:
    """Show what one attention head does at one patch, and what an edit of its mask would change.

    Args:
        image: the picture.
        layer: layer, from 1.
        head: head, from 1.
        row: row of the patch, from 1.
        column: column of the patch, from 1.
        alpha_scale: factor on the strength of the mask, -2 to 2.
        sigma_scale: factor on its width, 0.05 to 4.
        scope: "This head", "All heads of the layer" or "The whole model".
    """
    if image is None:
        return nothing()
    view = explorer()(
        image,
        int(layer) - 1,
        int(head) - 1,
        (int(row) - 1, int(column) - 1),
        alpha_scale=alpha_scale,
        sigma_scale=sigma_scale,
        scope=SCOPES.get(scope, scope),
    )
    best = {kind: max(scores, key=scores.get) for kind, scores in view.predictions.items()}
    status = (
        f"Layer {int(layer)}, head {int(head)}, patch ({int(row)}, {int(column)}). As trained: {best['trained']}; "
        f"with your edit: {best['edited']}; without any mask: {best['no mask']}."
    )
    return (
        view.mask_image(VIEW),
        view.attention_image(size=VIEW),
        view.attention_image(masked=False, size=VIEW),
        profile_chart(view),
        view.predictions["trained"],
        view.predictions["edited"],
        view.predictions["no mask"],
        status,
    )


def clicked_patch(event: gr.SelectData) -> tuple[int, int]:
    """(row, column) from 1 of the patch under a click into a heat map."""
    x, y = event.index
    return min(GRID, int(y * GRID / VIEW) + 1), min(GRID, int(x * GRID / VIEW) + 1)


def _heat_map(name: str, title: str) -> gr.Image:
    with gr.Column(min_width=180):
        gr.Markdown(f"#### {title}")
        return gr.Image(
            label=title,
            show_label=False,
            type="pil",
            format="png",
            interactive=False,
            buttons=[],
            elem_id=f"gmm-{name}",
        )


def _prediction(name: str, title: str) -> gr.Label:
    with gr.Column(min_width=150):
        gr.Markdown(f"#### {title}")
        return gr.Label(label=title, show_label=False, num_top_classes=3, elem_id=f"gmm-{name}")


def build() -> None:
    """The page."""
    gr.HTML(HELP, padding=False, elem_id="gmm-help")
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            image = gr.Image(label="Picture", type="pil", image_mode="RGB", height=260, elem_id="gmm-image")
            another = gr.Button("Draw another picture", variant="primary", elem_id="gmm-draw")
            with gr.Row():
                layer = gr.Slider(1, LAYERS, 1, step=1, label="Layer", elem_id="gmm-layer", min_width=120)
                head = gr.Slider(1, HEADS, 1, step=1, label="Head", elem_id="gmm-head", min_width=120)
            alpha = gr.Slider(
                -2,
                2,
                1,
                step=0.05,
                label="Strength (α ×)",
                info="0 removes content, below 0 flips",
                elem_id="gmm-alpha",
            )
            sigma = gr.Slider(
                0.05, 4, 1, step=0.05, label="Width (σ ×)", info="small: only close patches", elem_id="gmm-sigma"
            )
            scope = gr.Radio(list(SCOPES), value="This head", label="The sliders act on", elem_id="gmm-scope")
            reset = gr.Button("Back to the trained mask", elem_id="gmm-reset")
            with gr.Accordion("Choose the patch by numbers", open=False):
                row = gr.Slider(1, GRID, GRID // 2, step=1, label="Row", elem_id="gmm-row")
                column = gr.Slider(1, GRID, GRID // 2, step=1, label="Column", elem_id="gmm-column")
        with gr.Column(scale=3, min_width=600):
            with gr.Row():
                maps = [
                    _heat_map(name, title)
                    for name, title in (
                        ("mask", "Mask of the framed patch"),
                        ("attention", "Attention with the mask"),
                        ("plain", "Attention without the mask"),
                    )
                ]
            status = gr.Textbox(label="What you see", interactive=False, elem_id="gmm-status")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    profile = gr.HTML(elem_id="gmm-profile")
                labels = [
                    _prediction(name, title)
                    for name, title in (
                        ("trained", "As trained"),
                        ("edited", "With your edit"),
                        ("unmasked", "Without any mask"),
                    )
                ]
    controls: list[Any] = [image, layer, head, row, column, alpha, sigma, scope]
    answer: list[Any] = [*maps, profile, *labels, status]
    run: dict[str, Any] = {
        "fn": explore,
        "inputs": controls,
        "outputs": answer,
        "trigger_mode": "always_last",
        "show_progress": "minimal",
    }
    private: dict[str, Any] = {"api_visibility": "private"}
    asked = [gr.on([image.change, *moved(*controls[1:])], api_name="gmm_explore", **run)]
    another.click(draw_picture, outputs=image, api_name="gmm_draw")
    gr.on(None, first_picture, outputs=image, **private)  # once, when the page opens
    asked.append(reset.click(lambda: (1, 1), outputs=[alpha, sigma], **private).then(**run, **private))
    clicked = gr.on([heat_map.select for heat_map in maps], clicked_patch, outputs=[row, column], **private)
    asked.append(clicked.then(**run, **private))
    for answered in asked:
        answered.failure(lambda: nothing("No answer: see the message."), outputs=answer, **private)


APP = App(
    "gmm",
    "Distance masks",
    "See how far each attention head of a small vision transformer looks, bend its mask with two sliders, and watch attention "
    "and prediction change.",
    build,
    picture="gmm-mask",
    load=explorer,
)
