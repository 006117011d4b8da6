"""Which method for how many bytes: accuracy, drift, size, CPU time and memory of all methods on one backbone and three data sets.

    python benchmarks/pareto.py --data DIR/cls_clothing     # goes on where it stopped; about 5 CPU minutes for each of --seeds

The bundled `tiny_vit` (32 pixels) is adapted to scikit-learn's digits, to drawn scenes (shape and texture of what they show) and to photos
of clothes (CC0) made small: 240 pictures for 6 epochs, at one rate per method, the best of three on a quarter of the training digits that
was held back for that. The test pictures are looked at once, after the last epoch; nothing is selected on them.

- accuracy: of 240 test pictures.
- drift: how far the features of pictures of the other two sets have moved, relative to their length; 0 is none.
- bytes: of what is trained, 4 each; file: of the saved adapter with its classifier.
- cost: CPU seconds of the training over those of a forward pass of as many pictures, measured just before in the same process.
- memory: bytes kept for the backward pass of 32 pictures, gradients and Adam's two moments, besides the weights; counted, not sampled.

Writes benchmarks/results/pareto.json, pareto.md, pareto.png (docs/pictures/pareto.webp), and apps/pareto.json, which
the studio's page reads.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from PIL import Image
from torch import Tensor, nn

from mmkit import create_backbone
from mmkit.adapters import save_adapter
from mmkit.backbones import save_backbone
from mmkit.charts import frontier
from mmkit.data import ImageDataset, ImageTransform, array_dataset, load_digits, open_dataset
from mmkit.data.drawn.scenes import SHAPES, TEXTURES, draw_scenes, random_scenes
from mmkit.storage import read_json, write_json
from mmkit.training import FitResult, fit
from mmkit.vision.classification import Prepared, fit_config, prepare
from mmkit.vision.classification.probe import head_inputs
from mmkit.weights import weight_entry

RESULT = Path(__file__).parent / "results" / "pareto.json"
SHOWN = Path(__file__).parent.parent / "docs" / "pictures" / "pareto.webp"
PACKAGED = Path(__file__).parent.parent / "apps" / "pareto.json"
BACKBONE, TRAIN, TEST, EPOCHS, TUNE_EPOCHS, BATCH = "tiny_vit", 240, 240, 6, 4, 32
RATES = (1e-3, 6e-3, 3e-2)
EVERY = {"targets": ["qkv", "proj", "fc1", "fc2"], "exclude": ["patch_embed.proj"]}
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Linear probe": ("baseline", "linear_probe", {}),
    "All weights": ("baseline", "full", {}),
    "BitFit": ("biases and scales", "bitfit", {}),
    "SSF": ("biases and scales", "ssf", {}),
    "LN tuning": ("biases and scales", "ln_tuning", {}),
    "IA3": ("biases and scales", "ia3", {}),
    "BEFT": ("biases and scales", "beft", {}),
    "GMM": ("attention masks", "gmm", {}),
    "LoRA r1": ("low rank", "lora", {"r": 1}),
    "LoRA r8": ("low rank", "lora", {"r": 8}),
    "LoRA r8, all layers": ("low rank", "lora", {"r": 8, **EVERY}),
    "DoRA": ("low rank", "dora", {"r": 8}),
    "LoHa": ("low rank", "loha", {}),
    "LoKr": ("low rank", "lokr", {}),
    "HiRA": ("low rank", "hira", {}),
    "DeLoRA": ("low rank", "delora", {}),
    "GraLoRA": ("low rank", "gralora", {}),
    "RandLoRA": ("low rank", "randlora", {}),
    "MiSS": ("low rank", "miss", {}),
    "PSOFT": ("rotations", "psoft", {}),
    "OFT": ("rotations", "oft", {}),
    "BOFT": ("rotations", "boft", {}),
    "HRA": ("rotations", "hra", {}),
    "RoAd": ("rotations", "road", {}),
    "FourierFT": ("spectral and sparse", "fourierft", {}),
    "WaveFT": ("spectral and sparse", "waveft", {}),
    "C3A": ("spectral and sparse", "c3a", {"block_size": 32}),
    "SHiRA": ("spectral and sparse", "shira", {}),
}
"""Shown name -> family, adapter, settings."""
METRICS = ("accuracy", "drift", "bytes", "file", "cost", "memory")


def data_sets(clothes: Path) -> dict[str, ImageDataset]:
    """240 training and 240 test pictures of 32 pixels each."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits))[: TRAIN + TEST].tolist()
    return {"digits": split(digits.subset(order)), "scenes": split(scenes()), "clothes": split(photos(clothes))}


