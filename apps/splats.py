"""Splats: look at a scene of Gaussians from all sides, fit one from pictures, take it home in any format."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mmkit.apps.frame import App, Sessions, output_folder, readable
from mmkit.apps.handlers import moved, number, wanted
from mmkit.apps.look import shows
from mmkit.errors import InputError
from mmkit.pointcloud.splats import (
    FORMATS,
    FitConfig,
    GaussianModel,
    NovelViewPipeline,
    drawn_scene,
    fit_images,
    load_splats,
    save_splats,
)

COLOR, DEPTH, ALPHA = "Color", "Depth", "Opacity"
MAX_GAUSSIANS = 500_000
"""Larger scenes are refused on this page; `mmkit splat` takes them."""
SIDE = 448
BEGIN = "Drop a splat file to begin, try the sample, or fit a scene."
FAILED = "No scene: see the message."
SESSIONS: Sessions[GaussianModel] = Sessions(limit=12)
_PROGRESS = gr.Progress()


@functools.cache
def sample() -> NovelViewPipeline:
    """The bundled still life, loaded once."""
    return NovelViewPipeline()


def draw(model: GaussianModel, show: str, azimuth: Any, elevation: Any, distance: Any) -> Image.Image:
    """The picture for the page."""
    _, radius = model.bounds()
    result = NovelViewPipeline(model)(
        azimuth=number("Around", azimuth, -180, 180), elevation=number("Height", elevation, -85, 85), size=SIDE,
        distance=number("Distance", distance, 0.5, 4) * 2.6 * max(radius, 1e-3),
    )  # fmt: skip
    return {COLOR: result.plot, DEPTH: result.depth_image, ALPHA: result.alpha_image}[show]()


def export(model: GaussianModel, suffix: str) -> str:
    """The scene as a file for the download button."""
    if suffix not in FORMATS:
        raise InputError("No such format is offered here.")
    return str(save_splats(model, output_folder() / f"scene{suffix}"))


def _opened(model: GaussianModel, note: str, suffix: str) -> list[Any]:
    """Every output of the page for a new scene, seen from where it looks best."""
    if len(model) > MAX_GAUSSIANS:
        raise InputError(
            f"The scene has {len(model)} Gaussians; this page shows up to {MAX_GAUSSIANS}. Use `mmkit splat render`."
        )
    if not all(x.isfinite().all() for x in model.tensors().values()):
        raise InputError("Some Gaussians have values that are not finite.")
    about = f"**{len(model):,} Gaussians**, harmonics of degree {model.sh_degree}, {model.rasterize_mode} · {note}"
    file = gr.update(value=export(model, suffix), interactive=True)
    browser = export(model, ".splat") if len(model) else None
    return [SESSIONS.add(model), draw(model, COLOR, 30, 25, 1), about, COLOR, 30, 25, 1, file, browser]


@readable
def on_file(file: str | None, suffix: str) -> list[Any]:
    """A splat file was dropped."""
    SESSIONS.forget()
    return on_clear() if file is None else _opened(load_splats(file), "from your file", suffix)


@readable
def on_sample(suffix: str) -> list[Any]:
    """The bundled scene; the file box is emptied."""
    SESSIONS.forget()
    model = sample().model
    assert isinstance(model, GaussianModel)
    return [None, *_opened(model, "the bundled still life", suffix)]


def on_clear(status: str = BEGIN) -> list[Any]:
    """No scene."""
    SESSIONS.forget()
    return [None, None, status, COLOR, 30, 25, 1, gr.update(value=None, interactive=False), None]


class _Left(Exception):
    """Nobody waits for the fit any more."""


def _steps(config: FitConfig, every: int, check: Any) -> Iterator[tuple[int, float, GaussianModel]]:
    """Fit the drawn pictures in a thread; yields step, loss and a copy of the scene now and then."""
    news: queue.Queue[Any] = queue.Queue()
    left = threading.Event()

    def step(number: int, loss: float, model: GaussianModel) -> None:
        if left.is_set():
            raise _Left
        if number % every == 0 or number == config.steps:
            news.put((number, loss, GaussianModel.from_tensors(model.tensors())))

    def work() -> None:
        try:
            fit_images(drawn_scene(18, 64), config, progress=False, on_step=step)
            news.put(None)
        except _Left:
            pass
        except Exception as error:  # told by the thread that waits
            news.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            try:
                item = news.get(timeout=1)
            except queue.Empty:
                check()
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        left.set()


@readable
def on_fit(steps: Any, suffix: str, progress: Any = _PROGRESS) -> Iterator[list[Any]]:
    """Fit the drawn still life from random points, telling how it goes."""
    SESSIONS.forget()
    total = int(number("Steps", steps, 50, 1500, whole=True))
    config = FitConfig(steps=total, start_gaussians=800, max_gaussians=1500, sh_degree=0, ssim=0.0, rate=6.0, noise=0.3)
    for step, loss, model in _steps(config, max(10, total // 12), wanted()):
        progress((step, total), desc=f"Fitting, {len(model)} Gaussians")
        if step < total:
            yield [None, None, None, f"Step {step} of {total}, loss {loss:.4f}", *[gr.skip() for _ in range(6)]]
        else:
            yield [None, *_opened(model, f"fitted to 18 pictures in {total} steps, loss {loss:.4f}", suffix)]


@readable
def on_view(key: str | None, show: str, azimuth: Any, elevation: Any, distance: Any) -> Any:
    """Another place to look from, or another layer."""
    model = SESSIONS.find(key)
    return gr.skip() if model is None else draw(model, show, azimuth, elevation, distance)


@readable
def on_format(key: str | None, suffix: str) -> Any:
    """Another format: its file."""
    model = SESSIONS.find(key)
    return gr.skip() if model is None else gr.update(value=export(model, suffix), interactive=True)


@readable
def render_splats(
    file: str | None, azimuth: float = 30, elevation: float = 25, distance: float = 1.0
) -> tuple[Image.Image, dict[str, Any]]:
    """Render a splat file (.ply, .splat, .spz, .sog, .glb), or the bundled scene when there is none.

    Args:
        file: the scene.
        azimuth, elevation: degrees around and above.
        distance: 1 shows the whole scene.

    Returns:
        The picture, and {"gaussians": ..., "sh_degree": ...}.
    """
    model = load_splats(Path(file)) if file else sample().model
    assert isinstance(model, GaussianModel)
    if len(model) > MAX_GAUSSIANS:
        raise InputError(f"The scene has {len(model)} Gaussians; the limit here is {MAX_GAUSSIANS}.")
    return draw(model, COLOR, azimuth, elevation, distance), {"gaussians": len(model), "sh_degree": model.sh_degree}


def build() -> None:
    """The page."""
    key = gr.State(None)
    with gr.Row():
        with gr.Column(scale=2):
            file = gr.File(
                label="Scene (.ply, .splat, .spz, .sog, .glb)", type="filepath", height=160, elem_id="splats-file",
                elem_classes=shows("splats-view"),
            )  # fmt: skip
            example = gr.Button("Sample scene", elem_id="splats-sample", elem_classes=shows("splats-view"))
            with gr.Group():
                steps = gr.Slider(
                    50, 1500, value=400, step=50, label="Steps", elem_id="splats-steps",
                    info="A scene from 18 drawn pictures and random points: each step compares one picture.",
                )  # fmt: skip
                fit = gr.Button(
                    "Fit a scene", variant="primary", elem_id="splats-fit", elem_classes=shows("splats-view", work=True)
                )
            suffix = gr.Dropdown(
                list(FORMATS), value=".ply", label="Format", elem_id="splats-format",
                info=".ply and .glb keep the numbers; .spz and .sog are 10 to 20 times smaller.",
            )  # fmt: skip
            download = gr.DownloadButton("Download scene", interactive=False, elem_id="splats-download")
        with gr.Column(scale=3):
            with gr.Tabs():
                with gr.Tab("Rendered here", elem_id="splats-tab-view"):
                    view = gr.Image(
                        label="View", type="pil", interactive=False, format="png", height=SIDE, buttons=["fullscreen"],
                        elem_id="splats-view",
                    )  # fmt: skip
                with gr.Tab("Rotate in the browser", elem_id="splats-tab-browser"):
                    browser = gr.Model3D(label="Scene", height=SIDE, interactive=False, elem_id="splats-browser")
            status = gr.Markdown(BEGIN, elem_id="splats-status")
            show = gr.Radio([COLOR, DEPTH, ALPHA], value=COLOR, label="Show", elem_id="splats-show")
            with gr.Row():
                azimuth = gr.Slider(-180, 180, value=30, step=1, label="Around", elem_id="splats-azimuth")
                elevation = gr.Slider(-85, 85, value=25, step=1, label="Height", elem_id="splats-elevation")
                distance = gr.Slider(0.5, 4, value=1, step=0.05, label="Distance", elem_id="splats-distance")
    shared = [key, view, status, show, azimuth, elevation, distance, download, browser]
    private: dict[str, Any] = {"api_visibility": "private", "show_progress_on": view}
    failed = functools.partial(on_clear, FAILED)
    file.upload(on_file, [file, suffix], shared, **private).failure(failed, None, shared, **private)
    file.clear(on_clear, None, shared, **private)
    example.click(on_sample, suffix, [file, *shared], **private)
    fit.click(on_fit, [steps, suffix], [file, *shared], **private).failure(failed, None, shared, **private)
    quick: dict[str, Any] = {
        "show_progress": "hidden",
        "trigger_mode": "always_last",
        "concurrency_id": "splats-view",
        **private,
    }
    seen = [show, azimuth, elevation, distance]
    gr.on(moved(*seen), on_view, [key, *seen], view, **quick)
    suffix.input(on_format, [key, suffix], download, **private)
    endpoint = [
        gr.File(visible=False),
        gr.Number(30, visible=False),
        gr.Number(25, visible=False),
        gr.Number(1, visible=False),
    ]
    gr.Button(visible=False).click(
        render_splats, endpoint, [gr.Image(visible=False), gr.JSON(visible=False)], api_name="render_splats"
    )


APP = App(
    "splats",
    "Gaussian splats",
    "Look at a scene of 3D Gaussians from all sides, in colors, depths or opacity; fit one from pictures; "
    "take it home as .ply, .splat, .spz, .sog or .glb.",
    build,
    sample="splats-sample",
    picture="splats-view",
    load=sample,
)
