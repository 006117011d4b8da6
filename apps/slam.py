"""Semantic SLAM: map a recording of a depth camera while watching, then look at the map by the levels of its label tree."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from mmkit.apps.frame import App, Sessions, output_folder, readable
from mmkit.apps.handlers import moved, number, wanted
from mmkit.apps.look import shows
from mmkit.charts import Line, line_chart
from mmkit.data import extract_zip
from mmkit.errors import InputError
from mmkit.pointcloud.slam import (
    HierSLAM,
    HierSLAMConfig,
    RGBDFrame,
    Step,
    SyntheticRoom,
    evaluate,
    label_image,
    open_sequence,
    palette,
)  # fmt: skip

COLOR, LABELS, DEPTH = "Color", "Labels", "Depth"
EVERYTHING = "Everything"
WIDTH = 512
"""Pixels across of the picture on the page."""
MOST_FRAMES, MOST_FILES, MOST_BYTES = 60, 4000, 400_000_000
SUFFIXES = (".png", ".jpg", ".jpeg", ".txt", ".json")
BEGIN = "Try the sample, or drop a zip with pictures, depths and a camera.json."
FAILED = "No map: see the message."
NO_PATH = line_chart("Path from above", "x in cm", [Line("", [])], (-50, 50), (-50, 50), "{:.0f}", "z in cm upwards")


@dataclass
class Open:
    """What a page has open: the system, and the camera of its frames."""

    slam: HierSLAM
    K: torch.Tensor
    size: tuple[int, int]


SESSIONS: Sessions[Open] = Sessions(limit=6)
_PROGRESS = gr.Progress()


def recording(file: str | None, most: int) -> tuple[Any, str]:
    """The frames of a zip, or of the drawn room when there is none, and what to call them."""
    if file is None:
        return SyntheticRoom(frames=most, width=128, height=96), "the drawn room"
    folder = output_folder() / "recording"
    extract_zip(file, folder, suffixes=SUFFIXES, max_files=MOST_FILES, max_bytes=MOST_BYTES)
    inside = [p for p in folder.iterdir() if not p.name.startswith((".", "__"))]
    if len(inside) == 1 and inside[0].is_dir():
        folder = inside[0]
    try:
        return open_sequence(folder, longest=320), "your recording"
    except InputError as error:
        raise InputError(str(error).replace(str(folder), "The zip")) from error


def settings(name: str, effort: Any) -> HierSLAMConfig:
    """cpu_small with as many iterations as a field asks for; few rounds, so the head learns fast."""
    iterations = int(number(name, effort, 5, 60, whole=True))
    return HierSLAMConfig.preset("cpu_small", map_iters=iterations, lr_head=2e-2, max_gaussians=40_000)


def path_chart(slam: HierSLAM, truth: torch.Tensor | None) -> str:
    """The path from above; the true one dashed, in the first camera's frame."""
    own = 100 * slam.trajectory()[:, :3, 3].numpy()
    lines = [Line("estimate", [(float(x), float(z)) for x, _, z in own])]
    if truth is not None and bool(truth[0].isfinite().all()):
        known = (torch.linalg.inv(truth[:1]) @ truth)[: len(slam), :3, 3].numpy() * 100
        lines.append(Line("truth", [(float(x), float(z)) for x, _, z in known if np.isfinite(x)], dashed=True))
    places = np.concatenate([np.array(line.points) for line in lines])
    middle = (places.min(0) + places.max(0)) / 2
    reach = max(float((places.max(0) - places.min(0)).max()) / 2, 4) * 1.15
    ranges = [(float(m - reach), float(m + reach)) for m in middle]
    return line_chart("Path from above", "x in cm", lines, ranges[0], ranges[1], "{:.0f}", "z in cm upwards")


