"""Pre-train a tiny ViT (1.0 M parameters) on pictures drawn by a program; no real data is used.

    python examples/pretrain_tiny_vit.py --output runs/drawn    # about a quarter of an hour on two cores
    python examples/pretrain_tiny_vit.py --output runs/drawn --pictures 2000 --epochs 1    # a look at how it works

It is the first half of how the bundled `tiny_vit` was made; `distill_tiny_vit.py` goes on from here with photographs. The folder is one for
`create_backbone`; its weights are rounded to half precision, and the accuracy that is printed is theirs, on freshly drawn pictures.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmkit.backbones import create_backbone, save_backbone
from mmkit.data.drawn.pictures import ProceduralImages, class_names
from mmkit.training import FitConfig, fit
from mmkit.training.metrics import accuracy

ARCHITECTURE = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 4}


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
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
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
        raise SystemExit(f"stopped after {result.steps} steps ({result.stopped}); nothing was saved")

    model = model.cpu().eval()
    model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    score = accuracy(model, torch.utils.data.DataLoader(val, 256))["accuracy"]
    print(f"accuracy on {len(val)} fresh pictures of {len(names)} classes: {score:.4f}")
    print(f"saved to {save_backbone(model, args.output)}")


if __name__ == "__main__":
    main()
