"""Fine-tune a pyramid of two backbones on your own pictures: frozen branches, trained interactions, LoRA on both branches.

    python examples/piip_classify.py --data photos/ --output runs/piip
    python examples/piip_classify.py --data photos/ --large vit_base_patch16_224 --small vit_small_patch16_224 \\
        --large-weights base.safetensors --small-weights small.safetensors --sizes 384 192 --output runs/piip

The default puts the bundled `tiny_vit` into both branches: it shows the way and saves nothing. Give --large a larger model than --small.
`photos/` has a folder per class. `runs/piip/model` is what `mmkit.pipeline("image-classification", "runs/piip/model")` takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mmkit import FitConfig, apply_adapter, fit, save_adapter
from mmkit.backbones import image_info
from mmkit.data import ImageTransform, open_dataset, split_dataset
from mmkit.vision.piip import PIIP, BranchConfig, PIIPConfig, compare


def main() -> None:
    """Build, count, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--large", default="tiny_vit", help="backbone that sees the small picture")
    parser.add_argument("--small", default="tiny_vit", help="backbone that sees the large picture")
    parser.add_argument("--large-weights", type=Path)
    parser.add_argument("--small-weights", type=Path)
    parser.add_argument("--sizes", type=int, nargs=2, default=(128, 64), metavar=("HIGH", "LOW"))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train, val = split_dataset(open_dataset(args.data), seed=args.seed)
    pyramid = PIIPConfig(
        (BranchConfig(args.large, args.sizes[1]), BranchConfig(args.small, args.sizes[0])), num_heads=8, antialias=True
    )
    model = PIIP(pyramid, len(train.class_names), class_names=train.class_names)
    for number, weights in ((1, args.large_weights), (2, args.small_weights)):
        if weights is not None:
            model.load_branch(number, weights)
    for name, (macs, params) in compare(model).items():
        print(f"{name:16} {macs / 1e9:8.2f} G multiply-adds, {params / 1e6:6.1f} M parameters")

    trained = (*(f"interactions.{k}" for k in range(len(model.interactions))), "merge", "cls_norm", "cls_head")
    adapter = apply_adapter(model, "lora", r=8, modules_to_save=trained)  # everything else stays as it is
    facts = image_info(model).preprocessing()
    train.transform, val.transform = ImageTransform.of(facts, train=True), ImageTransform.of(facts)
    config = FitConfig(
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        weight_decay=0.05,
        warmup_epochs=1,
        seed=args.seed,
        resume=False,
    )
    result = fit(model, train, val, config=config, adapter=adapter)
    if result.stopped != "finished":
        raise SystemExit(f"stopped after {result.steps} steps ({result.stopped}); nothing was saved")
    print(f"{adapter.num_parameters():,} trained parameters; validation {result.metrics}")

    save_adapter(adapter, args.output / "adapter")  # LoRA of both branches and the interactions in one file
    adapter.merge()
    model.save_pretrained(args.output / "model")
    print(f"saved to {args.output}")


if __name__ == "__main__":
    main()
