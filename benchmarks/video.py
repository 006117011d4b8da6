"""Measure the video path: does attention across frames see motion, what does merging cost, how fast are the decoders.

    python benchmarks/video.py motion       # (a) moving square, with and without temporal heads, 3 seeds
    python benchmarks/video.py fight        # (b) 80/40 real clips: ZeroI2V, frame averaging, full fine-tuning
    python benchmarks/video.py cost         # (c) merged model against the frame-wise image model: time and FLOPs
    python benchmarks/video.py decode       # (d) decoders
    python benchmarks/video.py all

Each part writes its table into benchmarks/results/video.json. Times are process CPU time, taken in turns with the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, TensorDataset

import mmkit
from mmkit.backbones import backbone_info, create_backbone
from mmkit.data.drawn.motion import moving_squares
from mmkit.training import FitConfig, fit
from mmkit.video import (
    ClipTransform,
    UniformSampler,
    VideoClassificationDataset,
    VideoClassifier,
    backends,
    read_frames,
    write_video,
)

RESULTS = Path(__file__).parent / "results" / "video.json"
DATA = Path(os.environ.get("MMKIT_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}


def classifier(classes: int, zeroi2v: dict[str, Any] | None, args: dict[str, Any], frames: int = 8) -> VideoClassifier:
    """A small ViT with or without ZeroI2V."""
    model = VideoClassifier(
        "timm:vit_tiny_patch16_224", classes, backbone_args=args, zeroi2v=zeroi2v, num_frames=frames, dropout=0.0
    )
    return model.requires_grad_(False) if zeroi2v is None else model


def stronger(model: VideoClassifier) -> VideoClassifier:
    """Random weights whose layers change their input: std 1/sqrt(fan in), as in CLIP, instead of timm's 0.02."""
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    for p in (model.backbone.pos_embed, model.backbone.cls_token):
        torch.nn.init.normal_(p, std=model.head.in_features**-0.5)
    return model


# --- (a) motion


class Squares(IterableDataset[tuple[torch.Tensor, int]]):
    """`moving_squares` without end."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            clips, label = moving_squares(32, generator)
            yield from zip(clips, label.tolist(), strict=True)


def motion(args: argparse.Namespace) -> dict[str, Any]:
    """Adapters, norm and head trained on a frozen random ViT; the label depends on the order of frames alone."""
    rows = []
    test = TensorDataset(*moving_squares(512, torch.Generator().manual_seed(99)))
    for name, offsets in (("with temporal heads", (-1, 1, 0, 0)), ("without", (0, 0, 0, 0))):
        for seed in range(3):
            torch.manual_seed(seed)
            settings = {"head_offsets": offsets, "temporal_embedding": False, "scale": 1.0, "dropout": 0.0}
            model = stronger(classifier(2, settings, TINY))
            config = FitConfig(
                max_steps=args.steps, batch_size=32, lr=5e-3, clip_grad=None, seed=seed, progress=False, device="cpu"
            )
            result = fit(model, Squares(seed), test, config=config)
            rows.append({"model": name, "seed": seed, "accuracy": round(result.metrics["accuracy"], 4)})
            print(rows[-1], flush=True)
    return {"task": "bright square moving left or right, 512 test clips", "steps": args.steps, "rows": rows}


# --- (b) real clips


class Flipped:
    """Clips in memory, half of them mirrored whenever they are read."""

    def __init__(self, clips: list[tuple[torch.Tensor, int]]) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        clip, label = self.clips[index]
        return (clip.flip(-1) if torch.rand(()) < 0.5 else clip), label


def fight(args: argparse.Namespace) -> dict[str, Any]:
    """80 training and 40 test clips of two classes, 64 px, the bundled ViT; every model sees the same clips and steps."""
    backbone = create_backbone("tiny_vit", img_size=64)
    info = backbone_info(backbone)
    transform = ClipTransform(64, info.mean, info.std)
    options: dict[str, Any] = {"sampler": UniformSampler(8), "transform": transform, "short_side": 64}
    folder = DATA / "video_fight"
    sets = {
        split: VideoClassificationDataset.from_csv(folder / "index.csv", folder, split=split, **options)
        for split in ("train", "test")
    }
    train, test = ([data[i] for i in range(len(data))] for data in sets.values())
    rows = []
    for name in ("frame averaging, head only", "ZeroI2V", "full fine-tuning of frame averaging"):
        scores = []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            settings = {"scale": 1.0, "dropout": 0.1} if name == "ZeroI2V" else None
            model = VideoClassifier.from_backbone(backbone, 2, zeroi2v=settings, num_frames=8, dropout=0.0)
            if settings is None:
                model.requires_grad_(name.startswith("full"))
                model.head.requires_grad_(True)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            config = FitConfig(
                epochs=args.epochs, batch_size=16, lr=1e-3, weight_decay=0.05, label_smoothing=0.1, clip_grad=None,
                eval_every=args.epochs, seed=seed, progress=False, device="cpu",
            )  # fmt: skip
            scores.append(fit(model, Flipped(train), test, config=config).metrics["accuracy"])
            print(f"{name} seed {seed}: {scores[-1]:.3f}", flush=True)
        row = {"model": name, "trained_parameters": trained, "accuracy": [round(s, 3) for s in scores]}
        rows.append({**row, "mean": round(statistics.mean(scores), 3)})
        print(rows[-1], flush=True)
    return {
        "task": "video_fight, 80/40 clips, 64 px, bundled tiny ViT",
        "epochs": args.epochs,
        "rows": rows,
    }


# --- (c) cost


def in_turns(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each function, called in turns so that all meet the same load."""
    times: dict[str, list[float]] = {k: [] for k in functions}
    for i in range(rounds + 1):
        for name in list(functions) if i % 2 else reversed(list(functions)):
            start = time.process_time()
            functions[name]()
            if i:
                times[name].append(time.process_time() - start)
    return times


