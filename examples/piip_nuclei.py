"""Fine-tune a small PIIP to segment cell nuclei: a large model on a small picture and a small model on the large one.

    python examples/piip_nuclei.py --data data/med_nuclei --output runs/piip_nuclei
    python examples/piip_nuclei.py --data data/med_nuclei --bundle     # also replaces the bundled weights

Both branches start from the bundled `tiny_vit`: all of its five blocks see the picture at half size, its first two the full one. The data:
pictures of the 2018 Data Science Bowl (BBBC038v1, CC0) with `index.csv`, `images/` and `labels/`.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import torch

from mmkit import FitConfig, fit
from mmkit.data import load_image
from mmkit.vision.medical import Microscopy, Patches, load_labels, nuclei_kinds, segmentation_loss
from mmkit.vision.piip import BranchConfig, PIIPConfig, PIIPSegmenter, SemanticSegmentationPipeline
from mmkit.weights import WeightEntry, bundle, load_tensors

NAME = "piip_nuclei"
CLASSES = ("background", "nucleus")


def branch(size: int, depth: int, window: int) -> BranchConfig:
    """The first blocks of `tiny_vit` as a branch, without its class token."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": depth, "num_heads": 4, "class_token": False}
    return BranchConfig("timm:vit_tiny_patch16_224", size, settings={**settings, "global_pool": "avg"}, window=window)


def build() -> tuple[PIIPSegmenter, dict]:
    """The untrained model with the weights of `tiny_vit` in its branches, and its settings."""
    pyramid = PIIPConfig((branch(128, 5, 0), branch(256, 2, 8)), num_heads=8, antialias=True, grid_fit="nearest")
    settings = {"num_classes": 2, "hidden": 32, "class_names": CLASSES}
    model = PIIPSegmenter(pyramid, **settings)
    weights = load_tensors("tiny_vit")
    weights["pos_embed"] = weights["pos_embed"][:, 1:]
    for backbone in model.backbones:
        backbone.load_state_dict({k: weights[k] for k in backbone.state_dict()})
    return model, {**model.config, "class_names": list(CLASSES)}


def pictures(folder: Path, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """RGB pictures and their masks."""
    with open(folder / "index.csv", newline="", encoding="utf-8") as file:
        names = [row["id"] for row in csv.DictReader(file) if row["split"] == split]
    return [
        (np.array(load_image(folder / f"images/{n}.png")), load_labels(folder / f"labels/{n}.png", 2)) for n in names
    ]


def main() -> None:
    """Train, measure with half-precision weights, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--patch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for save_pretrained")
    parser.add_argument("--bundle", action="store_true", help="write into mmkit/weights")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model, settings = build()
    cases = [
        ((torch.from_numpy(p).float().permute(2, 0, 1) / 255 - 0.5) / 0.5, torch.from_numpy(m.astype(np.int64)))
        for p, m in pictures(args.data, "train")
    ]
    kinds = nuclei_kinds(args.data, "train")
    train = Patches(
        cases,
        (args.patch,) * 2,
        args.steps * args.batch_size,
        turn=True,
        weights=[1 / kinds.count(kind) for kind in kinds],
        augment=Microscopy(),
    )
    config = FitConfig(
        max_steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        warmup_steps=min(20, args.steps // 10),
        weight_decay=0.01,
        seed=args.seed,
        ema_decay=0.995,
        resume=False,
        device="cpu",
    )
    result = fit(model, train, loss_fn=segmentation_loss, config=config)
    if result.stopped != "finished":
        raise SystemExit(f"stopped after {result.steps} steps ({result.stopped}); nothing was saved")

    rounded = {k: v.detach().cpu().half().float() for k, v in model.state_dict().items()}
    model.load_state_dict(rounded)
    segment = SemanticSegmentationPipeline(model.cpu().eval())
    scores = []
    for picture, mask in pictures(args.data, "test"):
        guess = segment(picture, size=max(mask.shape)).mask > 0
        scores.append(2 * (guess & (mask > 0)).sum() / max(guess.sum() + (mask > 0).sum(), 1))
    dice = float(np.mean(scores))
    print(f"{result.steps} steps in {result.seconds:.0f} s; Dice {dice:.4f} on {len(scores)} test pictures")
    if args.output:
        model.save_pretrained(args.output)
        print(f"saved to {args.output}")
    if args.bundle:
        entry = WeightEntry(
            name=NAME,
            model="piip_segmenter",
            config=settings,
            summary="A pyramid of two branches that finds nuclei, about 20 px wide, in microscopy pictures; touching ones are not "
            "separated. It shows what a PIIP does on a laptop; other kinds of pictures are out of its reach. Not a medical device.",
            license="Apache-2.0",
            command=f"python examples/piip_nuclei.py --data data/med_nuclei --steps {args.steps} --batch-size {args.batch_size} "
            f"--patch {args.patch} --lr {args.lr} --seed {args.seed} --bundle",
            data="BBBC038v1 (2018 Data Science Bowl, CC0): 66 training and 20 test pictures; branches start from the bundled tiny_vit",
            seed=args.seed,
            score={"dice": round(dice, 4)},
            extra={"class_names": list(CLASSES)},
        )
        print(f"bundled as {bundle(entry, rounded).file}")


if __name__ == "__main__":
    main()
