"""Train a 3D LightM-UNet: on MRI of the hippocampus, or on drawn volumes (the bundled 3D default).

    python examples/train_hippocampus.py --data data/med_hippocampus --steps 1500 --patch 32 40 32 --lr 4e-3 --output runs/hippocampus
    python examples/train_hippocampus.py --drawn --bundle

The MRI crops are Task04 of the Medical Segmentation Decathlon (CC-BY-SA 4.0) with `splits.json`, `images/` and `labels/`;
weights trained on them are not bundled. The drawn volumes come from `mmkit.data.drawn.scans.sample_volume`.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from mmkit import FitConfig, create_model, fit
from mmkit.vision.medical import Familiarity, Patches, dice_per_class, drawn_cases, hippocampus_cases, segmentation_loss
from mmkit.weights import WeightEntry, bundle, record, weight_entry

CONFIG = {"in_chans": 1, "num_classes": 3, "init_filters": 8, "pad": True}
NAME = "lightm_unet_blobs"


def main() -> None:
    """Train, measure with half-precision weights, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder of the hippocampus volumes")
    source.add_argument("--drawn", action="store_true", help="drawn volumes instead")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--patch", type=int, nargs=3, default=(32, 32, 32))
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for save_pretrained")
    parser.add_argument("--bundle", action="store_true", help="write into mmkit/weights (with --drawn)")
    parser.add_argument(
        "--familiarity", action="store_true", help="with --drawn: only record what the volumes look like"
    )
    args = parser.parse_args()
    if (args.bundle or args.familiarity) and not args.drawn:
        parser.error(
            "bundled weights are those of --drawn: the MRI's license does not allow shipping weights under ours"
        )

    if args.drawn:
        train, test = drawn_cases(range(1000, 1060)), drawn_cases(range(10))
    else:
        train, test = (hippocampus_cases(args.data, split) for split in ("train", "test"))
    familiarity = Familiarity.measure(image for image, _ in train).to_dict()
    if args.familiarity:
        old = weight_entry(NAME)
        record(dataclasses.replace(old, extra={**old.extra, "familiarity": familiarity}))
        return
    torch.manual_seed(args.seed)
    model = create_model("lightm_unet_3d_tiny" if args.drawn else "lightm_unet_3d", **CONFIG)  # the latter: four levels
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
    )
    result = fit(model, patches, loss_fn=segmentation_loss, config=config)

    rounded = {k: v.detach().cpu().half().float() for k, v in model.state_dict().items()}
    model.load_state_dict(rounded)
    scores = dice_per_class(model.cpu(), test, args.patch, 3)
    print(f"{result.steps} steps in {result.seconds:.0f} s; Dice per class {scores} on {len(test)} test volumes")
    if args.output:
        model.save_pretrained(args.output)
        print(
            f"saved to {args.output}; predict with mmkit.pipeline('medical-segmentation', '{args.output}', window={tuple(args.patch)})"
        )
    if args.bundle:
        entry = WeightEntry(
            name=NAME,
            model="lightm_unet_3d_tiny",
            config=CONFIG,
            summary="Bright and dark blobs in drawn, noisy volumes: shows what the 3D pipeline does. It knows nothing of anatomy; "
            "train your own with examples/train_hippocampus.py. Not a medical device.",
            license="Apache-2.0",
            command=f"python examples/train_hippocampus.py --drawn --steps {args.steps} --batch-size {args.batch_size} "
            f"--patch {' '.join(map(str, args.patch))} --lr {args.lr} --seed {args.seed} --bundle",
            data="drawn by mmkit.data.drawn.scans.sample_volume: 60 training and 10 test volumes",
            seed=args.seed,
            score={"dice_bright": round(scores[0], 4), "dice_dark": round(scores[1], 4)},
            extra={
                "class_names": ["background", "bright blob", "dark blob"],
                "window": list(args.patch),
                "familiarity": familiarity,
            },
        )
        print(f"bundled as {bundle(entry, rounded).file}")


if __name__ == "__main__":
    main()