@torch.no_grad()
def cost(args: argparse.Namespace) -> dict[str, Any]:
    """CLIP-B/16 width at 8 frames: merged and un-merged against the same ViT run frame by frame."""
    from torch.utils.flop_counter import FlopCounterMode

    vit = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": args.depth, "num_heads": 12}
    model = classifier(400, {"scale": 0.5}, vit).eval()
    video = torch.randn(1, 8, 3, 224, 224)
    image = classifier(400, None, vit).eval()
    image.backbone.load_state_dict(model.backbone.state_dict())
    count = {}
    for name in ("unmerged", "merged"):
        if name == "merged":
            model.merge()
        with FlopCounterMode(display=False) as counter:
            model.backbone(video[0])
        count[name] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        image.backbone(video[0])
    count["image"] = counter.get_total_flops()
    times = in_turns({"image": lambda: image(video), "merged": lambda: model(video)}, args.rounds)
    ratios = [a / b for a, b in zip(times["merged"], times["image"], strict=True)]
    model.unmerge()
    more = in_turns({"image": lambda: image(video), "unmerged": lambda: model(video)}, max(2, args.rounds // 3))
    slow = [a / b for a, b in zip(more["unmerged"], more["image"], strict=True)]
    result = {
        "model": f"ViT-B/16 width, {args.depth} blocks, 8 frames of 224 px",
        "flops_merged_over_image": count["merged"] / count["image"],
        "flops_unmerged_over_image": round(count["unmerged"] / count["image"], 4),
        "time_merged_over_image": round(statistics.median(ratios), 4),
        "time_merged_over_image_quartiles": [round(float(v), 4) for v in np.percentile(ratios, [25, 75])],
        "time_unmerged_over_image": round(statistics.median(slow), 4),
        "image_cpu_seconds": round(statistics.median(times["image"]), 3),
        "rounds": args.rounds,
    }
    print(result)
    return result


# --- (d) decoding


def decode(args: argparse.Namespace) -> dict[str, Any]:
    """k frames of a 10 s clip, H.264, key frame every 250; CPU milliseconds, median of two calls in turns after a first."""
    import tempfile

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for height, width in ((240, 320), (720, 1280)):
            rng = np.random.default_rng(0)
            scene = rng.integers(0, 255, (height // 8, width // 8 + 40, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            frames = (scene[:, i : i + width] for i in range(300))
            path = write_video(Path(folder) / f"{height}.mp4", frames, fps=30, options={"crf": "23", "g": "250"})
            for k in (8, 32):
                indices = UniformSampler(k).sample(300)[0]
                times = {n: _milliseconds(v) for n, v in in_turns(_decoders(path, indices), 2).items()}
                rows.append({"size": f"{width}x{height}", "frames": k, **times})
                print(rows[-1], flush=True)
    return {"unit": "CPU milliseconds per call", "backends": backends(), "rows": rows}


def _milliseconds(times: list[float]) -> float:
    return round(1000 * statistics.median(times), 1)


def _decoders(path: Path, indices: np.ndarray[Any, Any]) -> dict[str, Callable[[], Any]]:
    functions: dict[str, Callable[[], Any]] = {
        "pyav": lambda: read_frames(path, indices, backend="pyav"),
        "pyav_short_side_224": lambda: read_frames(path, indices, backend="pyav", size=224),
    }
    if backends()["torchcodec"] == "available":
        functions["torchcodec"] = lambda: read_frames(path, indices, backend="torchcodec")
    try:
        import imageio.v3 as imageio
    except ImportError:
        return functions
    wanted = set(indices.tolist())
    functions["imageio_pyav_all_frames"] = lambda: [
        f for i, f in enumerate(imageio.imiter(path, plugin="pyav")) if i in wanted
    ]
    return functions


PARTS = {"motion": motion, "fight": fight, "cost": cost, "decode": decode}


def main() -> None:
    """Run the chosen parts and write them into the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--steps", type=int, default=200, help="motion: optimiser steps")
    parser.add_argument("--epochs", type=int, default=10, help="fight: epochs")
    parser.add_argument("--seeds", type=int, default=3, help="fight: seeds")
    parser.add_argument("--depth", type=int, default=2, help="cost: blocks")
    parser.add_argument("--rounds", type=int, default=8, help="cost: timed pairs")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name in PARTS if args.part == "all" else [args.part]:
        start = time.process_time()
        result = PARTS[name](args)
        saved = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        saved[name] = {
            **result,
            "cpu_seconds": round(time.process_time() - start, 1),
            "versions": {"mmkit": mmkit.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": "cpu"},
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(saved, indent=2) + "\n")


if __name__ == "__main__":
    main()
