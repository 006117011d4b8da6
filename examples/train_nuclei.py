"""Train a small U-Net or LightM-UNet to find cell nuclei in microscopy pictures; the former is the default of "medical-segmentation".

    python examples/train_nuclei.py --data data/med_nuclei --network unet --ema 0.995 --bundle    # replaces the bundled weights
    python examples/train_nuclei.py --data data/med_nuclei --network lightm_unet --light --steps 500 --patch 96 --bundle
    python examples/train_nuclei.py --data data/med_nuclei --network unet --hold-back       # for choosing settings
    python examples/train_nuclei.py --data data/med_nuclei --familiarity  # only records what the training pictures look like

The data: pictures of the 2018 Data Science Bowl (BBBC038v1, CC0) with `index.csv`, `images/` and `labels/`. Half of the patches show
fluorescence, half stained tissue, and they are changed in many ways; with `--light` only in exposure, as the bundled LightM-UNet was
trained. With `--hold-back` a fifth of the training pictures is scored instead of the test pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from mmkit import FitConfig, create_model, fit
from mmkit.vision.medical import (
    Case,
    Familiarity,
    Microscopy,
    Patches,
    dice_per_class,
    nuclei_cases,
    nuclei_kinds,
    segmentation_loss,
)
from mmkit.weights import WeightEntry, bundle, record, weight_entry

NETWORKS = {
    "unet": ("unet_nuclei", "unet_2d_small", {"in_chans": 3, "num_classes": 2}),
    "lightm_unet": (
        "lightm_unet_nuclei",
        "lightm_unet_2d_tiny",
        {"in_chans": 3, "num_classes": 2, "init_filters": 8, "pad": True},
    ),
}
"""Network -> name of the weights, model and configuration."""
SUMMARIES = {
    "unet": "Nuclei in fluorescence and stained brightfield microscopy, 10 to 60 px wide, against background; "
    "mmkit.vision.medical.split_touching parts touching ones. Other kinds of images are out of its reach. Not a medical device.",
    "lightm_unet": "Nuclei in fluorescence and stained brightfield microscopy, about 20 px wide, against background. A plain U-Net "
    "learns the same better in the same minutes: unet_nuclei. Other kinds of images are out of its reach. Not a medical device.",
}
WINDOW = 256


def score(model: nn.Module, cases: list[Case], kinds: list[str]) -> dict[str, float]:
    """Mean Dice over whole pictures: of all, and of each kind."""
    each = [dice_per_class(model, [case], (WINDOW, WINDOW), 2)[0] for case in cases]
    found = {"dice": statistics.mean(each)}
    for kind in sorted(set(kinds)):
        found[f"dice, {kind}"] = statistics.mean(d for d, k in zip(each, kinds, strict=True) if k == kind)
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    """Train, measure with half-precision weights, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=list(NETWORKS), default="unet")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--patch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ema", type=float, help="decay of the average of the weights that is kept; default none")
    parser.add_argument("--light", action="store_true", help="change patches in exposure only; all pictures alike")
    parser.add_argument("--hold-back", action="store_true", help="score a fifth of the training pictures; no test")
    parser.add_argument("--output", type=Path, help="folder for save_pretrained")
    parser.add_argument("--bundle", action="store_true", help="write into mmkit/weights")
    parser.add_argument(
        "--familiarity", action="store_true", help="do not train: record the training pictures' statistics"
    )
    args = parser.parse_args()
    if args.bundle and args.hold_back:
        parser.error("weights are bundled from all training pictures: leave --hold-back out")

    name, variant, settings = NETWORKS[args.network]
    cases, kinds = nuclei_cases(args.data, "train"), nuclei_kinds(args.data, "train")
    familiarity = Familiarity.measure(image for image, _ in cases).to_dict()
    if args.familiarity:
        for name in {row[0] for row in NETWORKS.values()}:
            old = weight_entry(name)
            record(dataclasses.replace(old, extra={**old.extra, "familiarity": familiarity, "touching": True}))
        return
    if args.hold_back:
        test, test_kinds = cases[2::5], kinds[2::5]
        cases, kinds = ([x for i, x in enumerate(part) if i % 5 != 2] for part in (cases, kinds))
    else:
        test, test_kinds = nuclei_cases(args.data, "test"), nuclei_kinds(args.data, "test")

    torch.manual_seed(args.seed)
    model = create_model(variant, **settings)
    changes = {} if args.light else {"augment": Microscopy(), "weights": [1 / kinds.count(kind) for kind in kinds]}
    train = Patches(cases, (args.patch,) * 2, args.steps * args.batch_size, turn=True, **changes)
    config = FitConfig(
        max_steps=args.steps, batch_size=args.batch_size, lr=args.lr, warmup_steps=min(30, args.steps // 10),
        weight_decay=1e-4, ema_decay=args.ema, seed=args.seed, resume=False, device="cpu",
    )  # fmt: skip
    start = time.process_time()
    result = fit(model, train, loss_fn=segmentation_loss, config=config)
    if result.stopped != "finished":
        raise SystemExit(f"stopped after {result.steps} steps ({result.stopped}); nothing was saved")
    print(f"{result.steps} steps in {(time.process_time() - start) / 60:.1f} CPU minutes")

    rounded = {k: v.detach().half().float() for k, v in model.state_dict().items()}
    model.load_state_dict(rounded)
    found = score(model, test, test_kinds)
    print(f"{found} on {len(test)} pictures")
    if args.output:
        model.save_pretrained(args.output)
        print(f"saved to {args.output}")
    if args.bundle:
        entry = WeightEntry(
            name=name,
            model=variant,
            config=settings,
            summary=SUMMARIES[args.network],
            license="Apache-2.0",
            command=f"python examples/train_nuclei.py --data data/med_nuclei --network {args.network} --steps {args.steps} "
            f"--batch-size {args.batch_size} --patch {args.patch} --lr {args.lr} --seed {args.seed}"
            f"{f' --ema {args.ema}' * bool(args.ema)}{' --light' * args.light} --bundle",
            data="BBBC038v1 (2018 Data Science Bowl, CC0): 66 training and 20 test pictures",
            seed=args.seed,
            score=found,
            extra={"class_names": ["background", "nucleus"], "familiarity": familiarity, "touching": True},
        )
        print(f"bundled as {bundle(entry, rounded).file}")


if __name__ == "__main__":
    main()
