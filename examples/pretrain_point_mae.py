"""Pre-train the small Point-MAE encoder on drawn clouds, without labels: the bundled `point_mae_nano`.

    python examples/pretrain_point_mae.py --output runs/point_mae --bundle

Half of the clouds are clean, half are scans as a depth camera sees them; all are turned, scaled and shifted at random in every step.
The run can be interrupted and continued. The score is the accuracy of a linear SVM on frozen features of scans, beside that of the
same network before training.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.utils.data import TensorDataset

from mmkit import FitConfig, fit
from mmkit.data.drawn.shapes import ProceduralShapes
from mmkit.ops.points import chamfer_distance
from mmkit.pointcloud.point_peft import PointMAEForPretraining, point_mae_nano_pretraining
from mmkit.weights import WeightEntry, bundle

POINTS = 256


def clouds(split: str, domain: str, per_class: int) -> tuple[Tensor, Tensor]:
    """Points (n, N, 3) and labels (n,) of drawn clouds."""
    data = ProceduralShapes(split, domain, per_class, POINTS)
    samples = [data[i] for i in range(len(data))]
    return torch.from_numpy(np.stack([s[0] for s in samples])), torch.tensor([s[1] for s in samples])


@torch.no_grad()
def groups(model: PointMAEForPretraining, points: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbourhoods and centres of all clouds; turning, scaling and shifting them later is the same as doing it before."""
    parts = [model.group(p) for p in points.split(512)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def augmented_loss(model: PointMAEForPretraining, batch: tuple[Tensor, Tensor]) -> Tensor:
    """`loss_fn` for `fit`: a turn about y, a scale in 0.8..1.25 and a shift of up to 0.1 for every cloud."""
    neighborhood, center = batch
    angle = 2 * torch.pi * torch.rand(len(center))
    c, s, o = angle.cos(), angle.sin(), torch.zeros(len(center))
    turn = torch.stack([c, o, s, o, o + 1, o, -s, o, c], -1).view(-1, 3, 3).transpose(1, 2)
    turn = turn * torch.exp((2 * torch.rand(len(center), 1, 1) - 1) * 0.223)
    shift = 0.2 * torch.rand(len(center), 1, 3) - 0.1
    return chamfer_distance(*model.reconstruct(neighborhood @ turn.unsqueeze(1), center @ turn + shift))


@torch.no_grad()
def svm_accuracy(model: PointMAEForPretraining) -> float:
    """A linear SVM on global features: 30 scans of each class to learn from, 40 to answer."""
    model.eval()
    found = []
    for split, per_class in (("probe-train", 30), ("probe-test", 40)):
        points, labels = clouds(split, "scan", per_class)
        found += [model.global_feature(points).numpy(), labels.numpy()]
    svm = make_pipeline(StandardScaler(), LinearSVC(C=0.01, dual=False)).fit(found[0], found[1])
    return float(svm.score(found[2], found[3]))


def main() -> None:
    """Pre-train, probe, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--per-class", type=int, default=375, help="clouds of each class and domain")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/point_mae"))
    parser.add_argument("--bundle", action="store_true", help="write into mmkit/weights")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = point_mae_nano_pretraining()
    before = svm_accuracy(model)
    points = torch.cat([clouds("train", domain, args.per_class)[0] for domain in ("clean", "scan")])
    config = FitConfig(
        max_steps=args.steps, batch_size=args.batch_size, lr=args.lr, min_lr=1e-6, warmup_steps=args.steps // 30,
        weight_decay=0.05, checkpoint_every=250, keep_checkpoints=1, seed=args.seed, drop_last=True,
    )  # fmt: skip
    started = time.process_time()
    result = fit(
        model, TensorDataset(*groups(model, points)), loss_fn=augmented_loss, config=config, output_dir=args.output
    )
    if result.stopped != "finished":
        raise SystemExit(f"stopped after {result.steps} steps ({result.stopped}); the same command goes on")
    seconds = time.process_time() - started
    state = {k: v.half().float() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    after = svm_accuracy(model)
    loss = result.history[-1]["train_loss"] if result.history else float("nan")
    print(
        f"{result.steps} steps, {seconds:.0f} CPU s in this process; Chamfer {loss:.4f}; SVM {before:.3f} -> {after:.3f}"
    )
    if args.bundle:
        classifier = model.classifier(0)
        kept = classifier.config
        entry = WeightEntry(
            name="point_mae_nano",
            model="point_mae_nano",
            config={k: v for k, v in kept.items() if k in ("num_classes", "embed_dim", "depth")},
            summary="A small Point-MAE encoder pre-trained without labels on drawn clouds of 256 points (16 kinds of furniture and "
            "things, clean and as scans): a starting point for adapters and few-shot learning on a CPU. It has seen no real scans.",
            license="Apache-2.0",
            command=f"python examples/pretrain_point_mae.py --steps {args.steps} --per-class {args.per_class} "
            f"--batch-size {args.batch_size} --lr {args.lr} --seed {args.seed} --bundle",
            data=f"drawn by mmkit.data.drawn.shapes: {32 * args.per_class} clouds, half of them scans",
            seed=args.seed,
            score={"svm_scan": round(after, 3), "svm_scan_untrained": round(before, 3), "chamfer_l2": round(loss, 4)},
            extra={"num_points": POINTS},
        )
        bundle(entry, classifier.state_dict())


if __name__ == "__main__":
    main()
