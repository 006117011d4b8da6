"""LightM-UNet next to MONAI's plain U-Net of equal size: nuclei in 2D, hippocampus in 3D, and true parameter and FLOP totals.

    python benchmarks/medical.py --data data --minutes 30         # the full comparison: 30 CPU minutes per network
    python benchmarks/medical.py --data data --minutes 1.5        # a short run: the steps are chosen to fit
    python benchmarks/medical.py --data data --bundled            # no training: what the bundled nuclei weights warn of

Both networks see the same patches, loss, optimiser and schedule and get the same CPU time (`--minutes` of process CPU time each), so
the faster one takes more steps. Dice is measured on whole test images. Needs `pip install monai` for the U-Net.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmkit import FitConfig, create_model, fit
from mmkit.data import load_image
from mmkit.ops import Mamba
from mmkit.storage import read_json, write_json
from mmkit.vision.medical import (
    Case,
    Familiarity,
    MedicalSegmentationPipeline,
    Patches,
    Volume,
    dice_per_class,
    hippocampus_cases,
    normalize,
    nuclei_cases,
    segmentation_loss,
)
from mmkit.weights import weight_entry

RESULTS = Path(__file__).parent / "results" / "medical.json"
PHOTOS = {"everyday photos": "photos_more/*.jpg", "pets": "seg_pets/*/*.jpg", "clothes": "cls_clothing/test/*/*.jpg"}
"""What is certainly unlike nuclei, as file patterns below the data folder."""
TASKS: dict[str, dict[str, Any]] = {
    "nuclei": {
        "folder": "med_nuclei",
        "cases": nuclei_cases,
        "model": ("lightm_unet_2d_tiny", {"in_chans": 3, "num_classes": 2, "init_filters": 8}),
        "unet": {"in_channels": 3, "out_channels": 2, "channels": (13, 26, 52)},
        "patch": (96, 96),
        "window": (256, 256),
        "batch": 4,
        "turn": True,
        "mirror": None,
    },
    "hippocampus": {
        "folder": "med_hippocampus",
        "cases": hippocampus_cases,
        "model": ("lightm_unet_3d", {"in_chans": 1, "num_classes": 3, "init_filters": 8}),
        "unet": {"in_channels": 1, "out_channels": 3, "channels": (9, 18, 36, 72)},
        "patch": (32, 40, 32),
        "window": (32, 40, 32),  # what it was trained on: whole volumes, padded, change the statistics of every norm
        "batch": 2,
        "turn": False,
        "mirror": (0,),
    },
}


def plain_unet(dims: int, settings: dict[str, Any]) -> nn.Module:
    """MONAI's residual U-Net (instance norm, its default), of about the parameters of our network."""
    from monai.networks.nets import UNet

    channels = settings["channels"]
    return UNet(
        spatial_dims=dims,
        **settings,
        strides=(2,) * (len(channels) - 1),
        num_res_units=2,
    )


def parameters(model: nn.Module) -> int:
    """All parameters, also those a hook-based counter misses."""
    return sum(p.numel() for p in model.parameters())


def gflops(model: nn.Module, shape: Sequence[int]) -> float:
    """GFLOPs of one forward pass: convolutions and matrix products as torch counts them, the scan as 9 per (L, inner, state)."""
    scan = 0

    def count(module: Mamba, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal scan
        scan += 9 * args[0].shape[1] * args[0].shape[0] * module.A_log.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, Mamba)]
    with torch.inference_mode(False), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return round((counter.get_total_flops() + scan) / 1e9, 3)


def steps_for(model: nn.Module, train: Patches, batch: int, minutes: float) -> int:
    """Optimiser steps that fit into `minutes` of CPU time, from three measured ones."""
    times: list[float] = []
    config = FitConfig(max_steps=4, batch_size=batch, lr=1e-6, progress=False, device="cpu")
    fit(model, train, loss_fn=segmentation_loss, config=config, on_step=lambda info: times.append(time.process_time()))
    return max(20, int(60 * minutes / min(b - a for a, b in itertools.pairwise(times))))


