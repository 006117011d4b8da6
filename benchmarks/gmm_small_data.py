"""Does a Gaussian mixture mask help a small ViT that is trained from scratch on little data?

    python benchmarks/gmm_small_data.py [--data digits cifar] [--seeds 0 1 2] [--data-dir ../shared/data]

Trains the same ViT with (a) the class token of the official baseline, (b) mean pooling, (c) mean pooling and an element-wise
learnable mask, (d) mean pooling and a Gaussian mixture mask, at equal budget, and prints test accuracy and CPU time. (a)
against (b) measures how much of the published gain comes from the pooling alone, since the official code changes both at once.
Data: scikit-learn's digits (400 training, 1397 test images) and an excerpt of CIFAR-10 (2000 and 1000), `cifar10_subset.npz`
in MMKIT_DATA_DIR. The accuracy is that of the last epoch; nothing is selected on the test set.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from mmkit.checkpoints import write_json
from mmkit.training import FitConfig, fit
from mmkit.vision.gmm_models import GMMViT

ROOT = Path(__file__).resolve().parent.parent
VARIANTS: dict[str, dict[str, Any]] = {
    "class token, no mask": {"mask": "none", "class_token": True},
    "mean pooling, no mask": {"mask": "none", "class_token": False},
    "mean pooling, ELM": {"mask": "elm"},
    "mean pooling, GMM": {"mask": "gmm"},
}
MODELS: dict[str, dict[str, Any]] = {
    "digits": {
        "img_size": 8, "patch_size": 1, "in_chans": 1, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 10,
    },
    "cifar": {
        "img_size": 32, "patch_size": 4, "in_chans": 3, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 10,
    },
}  # fmt: skip
TRAINING = {
    "digits": FitConfig(epochs=20, batch_size=50, lr=2e-3, warmup_steps=40),
    "cifar": FitConfig(epochs=20, batch_size=50, lr=1e-3, warmup_steps=80),
}


class Images(torch.utils.data.Dataset):
    """Tensors with labels; with `augment`, a random flip and a random crop after padding by 4."""

    def __init__(self, images: torch.Tensor, labels: np.ndarray, augment: bool = False):
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index]
        if self.augment:
            image = image.flip(-1) if torch.rand(()) < 0.5 else image
            padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
            y, x = torch.randint(0, 9, (2,)).tolist()
            image = padded[:, y : y + image.shape[1], x : x + image.shape[2]]
        return image, int(self.labels[index])


def load(name: str, seed: int, data_dir: Path) -> tuple[Images, Images]:
    """Training and test images of one data set; the split of the digits depends on the seed."""
    if name == "digits":
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        train, test = train_test_split(
            np.arange(len(images)), train_size=400, stratify=digits.target, random_state=seed
        )
        return Images(images[train], digits.target[train]), Images(images[test], digits.target[test])
    archive = np.load(data_dir / "cls_cifar10" / "cifar10_subset.npz")
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])

    def images_of(part: str) -> torch.Tensor:
        pixels = torch.tensor(archive[f"x_{part}"], dtype=torch.float32) / 255
        return ((pixels - mean) / std).permute(0, 3, 1, 2).contiguous()

    return (
        Images(images_of("train"), archive["y_train"], augment=True),
        Images(images_of("test"), archive["y_test"]),
    )


def run(name: str, variant: str, seed: int, data_dir: Path, epochs: int | None) -> dict[str, Any]:
    """Train one variant once."""
    train, test = load(name, seed, data_dir)
    torch.manual_seed(seed)
    model = GMMViT(**MODELS[name], **VARIANTS[variant])
    settings = vars(TRAINING[name]) | {
        "seed": seed, "weight_decay": 0.05, "min_lr": 1e-6, "label_smoothing": 0.1, "clip_grad": None, "progress": False,
        "restore_best": False, "device": "cpu",
    }  # fmt: skip
    settings["epochs"] = epochs or settings["epochs"]
    settings["eval_every"] = settings["epochs"]
    start = time.process_time()
    result = fit(model, train, test, config=FitConfig(**settings))
    return {
        "data": name,
        "variant": variant,
        "seed": seed,
        "accuracy": result.metrics["accuracy"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": settings["epochs"],
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table: one line per data set and variant."""
    lines = [
        "| data | variant | parameters | test accuracy per seed | mean | CPU s per run |",
        "|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        for variant in VARIANTS:
            group = [r for r in rows if r["data"] == name and r["variant"] == variant]
            if group:
                scores = [100 * r["accuracy"] for r in group]
                seconds = statistics.mean(r["cpu_seconds"] for r in group)
                each = " ".join(f"{s:.1f}" for s in scores)
                lines.append(
                    f"| {name} | {variant} | {group[0]['parameters']:,} | {each} | {statistics.mean(scores):.1f} | {seconds:.0f} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Run everything, print the table, write `benchmarks/results/gmm_small_data.{json,md}`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="instead of 20, for a quick look")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    default_dir = os.environ.get("MMKIT_DATA_DIR", ROOT.parent / "shared" / "data")
    parser.add_argument("--data-dir", type=Path, default=default_dir)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gmm_small_data.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.data:
        for seed in args.seeds:
            for variant in args.variants:
                rows.append(run(name, variant, seed, args.data_dir, args.epochs))
                print(f"{name:7} {variant:22} seed {seed}: {100 * rows[-1]['accuracy']:.1f} %", flush=True)
    gains = {}
    for name in args.data:
        mean = {
            v: statistics.mean(r["accuracy"] for r in rows if r["data"] == name and r["variant"] == v)
            for v in args.variants
        }
        if len(mean) == len(VARIANTS):
            gains[name] = {
                "gmm_over_mean_pooling": 100 * (mean["mean pooling, GMM"] - mean["mean pooling, no mask"]),
                "gmm_over_class_token": 100 * (mean["mean pooling, GMM"] - mean["class token, no mask"]),
                "pooling_alone": 100 * (mean["mean pooling, no mask"] - mean["class token, no mask"]),
            }
    print(table(rows))
    print({k: {n: round(v, 1) for n, v in g.items()} for k, g in gains.items()})
    setup = {
        "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(), "device": "cpu",
        "threads": 1, "cores": os.cpu_count(),
    }  # fmt: skip
    write_json(args.output, {"setup": setup, "gains_in_points": gains, "runs": rows})
    args.output.with_suffix(".md").write_text(table(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
