"""Pre-train the bundled tiny ViT (1.0 M parameters) on pictures drawn by a program; no real data is used.

    python examples/pretrain_tiny_vit.py                  # the bundled weights: about a quarter of an hour on two cores
    python examples/pretrain_tiny_vit.py --pictures 2000 --epochs 1 --dry-run    # a look at how it works

The score in the manifest is the accuracy on freshly drawn pictures, measured with the weights as stored (float16).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmkit.backbones import create_backbone
from mmkit.data.drawn.pictures import ProceduralImages, class_names
from mmkit.training import FitConfig, fit
from mmkit.training.metrics import accuracy
from mmkit.weights import WeightEntry, bundle

ARCHITECTURE = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 4}
MEAN = STD = (0.5, 0.5, 0.5)


class Drawn(Dataset[tuple[Tensor, int]]):
    """`length` procedural pictures, drawn once by all cores and kept in memory as (3, 32, 32) in -1..1."""

    def __init__(self, length: int, seed: int):
        source = ProceduralImages(length, 32, seed)
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            chunks = pool.starmap(_draw, [(length, seed, r) for r in np.array_split(np.arange(length), 64) if len(r)])
        self.images = torch.from_numpy(np.concatenate(chunks)).permute(0, 3, 1, 2).contiguous()
        self.labels = [i % len(source.class_names) for i in range(length)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].float() / 127.5 - 1, self.labels[index]


def _draw(length: int, seed: int, indices: Sequence[int]) -> np.ndarray:
    source = ProceduralImages(length, 32, seed)
    return np.stack([np.asarray(source[int(i)][0]) for i in indices])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=24_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="train, but do not replace the bundled weights")
    args = parser.parse_args()

    names = class_names()
    torch.manual_seed(args.seed)
    model = create_backbone("timm:vit_tiny_patch16_224", num_classes=len(names), **ARCHITECTURE)
    train, val = Drawn(args.pictures, args.seed + 1), Drawn(max(args.pictures // 20, len(names)), args.seed + 2)
    config = FitConfig(
        epochs=args.epochs, batch_size=args.batch_size, lr=1.5e-3, weight_decay=0.05, warmup_epochs=1, label_smoothing=0.05,
        seed=args.seed, mixed_precision="bf16" if torch.cuda.is_available() else "no", restore_best=False, eval_every=1,
    )  # fmt: skip
    result = fit(model, train, val, config=config)
    if result.stopped != "finished":
        raise SystemExit(f"stopped after {result.steps} steps ({result.stopped}); nothing was bundled")

    model = model.cpu().eval()
    model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    score = accuracy(model, torch.utils.data.DataLoader(val, 256))["accuracy"]
    print(f"accuracy on {len(val)} fresh pictures of {len(names)} classes: {score:.4f}")
    if args.dry_run:
        return
    bundle(
        WeightEntry(
            name="tiny_vit",
            model="timm:vit_tiny_patch16_224",
            config={**ARCHITECTURE, "num_classes": len(names)},
            summary="A 1.0 M parameter ViT for 32x32 pictures that knows drawn shapes, textures and glyphs, nothing else. A small "
            "starting point for adapters and tests; for photographs load real pre-trained weights.",
            license="Apache-2.0",
            command=f"python examples/pretrain_tiny_vit.py --pictures {args.pictures} --epochs {args.epochs} --seed {args.seed}",
            data=f"{args.pictures} pictures drawn by mmkit.data.drawn.pictures",
            seed=args.seed,
            score={"accuracy": round(score, 4)},
            extra={"mean": MEAN, "std": STD, "class_names": names},
        ),
        model.state_dict(),
    )


if __name__ == "__main__":
    main()
