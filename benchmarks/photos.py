"""Four ways to adapt the bundled MobileNetV2 to photographs of clothes: test accuracy, size of the file, CPU minutes.

    python benchmarks/photos.py --data data/cls_clothing        # 3 seeds; writes benchmarks/results/photos.json

400 training, 120 validation and 120 test photos of 10 classes (clothing-dataset-small, CC0). The epoch that is best on the validation
photos is scored once on the test photos. CPU minutes are those of the whole process: both decoding and training.
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

from mmkit.data import open_dataset
from mmkit.storage import write_json
from mmkit.vision.classification import prepare, train_prepared

RESULT = Path(__file__).parent / "results" / "photos.json"
METHODS = {"linear_probe": 1e-2, "ssf": 5e-3, "lora": 2e-3, "full": 3e-4}
"""Method -> peak learning rate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--img-size", type=int, default=192)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()

    data = open_dataset(args.data)
    rows = []
    for method in args.methods:
        runs = [one(data, method, seed, args.epochs, args.img_size) for seed in range(args.seeds)]
        row = {
            "method": method,
            "accuracy": statistics.mean(r["accuracy"] for r in runs),
            "accuracies": [r["accuracy"] for r in runs],
            "file_kB": round(max(r["file_size"] for r in runs) / 1000, 1),
            "cpu_minutes": round(statistics.mean(r["cpu_minutes"] for r in runs), 2),
            "trainable_parameters": runs[0]["trainable_parameters"],
        }
        rows.append(row)
        print({k: v for k, v in row.items() if k != "accuracies"}, flush=True)
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    settings = {"epochs": args.epochs, "img_size": args.img_size, "seeds": args.seeds, "learning_rates": METHODS}
    write_json(RESULT, {"machine": machine, "settings": settings, "rows": rows})


def one(data: Any, method: str, seed: int, epochs: int, img_size: int) -> dict[str, Any]:
    start = time.process_time()
    prepared = prepare(data, "mobilenetv2", method, seed=seed, augment=True, overrides={"img_size": img_size})
    result = train_prepared(prepared, epochs=epochs, lr=METHODS[method], seed=seed, progress=False)
    if result.fit.stopped != "finished":
        raise SystemExit(f"{method} seed {seed} was {result.fit.stopped}; nothing was written")
    minutes = (time.process_time() - start) / 60
    print(f"{method} seed {seed}: test {result.test_accuracy:.3f}, {minutes:.2f} CPU minutes", flush=True)
    return {
        "accuracy": result.test_accuracy,
        "file_size": result.file_size,
        "cpu_minutes": minutes,
        "trainable_parameters": prepared.trainable_parameters,
    }


if __name__ == "__main__":
    main()
