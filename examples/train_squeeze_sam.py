"""Train a small SqueezeSAM for photos (`squeeze_sam_photo`) from simulated clicks. The bundled click model is another: train_clicknet.py.

    python examples/train_squeeze_sam.py --data ../shared/data --minutes 120 --output runs/sam.safetensors

Data, all below `--data`: `seg_pets` (Oxford-IIIT Pet, CC-BY-SA-4.0), the CC-BY-2.0, CC-BY-SA-2.0 and unrestricted pictures
of `seg_coco`, `pc_mosd` (BSD-3), and without masks `fewshot_dreambooth` (CC-BY-4.0) and `cls_clothing` (CC0). Regions of
similar color, found in all of these without supervision (Felzenszwalb and Huttenlocher 2004), are further objects: they
teach the network to follow edges and clicks where nothing is a pet. Everything lies in memory; pictures are cropped,
composited, painted over with procedural objects and clicked there. The same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.segmentation import felzenszwalb
from torch import Tensor

from mmkit.storage import write_safetensors
from mmkit.training import FitConfig, fit
from mmkit.vision.clicks import (
    OBJECT,
    UNKNOWN,
    Bank,
    SceneSampler,
    SqueezeSAM,
    build_bank,
    distance_transform,
    iterative_loss,
    mask_iou,
    merge_held_objects,
    shown_mask,
    squeeze_sam_photo,
)
from mmkit.vision.clicks.model import MEAN

FREE = ("CC-BY-2.0", "CC-BY-SA-2.0", "no-known-copyright-restrictions")
"""Licenses of the COCO pictures that are trained on."""


OTHER = ("CC-BY-NC-2.0", "CC-BY-NC-SA-2.0")
"""Licenses of the COCO pictures that only measure progress."""


def read_pets(folder: Path, split: str) -> list[tuple[Image.Image, np.ndarray, list[dict]]]:
    """One object per photo; id 2 is the unknown band."""
    rows = csv.DictReader((folder / "index.csv").read_text().splitlines())
    found = []
    for row in rows:
        if row["split"] == split and row["mask"]:
            segments = np.array(Image.open(folder / row["mask"]))
            weight = 1.0 if row["balanced"] == "1" or split != "train" else 0.4  # three breeds hold half of the photos
            found.append(
                (Image.open(folder / row["path"]), segments, [{"ids": (1,), "unknown": (2,), "weight": weight}])
            )
    return found


def read_coco(folder: Path, licenses: tuple[str, ...]) -> list[tuple[Image.Image, np.ndarray, list[dict]]]:
    """Things, persons merged with what they hold, and (rarely) stuff."""
    found = []
    for record in json.loads((folder / "annotations.json").read_text()):
        if record["license"] not in licenses:
            continue
        segments = np.array(Image.open(folder / record["mask"]))
        things = [s for s in record["segments"] if s["isthing"] and not s["iscrowd"]]
        groups = merge_held_objects([segments == s["id"] for s in things], [s["category"] for s in things])
        held = {things[g[0]]["id"]: tuple(things[i]["id"] for i in g) for g in groups if len(g) > 1}
        objects = []
        for s in record["segments"]:
            area = int((segments == s["id"]).sum())
            if s["iscrowd"] or area < 1000:
                continue
            kind = {"ids": (s["id"],), "unknown": (), "thing": bool(s["isthing"])}
            objects.append({**kind, "weight": (1.0 if s["isthing"] else 0.15) * (0.4 if s["id"] in held else 1.0)})
            if s["id"] in held:
                objects.append({**kind, "ids": held[s["id"]], "weight": 1.0, "merged": True})
        found.append((Image.open(folder / record["image"]), segments, objects))
    return found


def read_tabletop(folder: Path) -> list[tuple[Image.Image, np.ndarray, list[dict]]]:
    """Colored point clouds of table tops: each object surface is an object; invalid points are unknown."""
    found = []
    for path in sorted(folder.glob("*.npz")):
        scene = np.load(path)
        segments = scene["label"].astype(np.uint8)
        ids = [int(i) for i in np.unique(segments) if i >= 2 and (segments == i).sum() > 400]
        found.append(
            (Image.fromarray(scene["rgb"]), segments, [{"ids": (i,), "unknown": (0,), "weight": 1.0} for i in ids])
        )
    return found


def read_backgrounds(data: Path, limit: int) -> list[tuple[Image.Image, np.ndarray, list[dict]]]:
    """Free pictures without masks."""
    paths = sorted((data / "fewshot_dreambooth").glob("*/*.jpg")) + sorted(
        (data / "cls_clothing").glob("train/*/*.jpg")
    )
    found = []
    for path in paths[:limit]:
        image = Image.open(path)
        found.append((image, np.zeros(image.size[::-1], np.uint8), []))
    return found


def find_regions(
    rows: list[tuple[Image.Image, np.ndarray, list[dict]]], side: int, scales: tuple[int, ...] = (400, 1000)
) -> list[tuple[Image.Image, np.ndarray, list[dict]]]:
    """Regions of similar color as objects, each picture once per scale; parts of the known objects `rows` are left out."""
    found = []
    for picture, segments, objects in rows:
        image = picture.convert("RGB")
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        named = [i for o in objects if o.get("thing", True) for i in (*o["ids"], *o["unknown"])]
        things = np.asarray(Image.fromarray(np.isin(segments, named)).resize(image.size, Image.Resampling.NEAREST))
        for scale in scales:
            ids = np.minimum(felzenszwalb(np.asarray(image), scale, sigma=0.8, min_size=250) + 1, 255).astype(np.uint8)
            area = np.bincount(ids.ravel(), minlength=256)
            part = np.bincount(ids[things], minlength=256) > 0.3 * area
            share = area / ids.size
            wanted = [int(i) for i in np.nonzero((share > 0.015) & (share < 0.6) & ~part)[0] if i < 255]
            found.append((image, ids, [{"ids": (i,), "unknown": (), "weight": share[i] ** 0.5} for i in wanted]))
    return found


@torch.no_grad()
def evaluate(
    model: SqueezeSAM, bank: Bank, clicks: tuple[int, ...] = (1, 3, 5), chunk: int = 32, limit: int = 10_000
) -> dict[str, float]:
    """Mean IoU after 1, 3 and 5 central clicks, at the network's resolution (benchmarks/interactive.py: at full)."""
    model.eval()
    device, mean = bank.images.device, torch.tensor(MEAN, device=bank.images.device).view(1, 3, 1, 1)
    found: dict[int, list[Tensor]] = {k: [] for k in clicks}
    for at in range(0, min(limit, len(bank.owner)), chunk):
        owner = bank.owner[at : at + chunk]
        n, side = len(owner), bank.maps.shape[-1]
        axis = torch.arange(side, device=device)
        size = bank.sizes[owner]
        inside = (axis.view(1, -1, 1) < size[:, 0, None, None]) & (axis.view(1, 1, -1) < size[:, 1, None, None])
        images = torch.where(inside[:, None], bank.images[owner].float() / 255, mean)
        kind = bank.table[at : at + chunk].gather(1, bank.maps[owner].flatten(1).long()).view(n, side, side)
        target, valid = kind == OBJECT, (kind != UNKNOWN) & inside
        prediction, previous = torch.zeros_like(target), None
        points = torch.zeros(n, 0, 2, device=device)
        labels = torch.zeros(n, 0, dtype=torch.long, device=device)
        for click in range(1, max(clicks) + 1):
            missed = distance_transform(target & ~prediction & valid)
            extra = distance_transform(prediction & ~target & valid)
            positive = missed.flatten(1).amax(1) > extra.flatten(1).amax(1)
            best = torch.where(positive[:, None], missed.flatten(1), extra.flatten(1)).argmax(dim=1)
            points = torch.cat([points, torch.stack([best % side, best // side], -1).float()[:, None]], dim=1)
            labels = torch.cat([labels, positive.long()[:, None]], dim=1)
            low, iou = model.forward_low_res(images, points[:, None], labels[:, None], previous)
            chosen = shown_mask(model, iou[:, 0])
            previous = low[torch.arange(n), 0, chosen][:, None].float()
            prediction = F.interpolate(previous, (side, side), mode="bilinear")[:, 0] > 0
            if click in found:
                found[click].append(mask_iou(prediction, target, valid))
    return {f"iou@{k}": torch.cat(v).mean().item() for k, v in found.items()}


def parameter_groups(model: SqueezeSAM) -> list[dict]:
    """The transformer and the heads learn at 15 % of the convolutions' rate.

    At the full rate the two-way blocks (which norm last) drown their input within a thousand steps: the bottleneck and the
    predicted IoU become the same for every picture.
    """
    heads = [*model.get_iou_predictions_and_mask_tokens.parameters(), *model.mask_decoder.parameters()]
    slow = {id(p) for p in heads}
    rest = [p for p in model.parameters() if id(p) not in slow]
    usual = {"betas": (0.9, 0.98), "weight_decay": 0.05}
    return [{"params": rest, **usual}, {"params": heads, "lr_scale": 0.15, **usual}]


def read_banks(args: argparse.Namespace, side: int) -> tuple[Bank, dict[str, Bank]]:
    """Training pictures, and held-out ones by name."""
    device, canvas = torch.device(args.device), 2 * side
    data, limit = Path(args.data), 40 if args.smoke else None
    pets, photos = read_pets(data / "seg_pets", "train")[:limit], read_coco(data / "seg_coco/train", FREE)
    free = read_backgrounds(data, limit or 10_000)
    groups = [
        (0.5, pets),
        (0.28, photos),
        (0.1, read_tabletop(data / "pc_mosd/train")),
        (0.12, find_regions([*photos, *free, *pets], canvas)),
    ]
    bank = build_bank([(share, rows) for share, rows in groups if rows], canvas, device)
    held_out = {
        "pets val": build_bank([(1.0, read_pets(data / "seg_pets", "val")[:limit])], side, device),
        "coco val": build_bank([(1.0, things(read_coco(data / "seg_coco/train", OTHER))[:limit])], side, device),
    }
    counts = ", ".join(f"{k}: {len(v.owner)}" for k, v in held_out.items())
    print(f"{len(bank.images)} pictures, {len(bank.owner)} objects; held out: {counts}")
    return bank, held_out


def train(args: argparse.Namespace) -> None:
    """Train, and write the averaged weights in half precision."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = squeeze_sam_photo(**({"img_size": args.size} if args.size else {})).to(
        device, memory_format=torch.channels_last
    )
    bank, held_out = read_banks(args, model.img_size)
    sampler = SceneSampler(bank, model.img_size)

    def loss_fn(model: SqueezeSAM, numbers: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The scenes are made here, on the accelerator; the data set only counts them."""
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            batch = sampler.sample(len(numbers))
        return iterative_loss(model, batch, max_rounds=args.max_rounds, start_clicks=6, alpha=0.5, focal_weight=10)

    def scores(model: SqueezeSAM, limit: int) -> dict[str, float]:
        return {
            f"{name} {k}": v for name, kept in held_out.items() for k, v in evaluate(model, kept, limit=limit).items()
        }

    output = Path(args.output)
    config = FitConfig(
        max_steps=args.steps, max_seconds=60 * args.minutes, batch_size=args.batch_size, lr=args.lr, min_lr=0.005 * args.lr,
        warmup_steps=round(0.03 * args.steps), ema_decay=0.999, mixed_precision="bf16", checkpoint_every=args.report,
        monitor="coco val iou@1", restore_best=False, seed=args.seed, device="cpu" if device.type == "cpu" else "auto",
    )  # fmt: skip
    result = fit(
        model,
        range(args.batch_size * args.report),
        list(held_out),
        loss_fn=loss_fn,
        metrics_fn=lambda model, loader: scores(model, 32),
        config=config,
        output_dir=output.with_suffix(""),
        parameter_groups=parameter_groups,
    )
    if result.stopped not in ("finished", "max_seconds"):
        raise SystemExit(f"{result.stopped} after {result.steps} steps; the same command continues")
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half().float())  # scores below are those of the stored, rounded weights
    final = scores(model, 64)
    print(f"final, {result.steps} steps: {pretty(final)}", flush=True)
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    options = f"--device {device.type} --steps {result.steps} --batch-size {args.batch_size} --seed {args.seed}"
    notes = {
        "command": f"python examples/train_squeeze_sam.py {options}",
        "steps": str(result.steps),
        "seed": str(args.seed),
    }
    write_safetensors(output, half, {**notes, "scores": json.dumps(final)})
    print(f"wrote {output}", flush=True)


def things(rows: list) -> list:
    """Only the unmerged things of each picture, as the benchmark uses them."""
    return [(i, s, [o for o in objects if o.get("thing") and not o.get("merged")]) for i, s, objects in rows]


def pretty(values: dict[str, float]) -> str:
    """Numbers with three decimals."""
    return " ".join(f"{k} {v:.3f}" for k, v in values.items())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("MMKIT_DATA_DIR", Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--data", default=default, help="folder with seg_pets, seg_coco, ... (default: MMKIT_DATA_DIR)")
    parser.add_argument("--output", default="runs/squeezesam-photo.safetensors")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: as torch chooses)")
    parser.add_argument("--steps", type=int, default=10_000, help="the learning rate falls over these")
    parser.add_argument("--minutes", type=float, default=240, help="stop after this time, counted over all resumes")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=0, help="another image size than the variant's own")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=int, default=200, help="steps between evaluations and checkpoints")
    parser.add_argument("--smoke", action="store_true", help="a few pictures only, to see that everything runs")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
