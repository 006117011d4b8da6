"""Adapters against the linear probe on real handwritten digits, bundled tiny ViT, 3 seeds: accuracy, parameters, merge error.

    python benchmarks/digits.py            # about three minutes on two cores; writes benchmarks/results/digits.json

The ViT has seen no handwriting. Each seed draws its own 80/20 split; all methods share it, with 15 epochs and each its usual
learning rate.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from pathlib import Path

import torch

from mmkit.data import load_digits
from mmkit.storage import write_json
from mmkit.vision.classification import LEARNING_RATES, prepare, report_table, train_prepared

RESULT = Path(__file__).parent / "results" / "digits.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["linear_probe", "bitfit", "ssf", "lora"])
    args = parser.parse_args()
    digits, rows = load_digits(), []
    for method in args.methods:
        reports = []
        for seed in range(args.seeds):
            prepared = prepare(digits, "tiny_vit", method, seed=seed)
            result = train_prepared(prepared, epochs=args.epochs, batch_size=64, seed=seed, progress=False)
            if result.fit.stopped != "finished":
                raise SystemExit(f"{method} seed {seed} was {result.fit.stopped}; nothing was written")
            reports.append(result.report)
            print(f"{method} seed {seed}: {100 * result.accuracy:.1f} %", flush=True)
        accuracies = [r["accuracy"] for r in reports]
        worst = max((r["merge_error"] for r in reports if r["merge_error"] is not None), default=None)
        keep = {k: reports[0][k] for k in ("method", "trainable_parameters", "total_parameters", "file_size")}
        seconds = round(statistics.mean(r["seconds"] for r in reports), 1)
        rows.append(
            {
                **keep,
                "accuracy": statistics.mean(accuracies),
                "accuracies": accuracies,
                "merge_error": worst,
                "seconds": seconds,
            }
        )
    print("\n" + report_table(rows))
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    settings = {"epochs": args.epochs, "batch_size": 64, "learning_rates": LEARNING_RATES}
    write_json(RESULT, {"machine": machine, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
