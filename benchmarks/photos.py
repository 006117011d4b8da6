"""Four ways to adapt the bundled MobileNetV2 to photographs of clothes: test accuracy, size of the file, CPU minutes.

    python benchmarks/photos.py --data data/cls_clothing            # 3 seeds each; goes on where it stopped
    python benchmarks/photos.py --data data/cls_clothing --tune ssf --lr 1e-3 3e-3

400 training, 120 validation and 120 test photos of 10 classes (clothing-dataset-small, CC0), at 224 pixels. All four start from a
classifier that is solved on the features of the frozen network (`mmkit.vision.classification.probe`), as `mmkit finetune` does with
photos, and go on gently from there. The epoch that is best on the validation photos is scored once on the test photos; settings were
chosen on the validation photos, or with `--tune`, which sees training photos only and holds back a quarter of them. CPU minutes are
those of decoding, solving, training and scoring; beside them stands what one picture cost the frozen network, forward only, in the
same process, because the machine may be busy.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from mmkit import create_backbone
from mmkit.data import ImageDataset, open_dataset
from mmkit.memory import keep_freed_memory
from mmkit.storage import read_json, write_json
from mmkit.vision.classification import prepare, train_prepared

RESULT = Path(__file__).parent / "results" / "photos.json"
LATE = ["blocks.[3456].*.conv_pw", "blocks.[3456].*.conv_pwl", "conv_head"]
"""Where the picture is down to a sixteenth: what comes before costs most of a backward pass."""
METHODS: dict[str, dict[str, Any]] = {
    "linear_probe": {"epochs": 1},
    "ssf": {"lr": 5e-4, "epochs": 3, "settings": {"init_std": 0.0}},
    "lora": {"lr": 5e-4, "epochs": 3, "settings": {"r": 2, "lora_alpha": 4, "targets": LATE}},
    "full": {"lr": 1e-4, "epochs": 3},
}
"""Method -> what differs from the defaults of `mmkit finetune`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--tune", choices=list(METHODS), help="try the learning rates --lr on training photos only")
    parser.add_argument("--lr", type=float, nargs="+", default=[])
    args = parser.parse_args()
    keep_freed_memory()

    data = open_dataset(args.data)
    kept = read()
    if args.tune:
        part = data.split("train")
        part.splits = None  # so that a part of these is held back
        for lr in args.lr:
            kept["tuning"].append(one(part, args.tune, 0, {**METHODS[args.tune], "lr": lr}))
            write(kept)
    for seed in range(0 if args.tune else args.seeds):
        for method in args.methods:
            wanted = {"method": method, "seed": seed, "settings": METHODS[method]}
            if not any(wanted.items() <= run.items() for run in kept["runs"]):
                run = one(data, method, seed, METHODS[method])
                kept = read()  # another process may have measured meanwhile
                kept["runs"] = [r for r in kept["runs"] if (r["method"], r["seed"]) != (method, seed)]
                kept["runs"].append(run)
                write(kept)
    print(table(kept["runs"]))


def one(data: ImageDataset, method: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train once; with a test split its accuracy, else that on the pictures held back."""
    start = time.process_time()
    prepared = prepare(data, "mobilenetv2", method, val=0.25, seed=seed, settings=settings.get("settings"))
    result = train_prepared(prepared, epochs=settings["epochs"], lr=settings.get("lr"), seed=seed, progress=False)
    if result.fit.stopped != "finished":
        raise SystemExit(f"{method} seed {seed} was {result.fit.stopped}; nothing was written")
    minutes = (time.process_time() - start) / 60
    row = {
        "method": method,
        "seed": seed,
        "settings": settings,
        "accuracy": round(result.accuracy if result.test_accuracy is None else result.test_accuracy, 4),
        "validation": [round(h["accuracy"], 4) for h in result.fit.history],
        "file_kB": round(result.file_size / 1000, 1),
        "cpu_minutes": round(minutes, 2),
        "forward_ms": forward_ms(),
        "trainable_parameters": prepared.trainable_parameters,
    }
    print({k: v for k, v in row.items() if k != "settings"}, flush=True)
    return row


@torch.inference_mode()
def forward_ms(side: int = 224) -> float:
    """CPU milliseconds of one picture through the network, in batches of 32."""
    x, model = torch.zeros(32, 3, side, side), create_backbone("mobilenetv2").eval()
    model(x)
    start = time.process_time()
    model(x)
    return round((time.process_time() - start) / 32 * 1000, 1)


def read() -> dict[str, Any]:
    return read_json(RESULT) if RESULT.exists() else {"tuning": [], "runs": []}


def write(kept: dict[str, Any]) -> None:
    """After every run: an interrupted benchmark keeps what it measured."""
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    write_json(RESULT, {"machine": machine, **kept})
    RESULT.with_suffix(".md").write_text(table(kept["runs"]) + "\n")


def table(runs: list[dict[str, Any]]) -> str:
    """A line of markdown per method: means over its seeds."""
    lines = [
        "| method | test accuracy | seeds | trained parameters | file, kB | CPU minutes | ms per picture, forward |",
        "|---" * 7 + "|",
    ]
    for method in METHODS:
        rows = [r for r in runs if r["method"] == method]
        if rows:
            mean = {k: statistics.mean(r[k] for r in rows) for k in ("accuracy", "cpu_minutes", "forward_ms")}
            each = ", ".join(f"{100 * r['accuracy']:.1f}" for r in rows)
            size = max(r["file_kB"] for r in rows)
            cells = (f"{100 * mean['accuracy']:.1f} %", each, f"{rows[0]['trainable_parameters']:,}", f"{size:,.0f}")
            lines.append(f"| {' | '.join((method, *cells))} | {mean['cpu_minutes']:.1f} | {mean['forward_ms']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
