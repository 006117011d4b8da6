"""Train and bundle `video_motion`: where the thing in a clip is going (left, right, up, down, or nowhere).

    python examples/train_motion_default.py --bundle

Clips are drawn, not filmed: one object moves over a smooth background for eight frames, so a single frame does not tell the
class. There are no pretrained weights to start from, so the small ViT is trained along with its linear adapters; its heads look
one and two frames back and ahead. The file is un-merged, so that `model.merge()` has something to show. The printed scores are measured on
fresh clips with the half-precision weights that are stored: as they are, and played backwards (left must become right).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from mmkit.data.drawn.motion import BACKWARDS, MOTIONS, drawn_motion
from mmkit.training import FitConfig, fit
from mmkit.video import VideoClassifier
from mmkit.weights import WeightEntry, bundle

SIZE, FRAMES = 32, 8
CONFIG = {
    "backbone": "timm:vit_tiny_patch16_224",
    "num_classes": len(MOTIONS),
    "backbone_args": {"img_size": SIZE, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0},
    "zeroi2v": {
        "head_offsets": [-1, 1, -2, 0],
        "bottleneck_ratio": 0.25,
        "scale": 1.0,
        "dropout": 0.0,
        "train_norm": False,
    },
    "dropout": 0.0,
    "num_frames": FRAMES,
    "class_names": list(MOTIONS),
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "img_size": SIZE,
}


def make_clips(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Normalised clips `(batch, FRAMES, 3, SIZE, SIZE)` and their classes."""
    clips, label = drawn_motion(batch, generator, size=SIZE, num_frames=FRAMES)
    return (clips - 0.5) / 0.25, label


class Clips(IterableDataset[tuple[Tensor, int]]):
    """New clips without end."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            clips, labels = make_clips(32, generator)
            yield from zip(clips, labels.tolist(), strict=True)


@torch.no_grad()
def accuracy(model: VideoClassifier, clips: int = 1000, seed: int = 10_000) -> tuple[float, float, Tensor]:
    """Share of right answers on fresh clips, on the same played backwards, and the confusion matrix (rows: truth)."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.zeros(len(MOTIONS), len(MOTIONS), dtype=torch.long)
    reverse = 0
    model.eval()
    for _ in range(clips // 50):
        x, y = make_clips(50, generator)
        table.index_put_((y, model(x).argmax(-1)), torch.ones(50, dtype=torch.long), accumulate=True)
        reverse += int((model(x.flip(1)).argmax(-1) == torch.tensor(BACKWARDS)[y]).sum())
    total = int(table.sum())
    return int(table.diag().sum()) / total, reverse / total, table


def main() -> None:
    """Train, measure, and bundle if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="stop early after this time")
    parser.add_argument("--bundle", action="store_true", help="write the weights into mmkit/weights")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = VideoClassifier(**CONFIG)
    for module in model.backbone.modules():  # timm's std of 0.02 is meant for wide models
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    torch.nn.init.normal_(model.backbone.pos_embed, std=0.3)
    model.requires_grad_(True).train()
    config = FitConfig(
        max_steps=args.steps, max_seconds=60 * args.minutes, steps_per_epoch=100, batch_size=args.batch_size, lr=args.lr,
        warmup_steps=50, weight_decay=0.02, label_smoothing=0.02, restore_best=False, seed=args.seed, device="cpu",
    )  # fmt: skip
    shown = list(zip(*make_clips(150, torch.Generator().manual_seed(10_000)), strict=True))
    result = fit(model, Clips(args.seed), shown, config=config)
    for row in result.history:
        print(f"step {row['step']} loss {row['train_loss']:.3f} test {row['accuracy']:.3f}")
    model.eval()
    state = {k: v.half().float() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    score, reverse, table = accuracy(model)
    print(f"{score:.3f} on 1000 fresh clips, {reverse:.3f} played backwards; confusion (rows: truth):\n{table}")
    if args.bundle:
        entry = WeightEntry(
            name="video_motion",
            model="video_classifier",
            config=CONFIG,
            summary="Where the one clear object in a clip is going, at 32 px and 8 frames. Made from drawn clips: it knows "
            "steady motion of a bright object over darker, still ground. Pictures that move as a whole (a panning camera) and actions are "
            "out of its reach.",
            license="Apache-2.0",
            command=f"python examples/train_motion_default.py --steps {result.steps} --seed {args.seed} --bundle",
            data="procedural: one ellipse or box moving over a smooth random background",
            seed=args.seed,
            score={"accuracy": round(score, 3), "accuracy_backwards": round(reverse, 3), "chance": 0.2},
        )
        bundle(entry, state)


if __name__ == "__main__":
    main()
