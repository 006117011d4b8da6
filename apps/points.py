"""Point clouds: drop a mesh or a cloud, turn it, see what it is and its parts; teach new classes from a few examples each."""

from __future__ import annotations

import functools
import html
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw

from mmkit.apps.frame import App, Sessions, output_folder, readable
from mmkit.data.drawn.shapes import SHAPES
from mmkit.errors import InputError
from mmkit.pointcloud import SUFFIXES

GROUPS, ATTENTION, PARTS = "Patch groups", "Attention", "Parts"
WHOLE, SCAN = "Whole", "As a depth camera sees it"
ANY = "anything"
METHODS = {"Point-PEFT": "point_peft", "PointGST": "pointgst", "LoRA": "lora", "Linear probe": "linear_probe"}
MAX_CLASSES, MAX_EXAMPLES = 20, 20
NUM_POINTS = 256
BEGIN = "Drop a mesh or a cloud, or draw one."
CLOUDS: Sessions[tuple[np.ndarray, str]] = Sessions(limit=24)
LABS: Sessions[Any] = Sessions(limit=12)

HELP = """
**1.** Draw a cloud, or drop a file: a mesh (.glb, .obj, .stl, .off) or points (.ply, .pcd, .las, .xyz, .npy ...), upright along +y.
**2.** Turn it with the mouse. *Patch groups* are what the transformer reads as its tokens; *attention* shows which of them the answer
rests on. **3.** In the *few-shot lab*, teach the model classes of your own from a handful of examples.

The bundled models were trained on **drawn** things. They are a demonstration of the method, not a recogniser of the world.
"""

_lock = threading.Lock()


@dataclass
class Lab:
    """What a visitor teaches: examples by class, and the adapted model once there is one."""

    examples: dict[str, list[np.ndarray]] = field(default_factory=dict)
    learned: Any = None


@functools.cache
def _pipeline(task: str) -> Any:
    from mmkit.pipelines import pipeline

    return pipeline(task)


def pipeline_of(task: str) -> Any:
    """The pipeline behind the page, loaded at first use and shared by all visitors."""
    with _lock:
        return _pipeline(task)


def drawn_cloud(kind: str, scan: bool, seed: int, num_points: int = 2048) -> np.ndarray:
    """Points (N, 3) of a drawn thing."""
    from mmkit.data.drawn.shapes import drawn_scan, drawn_shape

    return (drawn_scan if scan else drawn_shape)(np.random.default_rng(seed), kind, num_points)[0]


def model_file(points: np.ndarray, colors: np.ndarray, size: float = 0.028) -> str:
    """A .glb file with a small octahedron at every point (N, 3): viewers draw bare points one pixel wide."""
    import trimesh

    corners = np.concatenate([np.eye(3), -np.eye(3)]) * size
    faces = np.array([[0, 1, 2], [1, 3, 2], [3, 4, 2], [4, 0, 2], [1, 0, 5], [3, 1, 5], [4, 3, 5], [0, 4, 5]])
    vertices = (points[:, None] + corners).reshape(-1, 3)
    all_faces = (faces + 6 * np.arange(len(points))[:, None, None]).reshape(-1, 3)
    mesh = trimesh.Trimesh(vertices, all_faces, vertex_colors=np.repeat(colors, 6, 0), process=False)
    path = output_folder() / "cloud.glb"
    mesh.export(path)
    return str(path)