def train_and_score(
    build: Callable[[], nn.Module], task: dict[str, Any], train: list[Case], test: list[Case], args: argparse.Namespace
) -> tuple[nn.Module, dict[str, Any]]:
    """Train one network within the time and measure Dice on the whole test images."""
    torch.manual_seed(args.seed)
    patches = Patches(train, task["patch"], 4 * task["batch"], turn=task["turn"], mirror=task["mirror"])
    steps = steps_for(build(), patches, task["batch"], args.minutes)
    patches.length = steps * task["batch"]
    torch.manual_seed(args.seed)
    model = build()
    config = FitConfig(
        max_steps=steps,
        batch_size=task["batch"],
        lr=args.lr,
        warmup_steps=min(30, steps // 10),
        weight_decay=1e-4,
        seed=args.seed,
        resume=False,
        device="cpu",
    )
    start = time.process_time()
    fit(model, patches, loss_fn=segmentation_loss, config=config)
    cpu_minutes = (time.process_time() - start) / 60
    scores = dice_per_class(model, test, task["window"], task["unet"]["out_channels"])
    shape = (task["unet"]["in_channels"], *task["window"])
    return model, {
        "dice": round(sum(scores) / len(scores), 4),
        "dice_per_class": [round(s, 4) for s in scores],
        "parameters": parameters(model),
        "gflops": gflops(model, shape),
        "input": list(task["window"]),
        "steps": steps,
        "cpu_minutes": round(cpu_minutes, 2),
    }


def official_totals() -> list[dict[str, Any]]:
    """Parameters and FLOPs of the official configurations at the sizes usually quoted."""
    rows = []
    for name, overrides, shape in [
        ("lightm_unet_2d", {"num_classes": 2}, (1, 256, 256)),
        ("lightm_unet_3d", {"num_classes": 3}, (1, 64, 64, 64)),
    ]:
        model = create_model(name, **overrides)
        rows.append({"model": name, "parameters": parameters(model), "input": shape, "gflops": gflops(model, shape)})
        print(f"{name}: {rows[-1]['parameters']:,} parameters, {rows[-1]['gflops']} GFLOPs at {shape}", flush=True)
    return rows


def inference_seconds(model: nn.Module, case: Case) -> float:
    """CPU seconds of the pipeline on one whole volume."""
    pipeline = MedicalSegmentationPipeline(model, device="cpu")
    volume = Volume(case[0][0].numpy(), (1.0, 1.0, 1.0), torch.eye(4).numpy())
    start = time.process_time()
    pipeline(volume, progress=False)
    return round(time.process_time() - start, 2)


def warned(data: Path) -> dict[str, Any]:
    """Who gets the warning of the bundled nuclei weights: the share of nuclei pictures, and of photographs."""
    familiarity = Familiarity.from_dict(weight_entry("unet_nuclei").extra["familiarity"])
    found = {
        "nuclei test pictures": [familiarity.distance(x) > 1 for x, _ in nuclei_cases(data / "med_nuclei", "test")]
    }
    for name, pattern in PHOTOS.items():
        files = sorted(data.glob(pattern))[:: 1 if name == "clothes" else 3]
        pictures = (torch.from_numpy(np.array(load_image(f))).float().permute(2, 0, 1) for f in files)
        found[name] = [familiarity.distance(normalize(x)) > 1 for x in pictures]
    return {k: {"pictures": len(v), "warned of": round(sum(v) / len(v), 4)} for k, v in found.items()}


def main() -> None:
    """Train, compare, print, write `benchmarks/results/medical.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds med_nuclei and med_hippocampus")
    parser.add_argument("--minutes", type=float, default=30, help="CPU minutes of training per network")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--bundled", action="store_true", help="ask the bundled weights instead of training")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    setting = {
        "minutes_per_network": args.minutes,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "seed": args.seed,
    }
    tasks = read_json(RESULTS)["tasks"] if RESULTS.exists() else {}
    if args.bundled:
        kept = read_json(RESULTS) | {"bundled": {"warning": warned(args.data)}}
        print(kept["bundled"])
        write_json(RESULTS, kept)
        return
    result: dict[str, Any] = (read_json(RESULTS) if RESULTS.exists() else {}) | {
        "official": official_totals(),
        "tasks": tasks,
    }
    for name in args.tasks:
        task = TASKS[name]
        train, test = (task["cases"](args.data / task["folder"], split) for split in ("train", "test"))
        row: dict[str, Any] = {"setting": setting, "train": len(train), "test": len(test)}
        kind, settings = task["model"]
        builders: dict[str, Callable[[], nn.Module]] = {
            "lightm_unet": lambda kind=kind, settings=settings: create_model(kind, pad=True, **settings),
            "monai_unet": lambda task=task: plain_unet(len(task["patch"]), task["unet"]),
        }
        for label, build in builders.items():
            model, row[label] = train_and_score(build, task, train, test, args)
            if label == "lightm_unet" and name == "hippocampus":
                row["volume_cpu_seconds"] = inference_seconds(model, test[0])
            print(f"{name:12s} {label:12s} {row[label]}", flush=True)
        tasks[name] = row
        write_json(RESULTS, result)  # after each task: an interrupted run keeps what it measured
    print("->", RESULTS)


if __name__ == "__main__":
    main()
