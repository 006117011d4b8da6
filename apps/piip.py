"""Inverted pyramids: one photo at two resolutions, what the two models tell each other, where they look, and what it costs."""

from __future__ import annotations

import functools
import threading
from typing import Any

import gradio as gr
from PIL import Image

from mmkit.apps.frame import App, readable
from mmkit.apps.handlers import moved
from mmkit.charts import bar_chart
from mmkit.errors import InputError
from mmkit.vision.piip import BranchConfig, PIIPConfig, PyramidExplorer, compare, meta_model

LARGE, SMALL = (64, 256, 128), (128, 512, 256)
"""Least, most and first pixels that the large and the small model see."""

INTERACTIONS = 2
"""Of the bundled model; the slider needs it before the model is loaded."""

VIEW = 640
"""Width of the picture with the places that are read, in pixels."""

DIRECTIONS = {
    "The large model reads the fine map": "larger reads smaller",
    "The small model reads the coarse map": "smaller reads larger",
}
HERE = "The small model on this page"
COUNTED = {HERE: "", "ViT-S and ViT-B": "vit_base_patch16_224", "ViT-S and ViT-L": "vit_large_patch16_224"}

BEGIN = "Drop a photo, or try the sample."
STAGES = {"before": "Before", "after": "After", "change": "Change"}
HELP = """
<p>A network that looks closely is expensive, and a large network at full resolution is very expensive. A parameter-inverted pyramid
lets a <b>small model see the large picture</b> and a <b>large model the small one</b>; after every few layers they exchange what they
found. Move the two resolutions, click into the photo, and see where the models read in each other's maps.</p>
"""

_lock = threading.Lock()


@functools.cache
def _load() -> PyramidExplorer:
    return PyramidExplorer()


def explorer() -> PyramidExplorer:
    """The model behind the page, loaded at first use and shared by all visitors."""
    with _lock:
        return _load()


@functools.cache
def _counted(backbone: str) -> Any:
    """A pyramid of two published models without weights, for counting."""
    with _lock:
        branches = (BranchConfig(backbone, LARGE[2]), BranchConfig("vit_small_patch16_224", SMALL[2]))
        return meta_model(PIIPConfig(branches), num_classes=1000)


def sample() -> Image.Image:
    """A drawn micrograph."""
    from mmkit.data.drawn.scans import sample_picture

    return Image.fromarray(sample_picture(7)[0])


def cost_chart(costs: dict[str, tuple[float, int]]) -> str:
    """Multiply-adds and parameters of the pyramid beside what sees the same detail."""
    single = costs["single branch"][0]
    names = {
        "pyramid": "Inverted pyramid",
        "single branch": "Large model alone",
        "classic pyramid": "Classic pyramid",
        "windowed": "Large, windowed",
    }
    bars = [(names[k], macs, f"{_short(macs)} · {macs / single:.0%}") for k, (macs, _) in costs.items()]
    sizes = [
        (names[k], float(params), _short(params))
        for k, (_, params) in costs.items()
        if k in ("pyramid", "single branch")
    ]
    return bar_chart("Multiply-adds", bars, "% of large alone") + bar_chart("Parameters", sizes)