def split(data: Any) -> ImageDataset:
    data.splits = ["train"] * TRAIN + ["test"] * (len(data) - TRAIN)
    return data


def scenes() -> ImageDataset:
    """What lies there and what it is made of: 18 classes, one object."""
    generator = torch.Generator().manual_seed(7)
    found = random_scenes(TRAIN + TEST, generator, count="one", size="large")
    pictures = (draw_scenes(found, generator, 32) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    labels = (found.shape * len(TEXTURES) + found.texture).tolist()
    return array_dataset(pictures, labels, [f"{t} {s}" for s in SHAPES for t in TEXTURES], name="scene")


def photos(folder: Path) -> ImageDataset:
    """The photos, centre-cropped to 32 pixels: 240 of the training split, and validation and test as test."""
    source = open_dataset(folder)
    train = [i for i, s in enumerate(source.splits or ()) if s == "train"]
    order = [train[i] for i in np.random.default_rng(0).permutation(len(train))[:TRAIN]]
    order += [i for i, s in enumerate(source.splits or ()) if s != "train"][:TEST]
    small = []
    for i in order:
        picture = source[i][0]
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        small.append(picture.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.LANCZOS))
    labels = [source.labels[i] for i in order]
    return array_dataset(np.stack([np.asarray(p) for p in small]), labels, source.class_names, name="photo")


class Meter:
    """The features of the plain backbone on foreign pictures, and what one picture costs it, forward only."""

    def __init__(self, sets: dict[str, ImageDataset]) -> None:
        self.model = create_backbone(BACKBONE).eval()
        info: Any = self.model.backbone_info
        prepared = ImageTransform.of(info.preprocessing())
        self.head = info.heads[0]
        self.foreign = {
            name: [prepared(other[i][0]) for k, other in sets.items() if k != name for i in range(TRAIN, TRAIN + 32)] for name in sets
        }  # fmt: skip
        self.plain = {name: self.features(self.model, name) for name in sets}

    def features(self, model: nn.Module, name: str) -> Tensor:
        """(64, D) of what the classifier of `model` is given."""
        return head_inputs(model, [self.head], self.foreign[name])[self.head]

    def drift(self, model: nn.Module, name: str) -> float:
        moved = self.features(model, name) - self.plain[name]
        return float((moved.norm(dim=1) / self.plain[name].norm(dim=1)).mean())

    @torch.inference_mode()
    def forward_seconds(self) -> float:
        """CPU seconds of a picture, in batches of 32."""
        x = torch.zeros(BATCH, 3, 32, 32)
        self.model(x)
        start = time.process_time()
        for _ in range(8):
            self.model(x)
        return (time.process_time() - start) / (8 * BATCH)


