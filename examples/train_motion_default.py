"""Train and bundle `video_motion`: where the thing in a clip is going (left, right, up, down, nowhere), or that everything moves.

    python examples/train_motion_default.py --data data --bundle

Clips are drawn, not filmed: any object moves over any ground for eight frames, a photograph half of the time, so a single frame does not
tell the class. There are no pretrained weights to start from, so the small ViT is trained along with its linear adapters; its heads look
one and two frames back and ahead. They start by looking for what resembles (keys equal to queries), and the first clips are easy: from
random weights and all clips at once nothing is learnt. The file is un-merged, so that `model.merge()` has something to show.

The printed scores are measured on clips of another generator (`mmkit.data.drawn.sprites`) over other photographs, through the file's
preprocessing, with the half-precision weights that are stored. Photographs: COCO, CC-BY-2.0 or without known restrictions, `photos_more`
to train, `seg_more` to test.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import IterableDataset

from mmkit.data import load_image
from mmkit.data.drawn.motion import BACKWARDS, MOTIONS, WHOLE, any_motion, drawn_motion
from mmkit.data.drawn.sprites import CASES, motion_cases
from mmkit.data.licenses import permissive_pictures
from mmkit.training import FitConfig, fit
from mmkit.video import VideoClassifier
from mmkit.video.zeroi2v import right_answers
from mmkit.weights import WeightEntry, bundle

SIZE, FRAMES, DIM, BATCH = 32, 8, 96, 32
CLASSES = (*MOTIONS, WHOLE)
CONFIG = {
    "backbone": "timm:vit_tiny_patch16_224",
    "num_classes": len(CLASSES),
    "backbone_args": {
        "img_size": SIZE,
        "patch_size": 8,
        "embed_dim": DIM,
        "depth": 3,
        "num_heads": 6,
        "mlp_ratio": 2.0,
    },
    "zeroi2v": {
        "head_offsets": [-1, 1, -2, 2, 0, 0],
        "bottleneck_ratio": 0.25,
        "scale": 1.0,
        "dropout": 0.0,
        "train_norm": False,
    },
    "dropout": 0.0,
    "num_frames": FRAMES,
    "class_names": list(CLASSES),
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "img_size": SIZE,
}


class Clips(IterableDataset[tuple[Tensor, int]]):
    """New normalised clips (FRAMES, 3, SIZE, SIZE) without end; `easy` batches of bright objects on dark, smooth grounds come first."""

    def __init__(self, photos: Tensor, seed: int, easy: int) -> None:
        self.photos, self.seed, self.easy = photos, seed, easy

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        generator = torch.Generator().manual_seed(self.seed)
        number = 0
        while True:
            simple = round(BATCH * max(0.1, min(1.0, 2 - number / self.easy)))
            parts = [drawn_motion(simple, generator, size=SIZE, num_frames=FRAMES)]
            if simple < BATCH:
                parts.append(any_motion(BATCH - simple, generator, self.photos, size=SIZE, num_frames=FRAMES))
            for clips, labels in parts:
                yield from zip((clips - 0.5) / 0.25, labels.tolist(), strict=True)
            number += 1


def fresh_model(seed: int) -> VideoClassifier:
    """Random weights of a strength that suits a narrow model (timm's are meant for wide ones), keys equal to queries."""
    torch.manual_seed(seed)
    model = VideoClassifier(**CONFIG)
    for module in (*model.backbone.modules(), model.head):
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    torch.nn.init.normal_(model.backbone.pos_embed, std=0.3)
    for block in model.backbone.blocks:
        weight = block.attn.qkv.weight.data
        weight[:DIM] *= 1.5
        weight[DIM : 2 * DIM] = weight[:DIM]
    return model.requires_grad_(True).train()


def squares(folder: Path, side: int = 96) -> Tensor:
    """The middle squares of the permissive photographs of a folder: (N, 3, side, side) in 0..1."""
    photos = (ImageOps.fit(load_image(path), (side, side)) for path in permissive_pictures(folder))
    return torch.from_numpy(np.stack([np.asarray(p) for p in photos])).permute(0, 3, 1, 2).float() / 255


def main() -> None:
    """Train, measure, and bundle if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds photos_more and seg_more")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--easy", type=int, default=150, help="steps of easy clips only; they fade in as many again")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=int, default=300, help="clips to score per kind")
    parser.add_argument("--output", type=Path, help="folder of checkpoints: a run that was stopped goes on there")
    parser.add_argument("--bundle", action="store_true", help="write the weights into mmkit/weights")
    args = parser.parse_args()
    model = fresh_model(args.seed)
    config = FitConfig(
        max_steps=args.steps, steps_per_epoch=100, batch_size=BATCH, lr=args.lr, warmup_steps=30, weight_decay=0.02,
        label_smoothing=0.02, checkpoint_every=200, seed=args.seed, device="cpu",
    )  # fmt: skip
    clips = Clips(squares(args.data / "photos_more"), args.seed, args.easy)
    start = time.process_time()
    result = fit(model, clips, config=config, output_dir=args.output)
    for row in result.history:
        print(f"step {row['step']} loss {row['train_loss']:.3f}")
    if result.stopped != "finished":
        raise SystemExit(f"stopped after {result.steps} steps ({result.stopped}); nothing was bundled")
    print(f"{result.steps} steps in {(time.process_time() - start) / 60:.1f} CPU minutes")

    model.eval()
    state = {k: v.half().float() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    unseen = [load_image(path) for path in permissive_pictures(args.data / "seg_more")]
    cases = {name: motion_cases(name, args.clips, unseen) for name in CASES}
    cases["on a photograph, backwards"] = [(clip[::-1], BACKWARDS[label]) for clip, label in cases["on a photograph"]]
    score = {name: round(float(right_answers(model, found).mean()), 4) for name, found in cases.items()}
    print(f"{args.clips} clips each of another generator: {score}")
    if args.bundle:
        entry = WeightEntry(
            name="video_motion",
            model="video_classifier",
            config=CONFIG,
            summary="Where the one clear object in a clip is going, bright or dark, over any ground that stands still, at 32 px and 8 "
            "frames; or that the whole picture moves, as under a panning camera. Made from drawn clips. Several objects that go different "
            "ways and actions are out of its reach.",
            license="Apache-2.0",
            command=f"python examples/train_motion_default.py --data data --steps {args.steps} --easy {args.easy} --lr {args.lr} "
            f"--seed {args.seed} --bundle",
            data="procedural: objects over drawn grounds and over COCO photographs (CC-BY-2.0 or without known restrictions); scored on "
            "clips of another generator over other photographs",
            seed=args.seed,
            score=score,
        )
        print(f"bundled as {bundle(entry, state).file}")


if __name__ == "__main__":
    main()
