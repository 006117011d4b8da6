"""Train a vision transformer with Gaussian mixture masks from scratch on a small data set.

    python examples/train_gmm_small_dataset.py --data my_photos --output runs/gmm      # a folder with one subfolder per class
    python examples/train_gmm_small_dataset.py --data digits --model gmm_swin --epochs 5 --output runs/digits
    python examples/train_gmm_small_dataset.py --data drawn --small --light --epochs 16 --lr 2e-3 --batch-size 50 --bundle gmm_vit_drawn

The recipe is that of arXiv 2309.05375: AdamW (lr 1e-3, weight decay 0.05), batches of 128, 100 epochs, cosine decay per step
after 10 warm-up epochs, label smoothing 0.1, drop path 0.1, flip and padded crop, AutoAugment, CutMix or MixUp on half of the
batches, random erasing, three augmented copies of each picture per batch. `--light` keeps flip and crop only, which learns
faster in short runs. `--small` is a 0.11 M parameter ViT for a CPU; `--mask none` or `elm` trains the comparison.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms as T

from mmkit.backbones.model import create_model, list_models
from mmkit.data import array_dataset, load_digits, open_dataset, split_dataset
from mmkit.data.drawn.pictures import class_names, draw
from mmkit.errors import InputError
from mmkit.training import FitConfig, fit
from mmkit.weights import WeightEntry, bundle

MEAN, STD = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
SMALL = {"embed_dim": 64, "depth": 3, "num_heads": 4, "patch_size": 4}


class Views(Dataset[Any]):
    """`repeats` augmented copies `(R, C, H, W)` of every picture."""

    def __init__(self, pictures: Any, augment: Any, repeats: int):
        self.pictures, self.augment, self.repeats = pictures, augment, repeats

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.pictures[index]
        return torch.stack([self.augment(image) for _ in range(self.repeats)]), label


def join_views(batch: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """One batch of pictures from examples with several copies each."""
    images = torch.cat([views for views, _ in batch])
    return images, torch.tensor([label for views, label in batch for _ in views])


def drawn_pictures(per_class: int, size: int, seed: int) -> Any:
    """Shapes and textures drawn by a program; no license, no download."""
    names = [n for n in class_names() if not n.startswith("glyph_")]
    images = [
        np.asarray(draw(n, np.random.default_rng((seed, k, i)), size))
        for k, n in enumerate(names)
        for i in range(per_class)
    ]
    return array_dataset(np.stack(images), [k for k in range(len(names)) for _ in range(per_class)], names)


def read_data(name: str, size: int, seed: int) -> tuple[Any, Any]:
    """(training, validation) pictures."""
    if name == "drawn":
        return drawn_pictures(150, size, seed), drawn_pictures(25, size, seed + 1)
    return split_dataset(load_digits(size=size) if name == "digits" else open_dataset(name), 0.2, seed)


def transforms(size: int, flip: bool, light: bool) -> tuple[Any, Any]:
    """(training, evaluation) transforms."""
    normalize = [T.ToTensor(), T.Normalize(MEAN, STD)]
    resize = T.Resize((size, size), antialias=True)
    train: list[Any] = [resize, *([T.RandomHorizontalFlip()] if flip else []), T.RandomCrop(size, padding=size // 8)]
    if not light:
        train += [T.AutoAugment(T.AutoAugmentPolicy.CIFAR10)]
    train += normalize
    if not light:
        train += [RandomErasing(0.25, mode="const", min_area=0.02, max_area=0.4, device="cpu")]
    return T.Compose(train), T.Compose([resize, *normalize])


def main() -> None:
    """Train, print the validation accuracy, save (and bundle) the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help='a folder of labelled pictures, or "digits" or "drawn"')
    parser.add_argument("--model", default="gmm_vit", choices=list_models("gmm_*"))
    parser.add_argument("--small", action="store_true", help="a small ViT for a CPU instead of the paper's size")
    parser.add_argument("--mask", default="gmm", choices=["gmm", "elm", "none"])
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--light", action="store_true", help="flip and crop are the only augmentation")
    parser.add_argument("--no-flip", action="store_true", help="for letters, digits and other handed pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for config.json, model.safetensors and the logs")
    parser.add_argument("--bundle", metavar="NAME", help="store the model as bundled weights under this name")
    args = parser.parse_args()

    train, val = read_data(args.data, args.img_size, args.seed)
    classes = train.class_names
    overrides: dict[str, Any] = dict(SMALL) if args.small else {}
    overrides |= {"img_size": args.img_size, "num_classes": len(classes), "mask": args.mask}
    overrides["drop_path_rate"] = 0.0 if args.light else 0.1
    torch.manual_seed(args.seed)
    model = create_model(args.model, **overrides)
    flip = not args.no_flip and args.data != "digits"
    augment, plain = transforms(args.img_size, flip, args.light)
    repeats = 1 if args.light else 3
    batch = min(args.batch_size // repeats // 2 * 2, len(train) // 2 * 2)  # MixUp pairs pictures: an even number
    if batch < 2:
        raise InputError(f"{args.data} has too few pictures ({len(train)}) for training.")
    steps = args.epochs * len(train) // (batch * repeats)
    config = FitConfig(
        max_steps=max(1, steps), batch_size=batch, lr=args.lr, min_lr=1e-6, weight_decay=0.05, warmup_steps=steps // 10,
        label_smoothing=0.1, clip_grad=None, drop_last=True, seed=args.seed, restore_best=False, eval_every=10,
        **({} if args.light else {"mixup": 1.0, "cutmix": 1.0, "mixup_prob": 0.5}),
    )  # fmt: skip
    result = fit(
        model,
        Views(train, augment, repeats),
        Views(val, plain, 1),
        config=config,
        output_dir=args.output and args.output / "fit",
        collate_fn=join_views,
    )
    if result.stopped != "finished":
        raise SystemExit(f"Training was {result.stopped} after {result.steps} steps; the same command continues it.")
    print(
        f"{args.model} ({args.mask}): validation accuracy {100 * result.metrics['accuracy']:.1f} %, {result.steps} steps"
    )
    model.cpu().eval()
    if args.output:
        model.save_pretrained(args.output / "model")
    if args.bundle:
        store(model, args, classes, Views(val, plain, 1))


def store(model: Any, args: argparse.Namespace, classes: list[str], val: Views) -> None:
    """Round to half precision, measure again, and record the file in the manifest."""
    state = {k: v.half().float() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    batches = [join_views([val[i] for i in range(k, min(k + 100, len(val)))]) for k in range(0, len(val), 100)]
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    small = " --small" if args.small else ""
    light = " --light" if args.light else ""
    entry = WeightEntry(
        name=args.bundle,
        model=args.model,
        config={k: v for k, v in model.config.items() if k != "drop_path_rate"},
        summary="A small ViT with Gaussian mixture masks that tells drawn shapes and textures apart; to look at masks, not for photos.",
        license="Apache-2.0",
        command=f"python examples/train_gmm_small_dataset.py --data {args.data} --model {args.model}{small}{light} --img-size "
        f"{args.img_size} --epochs {args.epochs} --lr {args.lr} --batch-size {args.batch_size} --bundle {args.bundle}",
        data=f"pictures drawn by mmkit.data.drawn.pictures: {len(classes)} shapes and textures, 150 training and 25 validation each",
        seed=args.seed,
        score={"validation accuracy": right / len(val)},
        extra={"class_names": classes, "mean": list(MEAN), "std": list(STD)},
    )
    print(f"bundled {bundle(entry, state).name}: {100 * entry.score['validation accuracy']:.1f} %")


if __name__ == "__main__":
    main()
