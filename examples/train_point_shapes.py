"""Train the bundled defaults for point clouds on drawn clouds: which of sixteen things a cloud is, or which part each point belongs to.

    python examples/train_point_shapes.py classes --bundle        # point_shapes
    python examples/train_point_shapes.py parts --bundle          # point_parts

Half of the clouds are whole, half are scans as a depth camera sees them. With --encoder point_mae_nano the training starts from the
encoder that examples/pretrain_point_mae.py made; without it, from nothing.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from mmkit import FitConfig, fit, load_weights
from mmkit.data.drawn.shapes import PART_NAMES, SHAPES, ProceduralShapes
from mmkit.pointcloud import Augment
from mmkit.pointcloud.point_peft import AugmentedLoss, point_mae_nano, point_mae_nano_parts
from mmkit.weights import WeightEntry, bundle

POINTS = 256


def clouds(split: str, domain: str, per_class: int, parts: bool) -> tuple[Tensor, Tensor]:
    """Points (n, N, 3) and labels (n,), or parts (n, N)."""
    data: Any = ProceduralShapes(split, domain, per_class, POINTS, parts=parts)
    samples = [data[i] for i in range(len(data))]
    return torch.from_numpy(np.stack([s[0] for s in samples])), torch.from_numpy(np.stack([s[-1] for s in samples]))


@torch.no_grad()
def accuracy(model: Any, points: Tensor, labels: Tensor) -> float:
    """Share of right answers, of clouds or of points."""
    model.eval()
    return float(
        torch.cat([model(p).argmax(1) == y for p, y in zip(points.split(128), labels.split(128), strict=True)])
        .float()
        .mean()
    )


def main() -> None:
    """Train, measure with half-precision weights, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("classes", "parts"))
    parser.add_argument("--encoder", default="", help="name of bundled weights to start from")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--per-class", type=int, default=80, help="clouds of each class and domain")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", action="store_true", help="write into mmkit/weights")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    parts = args.task == "parts"
    config: dict[str, Any] = {"class_names": list(PART_NAMES if parts else SHAPES)}
    config["num_parts" if parts else "num_classes"] = len(config["class_names"])
    model = (point_mae_nano_parts if parts else point_mae_nano)(**config)
    if args.encoder:
        own = model.state_dict()
        model.load_state_dict(
            {k: v for k, v in load_weights(args.encoder).state_dict().items() if k in own}, strict=False
        )
    started = time.process_time()
    train = [
        torch.cat(t) for t in zip(*(clouds("train", d, args.per_class, parts) for d in ("clean", "scan")), strict=True)
    ]
    settings = FitConfig(
        max_steps=args.steps, batch_size=args.batch_size, lr=args.lr, warmup_steps=args.steps // 10, weight_decay=0.05,
        seed=args.seed, drop_last=True, resume=False,
    )  # fmt: skip
    result = fit(
        model,
        TensorDataset(*train),
        loss_fn=AugmentedLoss(Augment("y", (0.8, 1.2), jitter=0.005, per_axis=False)),
        config=settings,
    )
    if result.stopped != "finished":
        raise SystemExit(f"stopped after {result.steps} steps ({result.stopped}); nothing was saved")
    seconds = time.process_time() - started
    state = {k: v.half().float() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    score = {f"accuracy_{d}": round(accuracy(model, *clouds("test", d, 25, parts)), 3) for d in ("clean", "scan")}
    print(f"{args.steps} steps in {seconds:.0f} CPU s: {score}")
    if args.bundle:
        thing = "the part of every point" if parts else "which of sixteen kinds of furniture and things a cloud is"
        entry = WeightEntry(
            name="point_parts" if parts else "point_shapes",
            model="point_mae_nano_parts" if parts else "point_mae_nano",
            config=config,
            summary=f"Says {thing}, from 256 points, upright along +y. Made from drawn clouds, whole and as scans: it has seen no "
            "real scans and is a demonstration, not a recogniser of the world.",
            license="Apache-2.0",
            command=f"python examples/train_point_shapes.py {args.task} {f'--encoder {args.encoder} ' if args.encoder else ''}"
            f"--steps {args.steps} --per-class {args.per_class} --batch-size {args.batch_size} --lr {args.lr} --seed {args.seed} --bundle",
            data=f"drawn by mmkit.data.drawn.shapes: {32 * args.per_class} clouds, half of them scans; 800 others to test",
            seed=args.seed,
            score=score,
            extra={"num_points": POINTS},
        )
        bundle(entry, state)


if __name__ == "__main__":
    main()