def kept_bytes(model: nn.Module, images: Tensor, trained: int) -> int:
    """Bytes that a training step of `images` holds besides the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:  # SHiRA's sparse update
            parts = tensor.detach().coalesce()
            seen[id(tensor)] = parts.values().nbytes + parts.indices().nbytes
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = model(images)
    assert output.requires_grad
    return sum(seen.values()) + 3 * 4 * trained


_PREPARED: dict[int, list[tuple[Tensor, int]]] = {}


def examples(data: Any, first: int, last: int) -> list[tuple[Tensor, int]]:
    """Pictures `first` to `last - 1` as the backbone takes them, prepared once: nothing is augmented here."""
    if id(data) not in _PREPARED:
        info: Any = create_backbone(BACKBONE).backbone_info
        prepared = data.with_transform(ImageTransform.of(info.preprocessing()))
        _PREPARED[id(data)] = [prepared[i] for i in range(len(data))]
    return _PREPARED[id(data)][first:last]


def one(
    data: ImageDataset, label: str, seed: int, lr: float, epochs: int, train: int, last: int
) -> tuple[Prepared, FitResult, float]:
    """Train on the first `train` pictures, measure once on those from there to `last`; what came out, and CPU seconds."""
    _, method, settings = METHODS[label]
    prepared = prepare(data, BACKBONE, method, seed=seed, settings=settings, augment=False, solve_heads=False)
    config = fit_config(
        prepared, epochs=epochs, lr=lr, batch_size=BATCH, seed=seed, progress=False, eval_every=epochs, device="cpu"
    )
    pictures, held = examples(data, 0, train), examples(data, train, last)
    start = time.process_time()
    found = fit(prepared.model, pictures, held, adapter=prepared.adapter, config=config)
    if found.stopped != "finished":
        raise SystemExit(f"{label} was {found.stopped}; nothing was written")
    return prepared, found, time.process_time() - start


def file_bytes(prepared: Prepared) -> int:
    """Of what has to be kept beside the backbone."""
    with tempfile.TemporaryDirectory() as folder:
        if prepared.adapter is None:
            save_backbone(prepared.model, f"{folder}/x")
        else:
            save_adapter(prepared.adapter, f"{folder}/x")
        return sum(f.stat().st_size for f in Path(folder, "x").iterdir())


def rate(data: ImageDataset, label: str) -> dict[str, Any]:
    """The learning rate that is best on a quarter of the training pictures; ties go to the lower loss."""
    found = {}
    for lr in RATES:
        metrics = one(data, label, 0, lr, TUNE_EPOCHS, TRAIN * 3 // 4, TRAIN)[1].metrics
        found[f"{lr:g}"] = [round(metrics["accuracy"], 4), round(metrics["loss"], 4)]
    best = max(found, key=lambda k: (found[k][0], -found[k][1]))
    return {"lr": float(best), "tried": found}


def measure(sets: dict[str, ImageDataset], name: str, label: str, seed: int, lr: float, meter: Meter) -> dict[str, Any]:
    forward = meter.forward_seconds()
    prepared, found, seconds = one(sets[name], label, seed, lr, EPOCHS, TRAIN, TRAIN + TEST)
    images = torch.stack([x for x, _ in examples(sets[name], 0, TRAIN)[:BATCH]])
    trained = prepared.trainable_parameters
    return {
        "accuracy": round(found.metrics["accuracy"], 4),
        "drift": round(meter.drift(prepared.model, name), 4),
        "parameters": trained,
        "bytes": 4 * trained,
        "file": file_bytes(prepared),
        "cost": round(seconds / (forward * TRAIN * EPOCHS), 3),
        "cpu_seconds": round(seconds, 3),
        "forward_ms": round(1000 * forward, 3),
        "memory": kept_bytes(prepared.model, images, trained),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("MMKIT_DATA_DIR", "shared/data")) / "cls_clothing"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=120, help="CPU minutes after which no further run begins")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument(
        "--tables", action="store_true", help="write table and picture of what is measured, measure nothing"
    )
    args = parser.parse_args()
    kept = read_json(RESULT) if args.tables else read()
    if not args.tables:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        sets = data_sets(args.data)
        run(kept, sets, Meter(sets), args)
    write_tables(kept)


def run(kept: dict[str, Any], sets: dict[str, ImageDataset], meter: Meter, args: argparse.Namespace) -> None:
    jobs: list[tuple[str, str, int]] = [("", label, 0) for label in args.methods]
    jobs += [(name, label, seed) for seed in range(args.seeds) for label in args.methods for name in sets]
    for name, label, seed in jobs:
        if time.process_time() > 60 * args.minutes:
            print("The time is up; run again to go on.")
            return
        if not name and label not in kept["rates"]:
            kept["rates"][label] = rate(sets["digits"], label)
            print(f"{label}: {kept['rates'][label]}", flush=True)
        key = f"{name} / {label} / {seed}"
        if name and key not in kept["runs"]:
            kept["runs"][key] = measure(sets, name, label, seed, kept["rates"][label]["lr"], meter)
            print(f"{key}: {kept['runs'][key]}", flush=True)
        write_json(RESULT, kept)


def read() -> dict[str, Any]:
    """What was measured with these very weights and versions."""
    machine = {"python": platform.python_version(), "torch": torch.__version__, "peft": peft.__version__, "threads": 1}
    about = {
        "backbone": BACKBONE,
        "sha256": weight_entry(BACKBONE).sha256,
        "train": TRAIN,
        "test": TEST,
        "epochs": EPOCHS,
    }
    fresh = {"machine": machine, "about": about, "rates": {}, "runs": {}}
    old = read_json(RESULT) if RESULT.exists() else fresh
    return old if old["about"] == about else fresh


def summary(kept: dict[str, Any]) -> dict[str, Any]:
    """What the page reads: for each data set and their mean, a row per method with the means over its seeds."""
    names = list(dict.fromkeys(key.split(" / ")[0] for key in kept["runs"]))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in names:
        for label, (family, method, _) in METHODS.items():
            runs = [r for k, r in kept["runs"].items() if k.startswith(f"{name} / {label} / ")]
            if runs:
                means = {m: statistics.mean(r[m] for r in runs) for m in METRICS}
                spread = statistics.stdev(r["accuracy"] for r in runs) if len(runs) > 1 else None
                about = {"name": label, "family": family, "adapter": method, "lr": kept["rates"][label]["lr"]}
                rows[name].append(
                    about | {k: round(v, 4) for k, v in means.items()} | {"seeds": len(runs), "spread": spread}
                )
    complete = [label for label in METHODS if all(any(r["name"] == label for r in rows[n]) for n in names)]
    rows["mean of the three"] = [
        {**next(r for r in rows[names[0]] if r["name"] == label), "spread": None}
        | {m: round(statistics.mean(r[m] for n in names for r in rows[n] if r["name"] == label), 4) for m in METRICS}
        for label in complete
    ]
    return {
        "about": kept["about"] | {"seeds": rows["mean of the three"][0]["seeds"]},
        "sets": dict(reversed(rows.items())),
    }


def write_tables(kept: dict[str, Any]) -> None:
    told = summary(kept)
    write_json(PACKAGED, told, indent=None)
    rows = sorted(told["sets"]["mean of the three"], key=lambda r: r["bytes"])
    best = frontier([(r["bytes"], r["accuracy"]) for r in rows])
    each = {n: {r["name"]: r for r in v} for n, v in told["sets"].items()}
    names = [n for n in each if n != "mean of the three"]
    lines = [
        f"| method | mean | {' | '.join(names)} | drift | trained, kB | file, kB | cost | memory, MB | rate |",
        "|---" * (len(names) + 8) + "|",
    ]
    for i, r in enumerate(rows):
        scores = " | ".join(f"{100 * each[n][r['name']]['accuracy']:.1f}" for n in names)
        mark = "**" if i in best else ""
        lines.append(
            f"| {mark}{r['name']}{mark} | {mark}{100 * r['accuracy']:.1f}{mark} | {scores} | {r['drift']:.2f} | {r['bytes'] / 1000:,.0f} | "
            f"{r['file'] / 1000:,.0f} | {r['cost']:.1f} | {r['memory'] / 1e6:.1f} | {r['lr']:g} |"
        )
    error = 100 * statistics.mean(
        math.sqrt(r["accuracy"] * (1 - r["accuracy"]) / (3 * TEST * r["seeds"])) for r in rows
    )
    note = (
        f"\nAccuracy in %, {rows[0]['seeds']} seed(s); bold: nothing smaller is as good. The mean of the three is "
        f"uncertain by about ± {error:.1f} (standard error of the test pictures alone). Cost: CPU time of the "
        "training over that of a forward pass of as many pictures.\n"
    )
    RESULT.with_suffix(".md").write_text("\n".join(lines) + "\n" + note, encoding="utf-8")
    plot(told)
    print("\n".join(lines))


FAMILIES = {
    "baseline": "#334155", "biases and scales": "#0d9488", "low rank": "#3b82f6", "rotations": "#d97706", "spectral and sparse": "#db2777",
    "attention masks": "#8b5cf6",
}  # fmt: skip


def plot(told: dict[str, Any]) -> None:
    """A large panel of the mean with every name, and one per data set with those on its frontier."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 11), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 3, height_ratios=[2.1, 1])
    mean, *single = list(told["sets"])
    panels = [(figure.add_subplot(grid[0, :]), mean)]
    panels += [(figure.add_subplot(grid[1, i]), name) for i, name in enumerate(single)]
    labels = []
    for axes, name in panels:
        rows = sorted(told["sets"][name], key=lambda r: r["bytes"])
        points = [(r["bytes"] / 1000, 100 * r["accuracy"]) for r in rows]
        best = frontier(points)
        for family, color in FAMILIES.items():
            own = [p for p, r in zip(points, rows, strict=True) if r["family"] == family]
            axes.scatter(
                [p[0] for p in own], [p[1] for p in own], s=42, color=color, label=family, zorder=3, edgecolor="white"
            )
        steps = [points[i] for i in best]
        axes.step([p[0] for p in steps], [p[1] for p in steps], where="post", color="#94a3b8", lw=1.4, zorder=1)
        axes.set(xscale="log", title=name, xlabel="trained, kB (log scale)", ylabel="test accuracy, %")
        axes.grid(alpha=0.25)
        chosen = range(len(rows)) if axes is panels[0][0] else best
        labels.append((axes, points, [(i, rows[i]["name"], i in best) for i in chosen]))
    panels[0][0].legend(loc="lower right", frameon=False, fontsize=10)
    figure.suptitle(
        "What accuracy a method reaches with how much trained; the line: nothing smaller is as good", fontsize=13
    )
    figure.canvas.draw()
    for axes, points, wanted in labels:
        place_labels(axes, points, wanted)
    figure.savefig(RESULT.with_suffix(".png"), dpi=110)
    with Image.open(RESULT.with_suffix(".png")) as picture:
        picture.convert("RGB").save(SHOWN, quality=82, method=6)