def draw(opened: Open, frame: int, show: str, level: int, chosen: str) -> Image.Image:
    """The map seen from where a frame was taken; with a class chosen, the rest is dimmed."""
    slam, (width, height) = opened.slam, opened.size
    factor = WIDTH / width
    K = opened.K * torch.tensor([[factor], [factor], [1.0]])
    view = slam.render(slam.poses[frame], K, (WIDTH, round(height * factor)))
    if show == DEPTH:
        from matplotlib import colormaps

        seen = view.depth[view.alpha > 0.5]
        near, far = (float(seen.quantile(q)) for q in (0.02, 0.98)) if 0 < len(seen) < 10**7 else (0.0, 1.0)
        scaled = 1 - ((view.depth.numpy() - near) / max(far - near, 1e-6)).clip(0, 1)
        colors = colormaps["viridis"](scaled)[..., :3] * (view.alpha.numpy() > 0.5)[..., None]
    elif show == LABELS:
        if slam.tree is None:
            raise InputError("This recording has no labels: it needs a folder labels/ and a tree.json.")
        return _dimmed(
            slam, label_image(view.labels.numpy(), palette(slam.tree, level - 1)), view.labels.numpy(), chosen
        )
    else:
        colors = view.rgb.numpy()
    picture = Image.fromarray(np.rint(255 * colors).astype(np.uint8))
    return _dimmed(slam, picture, view.labels.numpy(), chosen)


def _dimmed(slam: HierSLAM, picture: Image.Image, labels: np.ndarray, chosen: str) -> Image.Image:
    if slam.tree is None or chosen not in slam.tree.names:
        return picture
    values = np.asarray(picture).astype(np.float64)
    other = labels != slam.tree.names.index(chosen)
    values[other] = 0.22 * values[other].mean(-1, keepdims=True)
    return Image.fromarray(np.rint(values).astype(np.uint8))


def storage_table(slam: HierSLAM) -> str:
    """What labels cost, with the tree and with one number for each class."""
    tree = slam.tree
    if tree is None:
        return f"**Storage**: {slam.map.bytes() / 1e6:.1f} MB, no labels."
    own, n = tree.storage(), len(slam.map)
    rows = [
        ("tree", tree.code_dim, own["tree_bytes"]), ("flat, one number a class", tree.num_classes, own["flat_bytes"]),
    ]  # fmt: skip
    lines = [f"| {name} | {code} | {each:.0f} | {each * n / 1e6:.1f} MB |" for name, code, each in rows]
    sizes = ", ".join(map(str, tree.level_sizes))
    cost = f"labels cost {own['semantic_ratio']:.0%} of flat ones."
    head = f"**{tree.num_classes} classes in {tree.levels} levels** of {sizes}: {cost}"
    return "\n".join([head, "", "| code | numbers | bytes a Gaussian | whole map |", "|---|---|---|---|", *lines])


@readable
def on_run(file: str | None, frames: Any, effort: Any, sample: bool, progress: Any = _PROGRESS) -> Iterator[list[Any]]:
    """Map a recording, showing the path and the map as they grow."""
    SESSIONS.forget()
    if file is None and not sample:
        raise InputError(BEGIN)
    most = int(number("Frames", frames, 4, MOST_FRAMES, whole=True))
    config = settings("Effort", effort)
    data, name = recording(None if sample else file, most)
    slam, check = HierSLAM(config, data.tree), wanted()
    truth, total = data.trajectory(), min(most, len(data))
    opened: Open | None = None
    for i in range(total):
        check()
        progress((i, total), desc=f"Frame {i + 1} of {total}")
        frame: RGBDFrame = data[i]
        with warnings.catch_warnings():  # told on the page
            warnings.simplefilter("ignore")
            step = slam.step(frame)
        opened = Open(slam, frame.K, (frame.width, frame.height))
        picture = draw(opened, i, COLOR, 1, EVERYTHING)
        yield [None, picture, path_chart(slam, truth), _told(step, total), *[gr.skip() for _ in range(6)]]
    assert opened is not None
    yield _finished(opened, data, name)


def _told(step: Step, total: int) -> str:
    lost = "" if step.tracked else " · **tracking is lost**, the map waits"
    loss = "" if step.index == 0 else f" · loss {step.loss:.3f}"
    return f"Frame {step.index + 1} of {total} · {step.gaussians:,} Gaussians{loss}{lost}"