def _short(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def costs_at(counted: str, large: int, small: int) -> dict[str, tuple[float, int]]:
    """The costs for one of `COUNTED` at two resolutions."""
    if counted not in COUNTED:
        raise InputError(f"Costs are counted for {list(COUNTED)}, not {counted!r}.")
    model = explorer().model if counted == HERE else _counted(COUNTED[counted])
    return compare(model.at((large, small)))  # type: ignore[operator]


@readable
def count(counted: str, large: int, small: int) -> str:
    """The bars for other resolutions or another pair of models."""
    return cost_chart(costs_at(counted, int(large), int(small)))


def nothing(status: str = BEGIN) -> list[Any]:
    """The page without an answer."""
    return [None] * 7 + [status]


@readable
def look(
    image: Image.Image | None, large: int, small: int, interaction: int, direction: str, x: float, y: float
) -> list[Any]:
    """Run a pyramid of two branches on a photo and show one interaction.

    Args:
        image: the photo.
        large: pixels of the longer side for the large model.
        small: pixels of the longer side for the small model, at least as many.
        interaction: 1 or 2.
        direction: "The large model reads the fine map" or "The small model reads the coarse map".
        x: place in the photo, 0 (left) to 1.
        y: place in the photo, 0 (top) to 1.
    """
    if image is None:
        return nothing()
    view = explorer()(image, img_sizes=(int(large), int(small)), interaction=int(interaction) - 1)
    maps = [
        picture
        for branch in (1, 2)
        for picture in (
            view.features_image(branch, after=False), view.features_image(branch), view.change_image(branch)
        )
    ]  # fmt: skip
    (coarse, fine) = (f"{f.shape[1]} x {f.shape[0]}" for f in view.after)
    status = (
        f"The large model has {coarse} cells, the small model {fine}. Interaction {int(interaction)} changed the large model's "
        f"features by {view.changed(1):.1%} and the small model's by {view.changed(2):.1%}. Click the picture to frame another cell."
    )
    return [view.reads_image(DIRECTIONS.get(direction, direction), (x, y), VIEW), *maps, status]


def clicked(event: gr.SelectData, image: Image.Image | None) -> tuple[float, float]:
    """(x, y), 0..1, of a click into the picture with the places."""
    if image is None:
        return 0.5, 0.5
    height = VIEW * image.height / image.width
    return min(event.index[0] / VIEW, 1.0), min(event.index[1] / height, 1.0)


def _map(branch: str, number: int, stage: str) -> gr.Image:
    return gr.Image(
        label=STAGES[stage], alt_text=f"{branch}: {STAGES[stage].lower()}", type="pil", format="png", interactive=False, buttons=[],
        min_width=90, elem_id=f"piip-{stage}{number}",
    )  # fmt: skip


def build() -> None:
    """The page."""
    gr.HTML(HELP, padding=False, elem_id="piip-help")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            image = gr.Image(label="Photo", type="pil", image_mode="RGB", height=240, elem_id="piip-image")
            example = gr.Button("Sample picture", variant="primary", elem_id="piip-sample")
            large = gr.Slider(*LARGE, step=32, label="Large model sees (px)", elem_id="piip-large")
            small = gr.Slider(*SMALL, step=32, label="Small model sees (px)", elem_id="piip-small")
            chart = gr.HTML(padding=False, elem_id="piip-costs")
            counted = gr.Radio(list(COUNTED), value=HERE, label="Count for", elem_id="piip-counted")
        with gr.Column(scale=4, min_width=320):
            direction = gr.Radio(
                list(DIRECTIONS), value=next(iter(DIRECTIONS)), label="Look at", elem_id="piip-direction"
            )
            reads = gr.Image(
                label="Where the framed cell reads", type="pil", format="png", interactive=False,
                buttons=["fullscreen"], elem_id="piip-reads",
            )  # fmt: skip
            status = gr.Markdown(BEGIN, elem_id="piip-status")
            interaction = gr.Slider(1, INTERACTIONS, 1, step=1, label="Interaction", elem_id="piip-interaction")
            maps = []
            for number, branch in ((1, "Large model"), (2, "Small model")):
                gr.Markdown(f"**{branch}**: its map around the interaction")
                with gr.Row():
                    maps += [_map(branch, number, stage) for stage in STAGES]
            with gr.Accordion("Choose the place by numbers", open=False):
                x = gr.Slider(0, 1, 0.5, step=0.001, label="From the left", elem_id="piip-x")
                y = gr.Slider(0, 1, 0.5, step=0.001, label="From the top", elem_id="piip-y")
    controls: list[Any] = [image, large, small, interaction, direction, x, y]
    answer: list[Any] = [reads, *maps, status]
    private: dict[str, Any] = {"api_visibility": "private"}
    run: dict[str, Any] = {
        "fn": look, "inputs": controls, "outputs": answer, "trigger_mode": "always_last", "show_progress": "minimal",
    }  # fmt: skip
    for asked in (
        gr.on([image.change, *moved(*controls[1:])], api_name="piip_look", **run),
        reads.select(clicked, inputs=image, outputs=[x, y], **private).then(**run, **private),
    ):
        asked.failure(lambda: nothing("No answer: see the message."), outputs=answer, **private)
    costs: dict[str, Any] = {"inputs": [counted, large, small], "outputs": chart, **private}
    gr.on(moved(large, small, counted), count, trigger_mode="always_last", show_progress="hidden", **costs)
    gr.on(None, count, **costs)  # once, when the page opens
    example.click(sample, outputs=image, **private)


APP = App(
    "piip",
    "Inverted pyramids",
    "See one photo through a small model at high resolution and a large model at low resolution: what they tell each other, where "
    "they look, and what that saves.",
    build,
    sample="piip-sample",
    picture="piip-reads",
    load=explorer,
)
