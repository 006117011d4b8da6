"""Fine-tune an image transformer on a folder of clips with ZeroI2V, merge it, and classify a video with the result.

    python examples/finetune_video.py CLIPS --backbone timm:vit_small_patch16_224 --checkpoint vit.safetensors --out my_model
    python examples/finetune_video.py --demo --out my_model          # drawn clips and a tiny backbone, about a minute

CLIPS holds train/<class>/<video> and, if there is one, val/<class>/<video>; `--csv FILE` reads path,label,split instead.
The folder written by `--out` needs nothing but itself: `mmkit.pipeline("video-classification", "my_model")("clip.mp4")`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import mmkit
from mmkit.data.drawn.motion import MOTIONS, drawn_motion
from mmkit.training import FitConfig, fit
from mmkit.video import (
    ClipTransform,
    UniformSampler,
    VideoClassificationDataset,
    VideoClassifier,
    write_video,
)


def draw_folder(folder: Path, train: int = 24, val: int = 6) -> Path:
    """Write drawn clips as `folder/{train,val}/<class>/<n>.mp4`."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(MOTIONS):
            clips, _ = drawn_motion(count, generator, label=label)
            for i, clip in enumerate((clips * 255).byte().permute(0, 1, 3, 4, 2)):
                write_video(folder / split / name / f"{i:03d}.mp4", clip.contiguous(), fps=8)
    return folder


def datasets(args: argparse.Namespace, model: VideoClassifier, classes: list[str]) -> tuple[Any, Any]:
    """Training and validation clips with the model's preprocessing."""

    def one(split: str, train: bool) -> VideoClassificationDataset:
        transform = ClipTransform(model.img_size, model.mean, model.std, train=train, flip=0.0 if args.no_flip else 0.5)
        options: dict[str, Any] = {
            "sampler": UniformSampler(model.num_frames),
            "transform": transform,
            "train": train,
            "on_error": "replace",
            "short_side": model.img_size if not train else model.img_size * 8 // 7,
        }
        if args.csv:
            return VideoClassificationDataset.from_csv(args.csv, args.clips, split, classes, **options)
        return VideoClassificationDataset.from_folder(args.clips, split, **options)

    has_val = bool(args.csv) or (args.clips / "val").is_dir()
    return one("train", True), one(args.val_split, False) if has_val else None


def main() -> None:
    """Parse, train, merge, save, and try the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, nargs="?", default=Path("clips"))
    parser.add_argument("--csv", type=Path, help="table with the columns path,label,split")
    parser.add_argument("--val-split", default="val")
    parser.add_argument("--backbone", default="timm:vit_tiny_patch16_224")
    parser.add_argument("--checkpoint", type=Path, help="weights of the backbone")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--no-flip", action="store_true", help="when classes tell left from right")
    parser.add_argument("--demo", action="store_true", help="drawn clips, tiny backbone")
    parser.add_argument("--out", type=Path, default=Path("video_model"))
    args = parser.parse_args()
    sizes: dict[str, Any] = {} if args.img_size is None else {"img_size": args.img_size}
    if args.demo:
        args.clips, args.no_flip, args.csv = draw_folder(args.out / "clips"), True, None
        sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 6}
    probe = (
        VideoClassificationDataset.from_csv(args.csv, args.clips, "train")
        if args.csv
        else VideoClassificationDataset.from_folder(args.clips, "train")
    )
    backbone = mmkit.create_backbone(args.backbone, args.checkpoint, num_classes=0, **sizes)
    model = VideoClassifier.from_backbone(
        backbone,
        len(probe.class_names),
        zeroi2v={"scale": 1.0},
        num_frames=args.frames,
        class_names=probe.class_names,
    )
    if args.checkpoint is None:
        print("No --checkpoint: the backbone has random weights, so all of it is trained.")
        model.requires_grad_(True)
    train, val = datasets(args, model, probe.class_names)
    config = FitConfig(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, warmup_epochs=0.5, weight_decay=0.05)
    result = fit(model, train, val, config=config)
    if result.stopped != "finished":
        raise SystemExit(f"stopped after {result.steps} steps ({result.stopped}); nothing was saved")
    print({k: round(v, 4) for k, v in result.best_metrics.items()})
    model.eval().merge()
    model.save_pretrained(args.out / "model")
    answer = mmkit.pipeline("video-classification", args.out / "model")(train.samples[0].path, top_k=3)
    print(f"{answer.path}: {answer.labels} {[round(s, 3) for s in answer.scores]}")


if __name__ == "__main__":
    main()
