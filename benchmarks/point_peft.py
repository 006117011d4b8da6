"""Eight ways to adapt a small point cloud transformer, on drawn scans and on real meshes, beside the parts of Point-PEFT taken away.

    python benchmarks/point_peft.py scans  [--seeds 3]
    python benchmarks/point_peft.py meshes --data DIR      # a folder of .obj files, one kind of thing each
    python benchmarks/point_peft.py scans --methods Point-PEFT full --seeds 1
    python benchmarks/point_peft.py few-shot               # ten kinds of things from five scans each, on all cores

The encoder is the bundled `point_mae_nano`, pre-trained without labels on drawn clouds (examples/pretrain_point_mae.py).
scans: sixteen drawn things as a depth camera sees them, 30 labelled clouds each, 40 others to test.
meshes: each mesh 12 times from any side to learn from, 20 times to test; half of the views hide what lies behind.
All methods see the same clouds, turned and scaled at random, for as many epochs; the rates are those of the method's authors or
the best of two tried on drawn clouds of another seed (see `METHODS`); the last epoch counts, nothing is chosen on the test clouds.
Every run is recorded when it is done, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from mmkit import FitConfig, fit, load_weights
from mmkit.adapters import apply_adapter
from mmkit.data.drawn.shapes import SHAPES, ProceduralShapes, visible
from mmkit.errors import InputError
from mmkit.pointcloud import Augment, read_point_cloud, unit_sphere
from mmkit.pointcloud.point_peft import AugmentedLoss, FeatureMemoryBank, adapt_few_shot, point_mae_nano, with_own_entry
from mmkit.storage import atomic_write, read_json, write_json

RESULTS = Path(__file__).parent / "results"
POINTS, EPOCHS, BATCH = 256, 25, 32
Clouds = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Method:
    """An adapter (none: all weights), its settings and its rate."""

    adapter: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    lr: float = 5e-3
    pretrained: bool = True


_HEAD = {"modules_to_save": ("cls", "norm", "head")}
_PEFT = {"adapter_dim": 8, "bank_size": 100}
METHODS = {
    "linear probe": Method("linear_probe"),
    "biases": Method("bitfit", _HEAD),
    "LoRA": Method("lora", {"r": 4, **_HEAD}),
    "SSF": Method("ssf", {"init_std": 0.0, **_HEAD}),
    "Point-PEFT": Method("point_peft", _PEFT),
    "Point-PEFT, silent start": Method("point_peft", {**_PEFT, "init": "zero"}),
    "Point-PEFT without geometry": Method("point_peft", {**_PEFT, "geometry": False}),
    "Point-PEFT without bank": Method("point_peft", {**_PEFT, "bank_size": 0}),
    "Point-PEFT without prompts": Method("point_peft", {**_PEFT, "bank_size": 0, "num_prompts": 0}),
    "PointGST": Method("pointgst", {"rank": 8, "local": 4}),
    "IDPT": Method("idpt", {"k": 8, "clip_k": True}),
    "full": Method(None, lr=1e-3),
    "from scratch": Method(None, lr=1e-3, pretrained=False),
}


# --- data --------------------------------------------------------------------------------------------------------------------------


def drawn_scans(split: str, per_class: int, seed: int) -> Clouds:
    """Scans of the sixteen drawn things."""
    data = ProceduralShapes(split, "scan", per_class, POINTS, seed=seed)
    samples = [data[i] for i in range(len(data))]
    return torch.from_numpy(np.stack([s[0] for s in samples])), torch.tensor([s[1] for s in samples])


def mesh_views(files: list[Path], per_class: int, seed: int) -> Clouds:
    """Views of meshes: turned anyhow, every second one seen from one side only, a little noise."""
    points, labels = [], []
    for label, file in enumerate(files):
        rng = np.random.default_rng([seed, label])
        surface = read_point_cloud(file, num_points=4096, seed=seed).xyz
        for view in range(per_class):
            turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
            cloud = surface @ (turn * np.sign(np.linalg.det(turn)))
            cloud = cloud[visible(cloud, 0.0, 0.0)] if view % 2 else cloud
            cloud = cloud[rng.choice(len(cloud), POINTS, replace=len(cloud) < POINTS)]
            points.append(unit_sphere(cloud + rng.normal(0, 0.005, cloud.shape)))
            labels.append(label)
    return torch.from_numpy(np.stack(points)), torch.tensor(labels)


def load_task(task: str, data: Path | None, seed: int) -> tuple[Clouds, Clouds, tuple[str, ...], Augment]:
    """Clouds to learn from, clouds to test, class names, and how clouds are changed while training."""
    if task == "scans":
        augment = Augment("y", (0.8, 1.2), per_axis=False)
        return drawn_scans("labelled", 30, seed), drawn_scans("held-out", 40, seed), SHAPES, augment
    files = sorted(data.glob("*.obj")) if data is not None else []
    if len(files) < 2:
        raise InputError(f"--data must be a folder with .obj files of several things; found {len(files)} in {data}.")
    names = tuple(f.stem for f in files)
    augment = Augment("so3", (0.8, 1.2), per_axis=False)
    return mesh_views(files, 12, 2 * seed), mesh_views(files, 20, 2 * seed + 1), names, augment


# --- one run -----------------------------------------------------------------------------------------------------------------------


def run(task: str, method: Method, data: Path | None, seed: int, epochs: int) -> dict[str, Any]:
    """Adapt once and answer for the held-out clouds."""
    train, test, names, augment = load_task(task, data, seed)
    torch.manual_seed(seed)
    model = point_mae_nano(num_classes=len(names))
    if method.pretrained:
        own = {k: v for k, v in load_weights("point_mae_nano").state_dict().items() if not k.startswith("head.")}
        model.load_state_dict(own, strict=False)
    start, loss, samples = time.process_time(), AugmentedLoss(augment), train
    adapter = None
    if method.adapter:
        adapter = apply_adapter(model, method.adapter, **method.settings)
    if method.settings.get("bank_size"):
        chosen = torch.randperm(len(train[0]))[: method.settings["bank_size"]]
        own_entry = torch.full((len(train[0]),), -1).scatter_(0, chosen, torch.arange(len(chosen)))
        with adapter.disabled():  # type: ignore[union-attr]
            adapter.set_bank(FeatureMemoryBank.build(model, train[0][chosen].split(64)))  # type: ignore[union-attr]
        loss, samples = with_own_entry(loss), (*train, own_entry)
    config = FitConfig(
        epochs=epochs, batch_size=BATCH, lr=method.lr, warmup_epochs=1, weight_decay=0.05, seed=seed, progress=False,
        resume=False, drop_last=True,
    )  # fmt: skip
    result = fit(model, TensorDataset(*samples), loss_fn=loss, config=config, adapter=adapter)
    if result.stopped != "finished":
        raise SystemExit(f"{result.stopped} after {result.steps} steps: this run is not recorded")
    model.eval()
    with torch.no_grad():
        right = torch.cat([model(p).argmax(1) for p in test[0].split(128)]) == test[1]
    trained = adapter.num_parameters() if adapter else sum(p.numel() for p in model.parameters())
    return {
        "accuracy": round(float(right.float().mean()), 4),
        "trained": trained,
        "steps": result.steps,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def few_shot(seeds: int) -> dict[str, Any]:
    """Teach ten kinds of things from five scans each, as the studio's page does, with its defaults; asked about 40 other scans of each."""
    kinds, rows = SHAPES[:10], []
    encoder = load_weights("point_mae_nano")
    for seed in range(seeds):
        shown, others = (
            ProceduralShapes(f"few {split}", "scan", n, POINTS, kinds, seed)
            for split, n in (("shown", 5), ("others", 40))
        )
        examples: dict[str, list[np.ndarray]] = {k: [] for k in kinds}
        for i in range(len(shown)):
            examples[kinds[shown[i][1]]].append(shown[i][0])
        wall, cpu = time.perf_counter(), time.process_time()
        taught = adapt_few_shot(encoder, examples, seed=seed)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        asked = [others[i] for i in range(len(others))]
        right = taught.predict(np.stack([a[0] for a in asked])).argmax(1) == [a[1] for a in asked]
        rows.append(
            {"accuracy": round(float(right.mean()), 4), "wall_seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}
        )
    return {"classes": len(kinds), "examples": 5, "threads": torch.get_num_threads(), "runs": rows}


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds, in the order of `METHODS`."""
    rows = {}
    for name in METHODS:
        mine = [r for key, r in runs.items() if key.startswith(f"{name} / ")]
        if mine:
            found = [r["accuracy"] for r in mine]
            rows[name] = {k: round(statistics.mean(r[k] for r in mine), 4) for k in mine[0]}
            rows[name] |= {"range": [min(found), max(found)], "seeds": len(mine)}
    return rows


def write_table(report: dict[str, Any]) -> None:
    """The same as Markdown."""
    lines = ["# Adapting a small point cloud transformer", ""]
    for task in ("scans", "meshes"):
        if task in report:
            lines += [
                f"## {task}",
                "",
                "| method | accuracy | range | trained | CPU s | seeds |",
                "|---|---|---|---|---|---|",
            ]
            for name, r in report[task]["rows"].items():
                low, high = r["range"]
                cells = (
                    name, f"{r['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", f"{r['trained']:,.0f}",
                    f"{r['cpu_seconds']:.0f}", r["seeds"],
                )  # fmt: skip
                lines.append(f"| {' | '.join(map(str, cells))} |")
            lines.append("")
    if "few-shot" in report:
        lines += ["## few-shot", "", "| seed | accuracy | wall s | CPU s |", "|---|---|---|---|"]
        for seed, r in enumerate(report["few-shot"]["runs"]):
            lines.append(f"| {seed} | {r['accuracy']:.1%} | {r['wall_seconds']} | {r['cpu_seconds']} |")
        lines += ["", f"Ten kinds, five scans each, {report['few-shot']['threads']} threads; chance is 10 %.", ""]
    with atomic_write(RESULTS / "point_peft.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def known(path: Path, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole report so far, and the runs of this task with as many epochs."""
    report = read_json(path) if path.exists() else {}
    task = report.get(args.task, {})
    return report, task.get("runs", {}) if task.get("epochs") == args.epochs else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("scans", "meshes", "few-shot"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    path = RESULTS / "point_peft.json"
    if args.task == "few-shot":
        report = (read_json(path) if path.exists() else {}) | {"few-shot": few_shot(args.seeds)}
        write_json(path, report)
        write_table(report)
        return print(report["few-shot"])
    torch.set_num_threads(1)
    for seed in range(args.seeds):
        for name in args.methods:
            key = f"{name} / {seed}"
            if key in known(path, args)[1]:
                continue
            found = run(args.task, METHODS[name], args.data, seed, args.epochs)
            report, runs = known(path, args)  # read again: the other task may have written meanwhile
            runs[key] = found
            report[args.task] = {"epochs": args.epochs, "runs": runs, "rows": summary(runs)}
            write_json(path, report)
            write_table(report)
            print(key, found, flush=True)


if __name__ == "__main__":
    main()
