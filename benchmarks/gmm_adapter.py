"""What the gmm adapter costs and what it gains on a pretrained ViT.

    python benchmarks/gmm_adapter.py [--backbone tiny_vit] [--seeds 0 1 2] [--only cost]

Cost: building the mask, masked attention against fused attention, and a training step of ViT-S/16 at 224 pixels with the adapter
against the same step without it (all weights trained in both, so that both do the same work besides the masks). Process CPU
time, one thread, interleaved, medians. `--only` measures one part and keeps the other as it was recorded.
Gain: test accuracy of a linear probe (head only), and of the head with the adapter, multiplicative and additive, on
scikit-learn's digits with few labels, with the bundled backbone frozen and at twice its size, so that there are 8x8 patches; same
budget, last epoch, nothing selected on the test set.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

from mmkit.adapters import apply_adapter
from mmkit.backbones import create_backbone
from mmkit.data import ImageTransform, load_digits, stratified_split
from mmkit.storage import read_json, write_json
from mmkit.training import FitConfig, fit
from mmkit.vision.gmm import GaussianMixtureMask, masked_attention

ROOT = Path(__file__).resolve().parent.parent
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear probe": ("linear_probe", {}),
    "gmm adapter + head": ("gmm", {"modules_to_save": ("head",)}),
    "gmm bias + head": ("gmm", {"modules_to_save": ("head",), "mode": "bias"}),
}


def median_seconds(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median process CPU time of each job; the jobs take turns."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            if turn:  # the first turn warms up
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def cost(repeats: int) -> dict[str, float]:
    """Mask building, attention and training-step cost."""
    mask = GaussianMixtureMask(6, (14, 14), num_prefix_tokens=1, init="identity")
    q, k, v = torch.randn(3, 8, 6, 197, 64)
    plain = timm.create_model("vit_small_patch16_224", pretrained=False)
    masked = timm.create_model("vit_small_patch16_224", pretrained=False)
    adapter = apply_adapter(masked, "gmm", freeze=False)
    images, labels = torch.randn(4, 3, 224, 224), torch.randint(0, 1000, (4,))

    def step(model: torch.nn.Module) -> None:
        for parameter in (*model.parameters(), *adapter.parameters()):
            parameter.grad = None
        F.cross_entropy(model(images), labels).backward()

    with torch.no_grad():
        build = median_seconds({"mask": mask.matrix}, 5 * repeats)
        mask.eval()
        attention = median_seconds(
            {
                "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
                "masked": lambda: masked_attention(q, k, v, mask.matrix()),  # as the adapter runs it
            },
            3 * repeats,
        )
    steps = median_seconds({"plain": lambda: step(plain), "masked": lambda: step(masked)}, repeats)
    return {
        "mask_build_ms": 1000 * build["mask"],
        "attention_forward_ratio": attention["masked"] / attention["sdpa"],
        "training_step_ratio": steps["masked"] / steps["plain"],
        "adapter_parameters": adapter.num_parameters(),
    }


def gain(backbone: str, size: int, method: str, seed: int, per_class: int, epochs: int) -> dict[str, Any]:
    """Train one method once, at `size` pixels (position embeddings are interpolated)."""
    model = create_backbone(backbone, num_classes=10, img_size=size)
    transform = ImageTransform.of(model.backbone_info.preprocessing(), train=False)
    digits = load_digits().with_transform(transform)
    _, train = stratified_split(digits.labels, 10 * per_class / len(digits), seed)
    test = sorted(set(range(len(digits))) - set(train))[::2]
    name, settings = METHODS[method]
    torch.manual_seed(seed)
    adapter = apply_adapter(model, name, **settings)
    config = FitConfig(
        epochs=epochs, batch_size=20, lr=1e-2, warmup_epochs=1, weight_decay=0.0, seed=seed, restore_best=False,
        eval_every=epochs, progress=False, device="cpu",
    )  # fmt: skip
    start = time.process_time()
    result = fit(model, digits.subset(train), digits.subset(test), adapter=adapter, config=config)
    return {
        "method": method,
        "seed": seed,
        "accuracy": result.metrics["accuracy"],
        "parameters": adapter.num_parameters(),
        "training_images": len(train),
        "test_images": len(test),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def main() -> None:
    """Run both parts, print them and write `benchmarks/results/gmm_adapter.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tiny_vit")
    parser.add_argument("--img-size", type=int, default=64, help="64: an 8x8 grid for the bundled ViT, as digits have")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["cost", "gain"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gmm_adapter.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "setup": {
            "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(), "device": "cpu",
            "threads": 1, "cores": os.cpu_count(), "backbone": args.backbone,
            "img_size": args.img_size,
        },
    }  # fmt: skip
    if args.only and args.output.exists():
        report = read_json(args.output) | report
    if args.only != "gain":
        report["cost"] = cost(args.repeats)
        print({k: round(v, 3) for k, v in report["cost"].items()}, flush=True)
    if args.only != "cost":
        report["gain"] = []
        for seed in args.seeds:
            for method in METHODS:
                report["gain"].append(gain(args.backbone, args.img_size, method, seed, args.per_class, args.epochs))
                print(f"{method:20} seed {seed}: {100 * report['gain'][-1]['accuracy']:.1f} %", flush=True)
        for method in METHODS:
            scores = [r["accuracy"] for r in report["gain"] if r["method"] == method]
            print(f"{method:20} mean {100 * statistics.mean(scores):.1f} %")
    write_json(args.output, report)


if __name__ == "__main__":
    main()
