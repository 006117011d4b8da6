"""Train a small LightM-UNet to find cell nuclei in microscopy pictures, the bundled default of "medical-segmentation".

    python examples/train_nuclei.py --data data/med_nuclei --output runs/nuclei
    python examples/train_nuclei.py --data data/med_nuclei --bundle     # also replaces the bundled weights
    python examples/train_nuclei.py --data data/med_nuclei --familiarity  # only records what the training pictures look like

The data: pictures of the 2018 Data Science Bowl (BBBC038v1, CC0) with `index.csv`, `images/` and `labels/`.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from mmkit import FitConfig, create_model, fit
from mmkit.vision.medical import Familiarity, Patches, dice_per_class, nuclei_cases, segmentation_loss
from mmkit.weights import WeightEntry, bundle, record, weight_entry

CONFIG = {"in_chans": 3, "num_classes": 2, "init_filters": 8, "pad": True}
NAME = "lightm_unet_nuclei"


def main() -> None:
    """Train, measure with half-precision weights, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for save_pretrained")
    parser.add_argument("--bundle", action="store_true", help="write into mmkit/weights")
    parser.add_argument(
        "--familiarity", action="store_true", help="do not train: record the training pictures' statistics"
    )
    args = parser.parse_args()

    cases = nuclei_cases(args.data, "train")
    familiarity = Familiarity.measure(image for image, _ in cases).to_dict()
    if args.familiarity:
        old = weight_entry(NAME)
        record(dataclasses.replace(old, extra={**old.extra, "familiarity": familiarity}))
        return
    torch.manual_seed(args.seed)
    model = create_model("lightm_unet_2d_tiny", **CONFIG)
    train = Patches(cases, (args.patch,) * 2, args.steps * args.batch_size, turn=True)
    config = FitConfig(
        max_steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        warmup_steps=min(30, args.steps // 10),
        weight_decay=1e-4,
        seed=args.seed,
        resume=False,
    )
    result = fit(model, train, loss_fn=segmentation_loss, config=config)

    rounded = {k: v.detach().cpu().half().float() for k, v in model.state_dict().items()}
    model.load_state_dict(rounded)
    test = nuclei_cases(args.data, "test")
    (score,) = dice_per_class(model.cpu(), test, (256, 256), 2)
    print(f"{result.steps} steps in {result.seconds:.0f} s; Dice {score:.4f} on {len(test)} test pictures")
    if args.output:
        model.save_pretrained(args.output)
        print(f"saved to {args.output}")
    if args.bundle:
        entry = WeightEntry(
            name=NAME,
            model="lightm_unet_2d_tiny",
            config=CONFIG,
            summary="Nuclei in fluorescence and stained brightfield microscopy, about 20 px wide, against background. Touching "
            "nuclei are not separated; other kinds of images are out of its reach. Not a medical device.",
            license="Apache-2.0",
            command=f"python examples/train_nuclei.py --data data/med_nuclei --steps {args.steps} "
            f"--batch-size {args.batch_size} --patch {args.patch} --lr {args.lr} --seed {args.seed} --bundle",
            data="BBBC038v1 (2018 Data Science Bowl, CC0): 66 training and 20 test pictures",
            seed=args.seed,
            score={"dice": round(score, 4)},
            extra={"class_names": ["background", "nucleus"], "familiarity": familiarity},
        )
        print(f"bundled as {bundle(entry, rounded).file}")


if __name__ == "__main__":
    main()
