"""Train a small 3D network: a U-Net on MRI of the hippocampus, or LightM-UNet on drawn volumes; both are bundled.

    python examples/train_hippocampus.py --data data/med_hippocampus --bundle
    python examples/train_hippocampus.py --data data/med_hippocampus --network lightm_unet --steps 1500 --output runs/hippocampus
    python examples/train_hippocampus.py --drawn --steps 150 --patch 32 32 32 --lr 0.006 --bundle

The MRI crops are Task04 of the Medical Segmentation Decathlon (CC-BY-SA 4.0) with `splits.json`, `images/` and `labels/`; weights trained
on them carry that license. The drawn volumes come from `mmkit.data.drawn.scans.sample_volume`.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from mmkit import FitConfig, create_model, fit
from mmkit.vision.medical import (
    Familiarity,
    Patches,
    UNet,
    dice_per_class,
    drawn_cases,
    hippocampus_cases,
    segmentation_loss,
)
from mmkit.weights import WeightEntry, bundle, record, weight_entry

LIGHTM = {"in_chans": 1, "num_classes": 3, "init_filters": 8, "pad": True}
PLAIN = {"spatial_dims": 3, "in_chans": 1, "num_classes": 3, "channels": [8, 16, 32, 48]}
DRAWN: dict[str, Any] = {
    "name": "lightm_unet_blobs",
    "model": "lightm_unet_3d_tiny",
    "config": LIGHTM,
    "summary": "Bright and dark blobs in drawn, noisy volumes: shows what the 3D pipeline does. It knows nothing of anatomy. Not a "
    "medical device.",
    "license": "Apache-2.0",
    "data": "drawn by mmkit.data.drawn.scans.sample_volume: 60 training and 10 test volumes",
}
MRI: dict[str, Any] = {
    "name": "unet_hippocampus",
    "model": "unet",
    "config": PLAIN,
    "summary": "The front and the rear part of the hippocampus in MRI crops of about 35 x 50 x 35 voxels of 1 mm around it, as the Medical "
    "Segmentation Decathlon has them: whole heads and other scans are out of its reach. Not a medical device.",
    "license": "CC-BY-SA-4.0 (trained on CC-BY-SA-4.0 volumes)",
    "data": "Medical Segmentation Decathlon, Task04 (CC-BY-SA-4.0, arXiv 1902.09063): 60 training and 20 test volumes",
}


def main() -> None:
    """Train, measure with half-precision weights, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder of the hippocampus volumes")
    source.add_argument("--drawn", action="store_true", help="drawn volumes instead")
    parser.add_argument("--network", choices=("unet", "lightm_unet"), default="unet", help="with --data")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--patch", type=int, nargs=3, default=(32, 40, 32))
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for save_pretrained")
    parser.add_argument("--bundle", action="store_true", help="write into mmkit/weights")
    parser.add_argument(
        "--familiarity", action="store_true", help="only record what the volumes look like, for the bundled weights"
    )
    args = parser.parse_args()
    about = DRAWN if args.drawn else MRI
    if args.bundle and not args.drawn and args.network != "unet":
        parser.error("the bundled weights for MRI are those of --network unet")

    if args.drawn:
        train, test = drawn_cases(range(1000, 1060)), drawn_cases(range(10))
    else:
        train, test = (hippocampus_cases(args.data, split) for split in ("train", "test"))
    familiarity = Familiarity.measure(image for image, _ in train).to_dict()
    if args.familiarity:
        old = weight_entry(about["name"])
        record(dataclasses.replace(old, extra={**old.extra, "familiarity": familiarity}))
        return
    torch.manual_seed(args.seed)
    if args.drawn:
        model = create_model("lightm_unet_3d_tiny", **LIGHTM)
    else:
        model = UNet(**PLAIN) if args.network == "unet" else create_model("lightm_unet_3d", **LIGHTM)  # four levels
    mirror = None if args.drawn else (0,)
    patches = Patches(train, args.patch, args.steps * args.batch_size, mirror=mirror)
    config = FitConfig(
        max_steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        warmup_steps=args.steps // 10,
        weight_decay=1e-4,
        seed=args.seed,
        resume=False,
        device="cpu",
    )
    start = time.process_time()
    result = fit(model, patches, loss_fn=segmentation_loss, config=config)
    if result.stopped != "finished":
        raise SystemExit(f"stopped after {result.steps} steps ({result.stopped}); nothing was saved")
    print(f"{result.steps} steps in {(time.process_time() - start) / 60:.1f} CPU minutes")

    rounded = {k: v.detach().cpu().half().float() for k, v in model.state_dict().items()}
    model.load_state_dict(rounded)
    scores = dice_per_class(model.cpu(), test, args.patch, 3)
    print(f"Dice per class {scores} on {len(test)} test volumes")
    if args.output:
        model.save_pretrained(args.output)
        print(
            f"saved to {args.output}; predict with mmkit.pipeline('medical-segmentation', '{args.output}', window={tuple(args.patch)})"
        )
    if args.bundle:
        given = "--drawn" if args.drawn else "--data data/med_hippocampus"
        names = ["bright blob", "dark blob"] if args.drawn else ["anterior", "posterior"]
        entry = WeightEntry(
            **about,
            command=f"python examples/train_hippocampus.py {given} --steps {args.steps} --batch-size {args.batch_size} "
            f"--patch {' '.join(map(str, args.patch))} --lr {args.lr} --seed {args.seed} --bundle",
            seed=args.seed,
            score={f"dice_{name.split()[0]}": round(score, 4) for name, score in zip(names, scores, strict=True)},
            extra={"class_names": ["background", *names], "window": list(args.patch), "familiarity": familiarity},
        )
        print(f"bundled as {bundle(entry, rounded).file}")


if __name__ == "__main__":
    main()
