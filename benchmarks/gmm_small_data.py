"""Does a Gaussian mixture mask help a small ViT that is trained from scratch on little data?

    python benchmarks/gmm_small_data.py [--data digits cifar] [--seeds 0 1 2] [--data-dir ../shared/data]

Trains the same ViT with (a) the class token of the official baseline, (b) mean pooling, (c) mean pooling and an element-wise
learnable mask, (d) mean pooling and a Gaussian mixture mask, at equal budget, and prints test accuracy and CPU time. (a)
against (b) measures how much of the published gain comes from the pooling alone, since the official code changes both at once.
Data: scikit-learn's digits (400 training, 1397 test images) and an excerpt of CIFAR-10 (2000 and 1000), `cifar10_subset.npz`
in MMKIT_DATA_DIR. The accuracy is that of the last epoch; nothing is selected on the test set. The digits are trained twice:
for 20 epochs, where the unmasked networks have hardly begun to learn, and for 60, where every network has learnt its training
images. Results are written after every run, and replace those of the same run only: `--data digits` keeps the rows of CIFAR-10.
"""

from __future__ import annotations

import argparse
import itertools
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

from mmkit.storage import read_json, write_json
from mmkit.training import FitConfig, fit
from mmkit.vision.gmm import GMMViT

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
EPOCHS = {"digits": (20, 60), "cifar": (20,)}
TRAINING = {
    "digits": FitConfig(batch_size=50, lr=2e-3, warmup_steps=40),
    "cifar": FitConfig(batch_size=50, lr=1e-3, warmup_steps=80),
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


def run(name: str, variant: str, seed: int, data_dir: Path, epochs: int) -> dict[str, Any]:
    """Train one variant once."""
    train, test = load(name, seed, data_dir)
    torch.manual_seed(seed)
    model = GMMViT(**MODELS[name], **VARIANTS[variant])
    settings = vars(TRAINING[name]) | {
        "seed": seed, "weight_decay": 0.05, "min_lr": 1e-6, "label_smoothing": 0.1, "clip_grad": None, "progress": False,
        "restore_best": False, "device": "cpu", "epochs": epochs, "eval_every": epochs,
    }  # fmt: skip
    start = time.process_time()
    result = fit(model, train, test, config=FitConfig(**settings))
    return {
        "data": name,
        "variant": variant,
        "seed": seed,
        "accuracy": result.metrics["accuracy"],
        "training_accuracy": training_accuracy(model, train),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": epochs,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def training_accuracy(model: torch.nn.Module, train: Images) -> float:
    """Accuracy on the training images as they are, without augmentation: near 1 when training has converged."""
    with torch.no_grad():
        return float((model.eval()(train.images).argmax(1) == torch.as_tensor(train.labels)).float().mean())


def groups(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, list[dict[str, Any]]]]:
    """Rows by (data, epochs) and variant."""
    out: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
    for row in sorted(rows, key=order):
        out.setdefault((row["data"], row["epochs"]), {}).setdefault(row["variant"], []).append(row)
    return out


def order(row: dict[str, Any]) -> tuple[int, ...]:
    """Place of a row in the file; the same for two runs of the same thing."""
    return list(MODELS).index(row["data"]), row["epochs"], row["seed"], list(VARIANTS).index(row["variant"])


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table: one line per data set, budget and variant."""
    lines = [
        "| data | epochs | variant | parameters | test accuracy per seed | mean | on training images | CPU s per run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, epochs), variants in groups(rows).items():
        for variant, group in variants.items():
            scores = [100 * r["accuracy"] for r in group]
            fitted = [100 * r["training_accuracy"] for r in group if "training_accuracy" in r]
            cells = [
                name, epochs, variant, f"{group[0]['parameters']:,}", " ".join(f"{s:.1f}" for s in scores),
                f"{statistics.mean(scores):.1f}", f"{statistics.mean(fitted):.1f}" if fitted else "–",
                f"{statistics.mean(r['cpu_seconds'] for r in group):.0f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def gains(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Differences of the mean accuracies, in points, per data set and budget that has all variants."""
    out = {}
    for (name, epochs), variants in groups(rows).items():
        if len(variants) == len(VARIANTS):
            token, pooled, _, gmm = (100 * statistics.mean(r["accuracy"] for r in variants[v]) for v in VARIANTS)
            out[f"{name}, {epochs} epochs"] = {
                "gmm_over_mean_pooling": gmm - pooled,
                "gmm_over_class_token": gmm - token,
                "pooling_alone": pooled - token,
            }
    return out


def write(path: Path, new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge `new` rows into the report at `path`, write it with its table, and return all rows."""
    kept = read_json(path)["runs"] if path.exists() else []
    rows = sorted({order(r): r for r in [*kept, *new]}.values(), key=order)
    setup = {
        "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(), "device": "cpu",
        "threads": 1, "cores": os.cpu_count(),
    }  # fmt: skip
    write_json(path, {"setup": setup, "gains_in_points": gains(rows), "runs": rows})
    path.with_suffix(".md").write_text(table(rows) + "\n", encoding="utf-8")
    return rows


def main() -> None:
    """Run everything, print the table, write `benchmarks/results/gmm_small_data.{json,md}`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", nargs="+", type=int, help="instead of 20 and 60 (digits) or 20 (cifar)")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    default_dir = os.environ.get("MMKIT_DATA_DIR", ROOT.parent / "shared" / "data")
    parser.add_argument("--data-dir", type=Path, default=default_dir)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gmm_small_data.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = write(args.output, [])
    for name, seed in itertools.product(args.data, args.seeds):
        for epochs, variant in itertools.product(args.epochs or EPOCHS[name], args.variants):
            row = run(name, variant, seed, args.data_dir, epochs)
            rows = write(args.output, [row])
            print(f"{name:7} {epochs:3} epochs, {variant:22} seed {seed}: {100 * row['accuracy']:.1f} %", flush=True)
    print(table(rows))
    print({k: {n: round(v, 1) for n, v in g.items()} for k, g in gains(rows).items()})


if __name__ == "__main__":
    main()