def _finished(opened: Open, data: Any, name: str) -> list[Any]:
    slam = opened.slam
    figures = evaluate(slam, data, every=max(1, len(slam) // 6), reference=getattr(data, "clean", None))
    parts = [f"**{len(slam)} frames of {name}**, {len(slam.map):,} Gaussians"]
    if slam.tracked.count(False):
        parts.append(f"{slam.tracked.count(False)} lost")
    for key, text in (("ate_rmse", "path off by {:.2f} cm"), ("psnr", "PSNR {:.1f} dB"), ("miou", "mIoU {:.2f}")):
        if key in figures:
            parts.append(text.format(figures[key] * (100 if key == "ate_rmse" else 1)))
    last = len(slam) - 1
    levels = slam.tree.levels if slam.tree is not None else 1
    names = [EVERYTHING, *(slam.tree.names if slam.tree is not None else [])]
    return [
        SESSIONS.add(opened), draw(opened, last, COLOR, levels, EVERYTHING), path_chart(slam, data.trajectory()), " · ".join(parts),
        storage_table(slam), COLOR, gr.update(value=levels, maximum=max(levels, 2), interactive=levels > 1),
        gr.update(value=last + 1, maximum=max(last + 1, 2), interactive=last > 0), gr.update(choices=names, value=EVERYTHING),
        gr.update(value=str(slam.export(output_folder() / "map.ply")), interactive=True),
    ]  # fmt: skip


def on_clear(status: str = BEGIN) -> list[Any]:
    """No map."""
    SESSIONS.forget()
    return [
        None, None, NO_PATH, status, "", COLOR, gr.update(value=1, interactive=False), gr.update(value=1, interactive=False),
        gr.update(choices=[EVERYTHING], value=EVERYTHING), gr.update(value=None, interactive=False),
    ]  # fmt: skip


@readable
def on_view(key: str | None, frame: Any, show: str, level: Any, chosen: str) -> Any:
    """Another place, layer, level or class."""
    opened = SESSIONS.find(key)
    if opened is None:
        return gr.skip()
    last, levels = len(opened.slam), opened.slam.tree.levels if opened.slam.tree is not None else 1
    at = int(number("Seen from frame", frame, 1, last, whole=True)) - 1
    return draw(
        opened, at, show, int(number("Level", level, 1, max(levels, 2), whole=True)) if levels > 1 else 1, chosen
    )


@readable
def on_pick(event: gr.SelectData, key: str | None, frame: Any, show: str, level: Any) -> list[Any]:
    """A click into the picture chooses the class that is seen there."""
    opened = SESSIONS.find(key)
    tree = None if opened is None else opened.slam.tree
    if opened is None or tree is None:
        return [gr.skip(), gr.skip()]
    slam, (width, height) = opened.slam, opened.size
    factor = WIDTH / width
    x, y = (min(max(int(v / factor), 0), most - 1) for v, most in zip(event.index, opened.size, strict=True))
    at = int(number("Seen from frame", frame, 1, len(slam), whole=True)) - 1
    seen = int(slam.render(slam.poses[at], opened.K, (width, height)).labels[y, x])
    chosen = EVERYTHING if seen < 0 else tree.names[seen]
    return [chosen, on_view(key, frame, show, level, chosen)]


@readable
def map_recording(file: str | None, frames: float = 12, effort: float = 20) -> tuple[dict[str, Any], str]:
    """Map a zip with an RGB-D recording (color/, depth/, camera.json, or 7-Scenes, TUM, Replica, ScanNet), or the drawn room.

    Args:
        file: the zip; none: the drawn room.
        frames: how many to take, at most 60.
        effort: iterations of a mapping round, 5 to 60.

    Returns:
        Figures by name, and the map as .ply with labels.
    """
    most = int(number("frames", frames, 4, MOST_FRAMES, whole=True))
    config = settings("effort", effort)
    data, _ = recording(file, most)
    slam, check = HierSLAM(config, data.tree), wanted()
    for i in range(min(most, len(data))):
        check()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            slam.step(data[i])
    figures = evaluate(slam, data, every=max(1, len(slam) // 6), reference=getattr(data, "clean", None))
    told = {k: round(float(v), 5) for k, v in figures.items() if np.isfinite(v)}
    return told, str(slam.export(Path(output_folder()) / "map.ply"))


def build() -> None:
    """The page."""
    key = gr.State(None)
    yes, no = gr.State(True), gr.State(False)
    with gr.Row():
        with gr.Column(scale=2):
            example = gr.Button("Sample recording", elem_id="slam-sample", elem_classes=shows("slam-view", work=True))
            file = gr.File(
                label="Recording (.zip)", type="filepath", file_types=[".zip"], height=130, elem_id="slam-file",
            )  # fmt: skip
            with gr.Group():
                frames = gr.Slider(
                    4, MOST_FRAMES, value=16, step=1, label="Frames", elem_id="slam-frames", info="How many to take."
                )
                effort = gr.Slider(
                    5, 60, value=25, step=1, label="Effort", elem_id="slam-effort",
                    info="Iterations of a mapping round; one round every four frames.",
                )  # fmt: skip
                run = gr.Button(
                    "Map the recording",
                    variant="primary",
                    elem_id="slam-run",
                    elem_classes=shows("slam-view", work=True),
                )
            path = gr.HTML(NO_PATH, elem_id="slam-path")
            download = gr.DownloadButton("Download map (.ply)", interactive=False, elem_id="slam-download")
        with gr.Column(scale=3):
            view = gr.Image(
                label="Map, seen by the camera", type="pil", interactive=False, format="png", buttons=["fullscreen"], elem_id="slam-view",
            )  # fmt: skip
            status = gr.Markdown(BEGIN, elem_id="slam-status")
            show = gr.Radio([COLOR, LABELS, DEPTH], value=COLOR, label="Show", elem_id="slam-show")
            with gr.Row():
                level = gr.Slider(
                    1, 2, value=1, step=1, label="Level", interactive=False, elem_id="slam-level",
                    info="Of the tree: 1 is coarsest. Labels of one group share a color.",
                )  # fmt: skip
                at = gr.Slider(1, 2, value=1, step=1, label="Seen from frame", interactive=False, elem_id="slam-at")
            chosen = gr.Dropdown(
                [EVERYTHING], value=EVERYTHING, label="Class", elem_id="slam-class", info="Or click into the picture.",
            )  # fmt: skip
            storage = gr.Markdown("", elem_id="slam-storage")
    shared = [key, view, path, status, storage, show, level, at, chosen, download]
    private: dict[str, Any] = {"api_visibility": "private", "show_progress_on": view}
    failed = functools.partial(on_clear, FAILED)
    for button, sample in ((example, yes), (run, no)):
        button.click(on_run, [file, frames, effort, sample], shared, concurrency_id="slam-run", **private).failure(
            failed, None, shared, **private
        )
    file.clear(on_clear, None, shared, **private)
    quick: dict[str, Any] = {"show_progress": "hidden", "concurrency_id": "slam-view", **private}
    seen = [at, show, level, chosen]
    gr.on(moved(*seen), on_view, [key, *seen], view, trigger_mode="always_last", **quick)
    view.select(on_pick, [key, at, show, level], [chosen, view], **quick)
    endpoint = [gr.File(visible=False), gr.Number(12, visible=False), gr.Number(20, visible=False)]
    gr.Button(visible=False).click(
        map_recording, endpoint, [gr.JSON(visible=False), gr.File(visible=False)], api_name="map_recording"
    )


APP = App(
    "slam",
    "Semantic SLAM",
    "Watch a depth camera's path and a labelled map of Gaussians grow from a recording; then see the map by the levels of its label "
    "tree, pick a class, and take the map home.",
    build,
    sample="slam-sample",
    picture="slam-view",
)