def thumbnail(points: np.ndarray, size: int = 120) -> Image.Image:
    """A small picture of a cloud, seen a little from above; nearer points are darker."""
    c, s = np.cos(0.6), np.sin(0.6)
    x, z = c * points[:, 0] + s * points[:, 2], c * points[:, 2] - s * points[:, 0]
    y, depth = 0.94 * points[:, 1] - 0.34 * z, 0.94 * z + 0.34 * points[:, 1]
    picture = Image.new("RGB", (size, size), (248, 250, 252))
    pen = ImageDraw.Draw(picture)
    for i in depth.argsort():
        u, v = size / 2 * (1 + 0.95 * x[i]), size / 2 * (1 - 0.95 * y[i])
        shade = int(150 - 60 * depth[i])
        pen.ellipse((u - 1.6, v - 1.6, u + 1.6, v + 1.6), fill=(shade // 4, shade // 2 + 40, shade // 2 + 40))
    return picture


def _legend(rows: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    from mmkit.pointcloud.point_peft import palette

    lines = []
    for row in rows[:8]:
        color = "rgb({}, {}, {})".format(*palette(np.array([names.index(row["part"])]))[0])
        size = "display:inline-block;width:.9em;height:.9em;border-radius:2px"
        square = f'<span aria-hidden="true" style="{size};background:{color}"></span>'
        lines.append(f"<li>{square} {html.escape(row['part'])}: {row['percent']:.0f} %</li>")
    return f'<ul style="list-style:none;padding:0;margin:0;columns:2">{"".join(lines)}</ul>'


def look(points: np.ndarray, color: str) -> tuple[str, dict[str, float], str, Any]:
    """The 3D file, class probabilities, the parts as HTML, and the classification of a cloud (N, 3)."""
    answer = pipeline_of("point-cloud-classification")(points)
    parts = pipeline_of("point-cloud-segmentation")(points)
    if color == PARTS:
        shown = np.random.default_rng(0).permutation(len(parts.points))[:2048]
        unit = parts.points - parts.points.mean(0)
        unit = unit / np.linalg.norm(unit, axis=1).max()
        file = model_file(unit[shown].astype(np.float32), parts.colors()[shown], 0.016)
    elif color == ATTENTION:
        from matplotlib import colormaps

        weight = answer.attention[answer.groups - 1]
        file = model_file(
            answer.points, (np.asarray(colormaps["viridis"](weight / weight.max()))[:, :3] * 255).astype(np.uint8)
        )
    else:
        file = model_file(answer.points, answer.colors())
    return file, dict(answer.top(5)), _legend(parts.measures(), parts.class_names), answer


def _show(points: np.ndarray, name: str, color: str) -> tuple[Any, ...]:
    started = time.perf_counter()
    file, label, legend, answer = look(points, color)
    seconds = time.perf_counter() - started
    status = f"{name}: {len(points):,} points, of which the model reads {len(answer.points)}; {answer.label}; {seconds:.1f} s."
    return CLOUDS.add((points, name)), file, label, legend, status


@readable
def on_file(file: str | None, color: str) -> tuple[Any, ...]:
    """A file was dropped: show and classify it."""
    if file is None:
        return None, None, None, "", BEGIN
    from mmkit.pointcloud.point_peft import load_cloud

    return _show(load_cloud(file), Path(file).name, color)


@readable
def on_draw(kind: str, form: str, color: str) -> tuple[Any, ...]:
    """Draw a cloud; the file box is emptied."""
    kind = random.choice(SHAPES) if kind == ANY else kind
    return None, *_show(drawn_cloud(kind, form == SCAN, random.getrandbits(31)), f"A drawn {kind}", color)


@readable
def on_color(key: str | None, color: str) -> Any:
    """The same cloud in other colors."""
    return look(CLOUDS.get(key)[0], color)[0] if key else None


@readable
def classify_cloud(file: str | None) -> dict[str, Any]:
    """Say what a point cloud or mesh is, and how much of it each part makes up.

    Args:
        file: .ply, .pcd, .obj, .stl, .off, .glb, .gltf, .xyz, .txt, .pts, .csv, .npy, .npz, .h5, .las or .laz; upright along +y.

    Returns:
        {"label": ..., "classes": {name: probability}, "parts": [{"part", "points", "percent", "mean_probability"}]}.
    """
    if not file:
        raise InputError("Give a file.")
    from mmkit.pointcloud.point_peft import load_cloud

    points = load_cloud(file)
    answer = pipeline_of("point-cloud-classification")(points)
    parts = pipeline_of("point-cloud-segmentation")(points)
    return {"label": answer.label, "classes": dict(answer.top(16)), "parts": parts.measures()}


# --- the few-shot lab -------------------------------------------------------------------------------------------------------


def _lab(key: str | None) -> tuple[str, Lab]:
    key = key or LABS.add(Lab())
    return key, LABS.get(key)


def _examples(lab: Lab) -> list[tuple[Image.Image, str]]:
    return [(thumbnail(c), name) for name, clouds in lab.examples.items() for c in clouds[:5]]


def _told(lab: Lab) -> str:
    return f"{len(lab.examples)} classes, {sum(map(len, lab.examples.values()))} examples."


@readable
def on_drawn_classes(key: str | None, count: float, each: float) -> tuple[Any, ...]:
    """Fill the lab with scans of drawn things."""
    key, lab = _lab(key)
    kinds = random.sample(SHAPES, int(count))
    seed = random.getrandbits(20)
    lab.examples = {k: [drawn_cloud(k, True, seed + i, NUM_POINTS) for i in range(int(each))] for k in kinds}
    lab.learned = None
    return key, _examples(lab), f"{_told(lab)} Press *Adapt*."


@readable
def on_add(key: str | None, name: str, files: list[str] | None) -> tuple[Any, ...]:
    """Add a class of the visitor's own."""
    from mmkit.pointcloud import choose_points, unit_sphere
    from mmkit.pointcloud.point_peft import load_cloud

    key, lab = _lab(key)
    name = (name or "").strip()[:40]
    if not name or not files:
        raise InputError("Give the class a name and at least one file.")
    if len(files) > MAX_EXAMPLES or (name not in lab.examples and len(lab.examples) >= MAX_CLASSES):
        raise InputError(f"At most {MAX_CLASSES} classes of {MAX_EXAMPLES} examples.")
    clouds = [load_cloud(f) for f in files]
    lab.examples[name] = [unit_sphere(c[choose_points(c, NUM_POINTS)]) for c in clouds]
    lab.learned = None
    return key, _examples(lab), f"{_told(lab)} Press *Adapt*.", None, ""


@readable
def on_adapt(key: str | None, method: str, progress: Any = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
    """Teach the classes of the lab."""
    from mmkit.backbones import load_weights
    from mmkit.pointcloud.point_peft import adapt_few_shot

    key, lab = _lab(key)
    if len(lab.examples) < 2:
        raise InputError("The lab needs at least two classes: draw some, or add files.")
    started = time.perf_counter()
    steps = 60

    def step(info: Any) -> None:
        progress(info.step / steps, desc=f"Step {info.step} of {steps}")

    lab.learned = adapt_few_shot(
        load_weights(encoder_name()), lab.examples, method=METHODS[method], steps=steps, on_step=step
    )
    seconds = time.perf_counter() - started
    told = f"{method}: {lab.learned.adapter.num_parameters():,} parameters trained in {seconds:.1f} s."
    known = [(i, n) for i, n in enumerate(lab.learned.class_names) if n in SHAPES]
    if len(known) == len(lab.learned.class_names):  # drawn classes: there are unseen ones to try
        seed = random.getrandbits(20) + (1 << 21)
        tests = [(i, drawn_cloud(n, True, seed + j, NUM_POINTS)) for i, n in known for j in range(10)]
        right = lab.learned.predict(np.stack([c for _, c in tests])).argmax(1) == np.array([i for i, _ in tests])
        told += f" Of {len(tests)} unseen scans {right.mean():.0%} are recognised; by chance {1 / len(known):.0%}."
    return key, told


def encoder_name() -> str:
    """The bundled encoder that the lab adapts: the self-supervised one when it is there."""
    from mmkit.weights import list_weights

    return "point_mae_nano" if "point_mae_nano" in list_weights() else "point_shapes"


@readable
def on_ask(lab_key: str | None, cloud_key: str | None) -> tuple[Any, ...]:
    """What the taught model says about the cloud on the page, and which examples its prompts were made from."""
    import torch

    from mmkit.pointcloud import choose_points, unit_sphere

    lab = LABS.get(lab_key) if lab_key else Lab()
    if lab.learned is None:
        raise InputError("Adapt the model first.")
    if not cloud_key:
        raise InputError("Draw a cloud or drop a file first.")
    points, name = CLOUDS.get(cloud_key)
    seen = unit_sphere(points[choose_points(points, NUM_POINTS)])[None]
    label = dict(zip(lab.learned.class_names, map(float, lab.learned.predict(seen)[0]), strict=True))
    pictures = [(thumbnail(seen[0]), name)]
    if getattr(lab.learned.adapter.config, "bank_size", 0):
        found = lab.learned.adapter.retrieved(torch.from_numpy(seen))
        flat = [(c, n) for n, clouds in lab.examples.items() for c in clouds]
        rows = zip(found.index[0].tolist(), found.weight[0].tolist(), strict=True)
        pictures += [(thumbnail(flat[i][0]), f"{flat[i][1]} ({w:.0%})") for i, w in rows]
    return label, pictures


def build() -> None:
    """The page."""
    gr.Markdown(HELP, elem_id="points-help")
    key, lab = gr.State(None), gr.State(None)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            kind = gr.Dropdown([ANY, *SHAPES], value=ANY, label="Draw", elem_id="points-kind")
            form = gr.Radio([WHOLE, SCAN], value=WHOLE, label="How", elem_id="points-form")
            draw = gr.Button("Draw a cloud", variant="primary", elem_id="points-draw")
            file = gr.File(label="Mesh or cloud", file_types=list(SUFFIXES), height=120, elem_id="points-file")
            label = gr.Label(label="What it is", num_top_classes=5, elem_id="points-label")
        with gr.Column(scale=2, min_width=320):
            view = gr.Model3D(
                label="Cloud", display_mode="solid", camera_position=(55, 70, 3), height=440, clear_color=(0, 0, 0, 0),
                interactive=False, elem_id="points-view",
            )  # fmt: skip
            color = gr.Radio([GROUPS, ATTENTION, PARTS], value=GROUPS, label="Color", elem_id="points-color")
            parts = gr.HTML(elem_id="points-parts")
            status = gr.Textbox(label="Summary", value=BEGIN, interactive=False, elem_id="points-status")
    gr.Markdown(
        "## Few-shot lab\nA handful of examples per class is enough: a small adapter and a head are trained, the encoder stays."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            count = gr.Slider(2, 16, 10, step=1, label="Drawn classes", elem_id="points-classes")
            each = gr.Slider(1, MAX_EXAMPLES, 5, step=1, label="Examples of each", elem_id="points-each")
            fill = gr.Button("Draw examples", elem_id="points-fill")
            with gr.Accordion("Or add a class of your own", open=False):
                name = gr.Textbox(label="Class", elem_id="points-name")
                files = gr.File(
                    label="Examples",
                    file_count="multiple",
                    file_types=list(SUFFIXES),
                    height=120,
                    elem_id="points-files",
                )
                add = gr.Button("Add the class", elem_id="points-add")
            method = gr.Dropdown(list(METHODS), value="Point-PEFT", label="Method", elem_id="points-method")
            adapt = gr.Button("Adapt", variant="primary", elem_id="points-adapt")
        with gr.Column(scale=2, min_width=320):
            gallery = gr.Gallery(
                label="Examples", columns=5, height=300, object_fit="contain", elem_id="points-examples"
            )
            told = gr.Markdown("Draw examples, or add classes of your own.", elem_id="points-told")
            ask = gr.Button("Ask it about the cloud above", elem_id="points-ask")
            said = gr.Label(label="What the taught model says", num_top_classes=5, elem_id="points-said")
            found = gr.Gallery(
                label="The cloud, and the training samples its prompts retrieved", columns=5, height=220, object_fit="contain",
                elem_id="points-found",
            )  # fmt: skip
    private: dict[str, Any] = {"api_visibility": "private"}
    shown = [key, view, label, parts, status]
    asked = gr.on([file.upload, file.clear], on_file, [file, color], shown, **private)
    drawn = draw.click(on_draw, [kind, form, color], [file, *shown], **private)
    for event in (asked, drawn):
        event.failure(lambda: (None, None, None, "", "No answer: see the message."), None, shown, **private)
    color.input(on_color, [key, color], view, trigger_mode="always_last", **private)
    fill.click(on_drawn_classes, [lab, count, each], [lab, gallery, told], **private)
    add.click(on_add, [lab, name, files], [lab, gallery, told, files, name], **private)
    adapt.click(on_adapt, [lab, method], [lab, told], **private)
    ask.click(on_ask, [lab, key], [said, found], **private)
    gr.Button(visible=False).click(
        classify_cloud, gr.File(visible=False), gr.JSON(visible=False), api_name="classify_cloud"
    )


APP = App(
    "points",
    "Point clouds",
    "Drop a mesh or a point cloud, turn it, and see what it is, which patches the answer rests on, and its parts. Teach the model "
    "classes of your own from five examples each, in seconds.",
    build,
    sample="points-draw",
    picture="points-view",
    load=lambda: [pipeline_of(f"point-cloud-{job}") for job in ("classification", "segmentation")],
)
