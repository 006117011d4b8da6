"""What does `fit` cost beside the loop one would write by hand? CPU time of both, in turns, on the same data and model.

The bare loop shuffles, stacks, runs forward, backward, gradient clipping and AdamW; it has no schedule, no log, no stopping,
no checks and cannot be resumed. Data: tensors in memory (`TensorDataset`, indexed by the batch in both), a list of
examples (stacked in both), and a data set that draws random numbers for each example.

    python benchmarks/fit_overhead.py
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from mmkit.backbones import create_backbone
from mmkit.storage import write_json
from mmkit.training import FitConfig, fit

RESULTS = Path(__file__).parent / "results" / "fit_overhead.json"


class Noisy:
    """Examples that draw random numbers, as augmentation does."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + 0.1 * torch.randn_like(self.x[index]), self.y[index]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def vit() -> nn.Module:
    return create_backbone("tiny_vit")


def bare(model: nn.Module, data: Any, batch_size: int, steps: int) -> None:
    """The loop one would write by hand."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    model.train()
    done = 0
    while done < steps:
        for part in torch.randperm(len(data)).split(batch_size)[: steps - done]:
            if isinstance(data, TensorDataset):
                x, y = data[part]
            else:
                x, y = default_collate([data[i] for i in part.tolist()])
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1


def fitted(model: nn.Module, data: Any, batch_size: int, steps: int) -> None:
    """The same with `fit`."""
    fit(model, data, config=FitConfig(max_steps=steps, batch_size=batch_size, progress=False, device="cpu"))


def cpu_seconds(function: Callable[..., None], *arguments: Any) -> float:
    started = time.process_time()
    function(*arguments)
    return time.process_time() - started


def cases() -> dict[str, tuple[Callable[[], nn.Module], Any, int, int, float]]:
    """Name -> (model, data, batch size, steps, largest ratio that is fine)."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4096, 64, generator=generator), torch.randint(10, (4096,), generator=generator)
    images, labels = torch.randn(256, 3, 32, 32, generator=generator), torch.randint(10, (256,), generator=generator)
    pictures = list(zip(images, labels, strict=True))
    return {
        "mlp, tensors": (mlp, TensorDataset(x, y), 256, 300, 1.3),
        "mlp, list of examples": (mlp, list(zip(x, y.tolist(), strict=True)), 256, 300, 1.3),
        "mlp, examples that draw": (mlp, Noisy(x, y), 256, 100, 1.5),
        "tiny_vit": (vit, pictures, 32, 12, 1.05),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed pairs for each case")
    parser.add_argument("--cases", nargs="*", default=list(cases()))
    parser.add_argument("--dry-run", action="store_true", help="do not write the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.cases:
        build, data, batch_size, steps, limit = cases()[name]
        ratios, seconds = [], []
        for number in range(args.rounds + 1):
            functions = (bare, fitted) if number % 2 else (fitted, bare)
            times = {f: cpu_seconds(f, build(), data, batch_size, steps) for f in functions}
            if number:  # the first pair warms up
                ratios.append(times[fitted] / times[bare])
                seconds.append(times[bare] / steps)
        row = {
            "case": name,
            "batch_size": batch_size,
            "ratio": round(statistics.median(ratios), 3),
            "limit": limit,
            "ratios": sorted(round(r, 3) for r in ratios),
            "bare_cpu_ms_per_step": round(1000 * statistics.median(seconds), 3),
        }
        rows.append(row)
        print(f"{name:<24} fit / bare {row['ratio']:.3f} (limit {limit}), bare {row['bare_cpu_ms_per_step']} ms a step")
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if not args.dry_run:
        write_json(RESULTS, {"unit": "process CPU time, one thread", "rows": rows, **versions, "cores": os.cpu_count()})
    sys.exit(any(row["ratio"] > row["limit"] for row in rows))


if __name__ == "__main__":
    main()