def place_labels(axes: Any, points: list[tuple[float, float]], wanted: list[tuple[int, str, bool]]) -> None:
    """Write each name where it covers the least of points and of other names."""
    from matplotlib.patheffects import withStroke

    renderer = axes.figure.canvas.get_renderer()
    dots = [axes.transData.transform(p) for p in points]
    taken: list[Any] = []
    frame = axes.get_window_extent()
    ways = ((1, 0), (-1, 0), (0.7, 0.8), (-0.7, 0.8), (0.7, -0.8), (-0.7, -0.8), (0, 1), (0, -1))
    spots = [(dx * radius, dy * radius) for radius in (9, 16, 26, 38) for dx, dy in ways]
    for i, name, bold in sorted(wanted, key=lambda w: not w[2]):
        best = None
        for dx, dy in spots:
            text = axes.annotate(
                name, points[i], xytext=(dx, dy), textcoords="offset points", fontsize=9, fontweight="bold" if bold else "normal",
                ha="left" if dx > 1 else "right" if dx < -1 else "center", va="center", zorder=4,
                path_effects=[withStroke(linewidth=3, foreground="white")],
                arrowprops={"arrowstyle": "-", "color": "#cbd5e1", "lw": 0.7} if max(abs(dx), abs(dy)) > 12 else None,
            )  # fmt: skip
            box = text.get_window_extent(renderer).expanded(1.04, 1.1)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            clash = sum(box.overlaps(t) for t in taken) + sum(
                box.x0 - 4 < x < box.x1 + 4 and box.y0 - 4 < y < box.y1 + 4 for x, y in dots
            )
            cost = clash + 10 * (not inside)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
            if cost == 0:
                break
        assert best is not None
        taken.append(best[2])


if __name__ == "__main__":
    main()
