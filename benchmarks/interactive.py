"""Interactive segmentation: quality of the bundled photo model with simulated clicks, and what a click costs on a CPU.

    MMKIT_DATA_DIR=../shared/data python benchmarks/interactive.py quality
    MMKIT_DATA_DIR=../shared/data python benchmarks/interactive.py jitter    # first clicks elsewhere in the object
    MMKIT_DATA_DIR=../shared/data python benchmarks/interactive.py rating    # --record keeps the lines with the weights
    MMKIT_DATA_DIR=../shared/data python benchmarks/interactive.py grabcut   # needs opencv-python-headless
    python benchmarks/interactive.py cost             # --huge adds SAM ViT-H (about two minutes and 3 GB)

Quality: mean IoU after 1, 3 and 5 clicks and number of clicks to 85 and 90 % IoU (cap 20), clicks placed as RITM places them, on
objects of COCO test photos, Oxford pets test photos and BSDS500 regions; the baseline is scikit-image's random walker with the same
click rule. Jitter: the first click uniform among the pixels deeper than a third
of the object's greatest depth, three draws, in the spirit of RClicks (arXiv 2410.11722), whose own click maps are not used. Rating: how
far the model's own IoU estimate is from the truth on held-out objects that are none of these, before and after a line per number of
clicks, fitted on the other half of them. GrabCut: OpenCV's, one click. Cost: process CPU seconds on one thread, each reference measured
in the same run; random weights cost what trained ones do.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_clicknet import held_back, results_file

from mmkit import weights as bundled
from mmkit.backbones import load_weights
from mmkit.storage import load_state, read_tensors, write_json
from mmkit.vision.clicks import (
    Click,
    ClickNetEngine,
    InteractiveSegmenter,
    Mask,
    Rating,
    SqueezeSAM,
    calibration_error,
    clicknet_mobilenetv2,
    iou,
    miou_at_k,
    noc,
    simulate_clicks,
    squeeze_sam_base,
    squeeze_sam_small,
    squeeze_sam_tiny,
)
from mmkit.vision.clicks.rating import CLICKS

NAME = InteractiveSegmenter.default_weights
Example = tuple[str, Image.Image, np.ndarray, np.ndarray]


def coco_objects(data: Path) -> Iterator[Example]:
    """Non-crowd things above 1000 pixels of the test photos: name, picture, target, ignored pixels."""
    folder = data / "seg_coco/test"
    for record in json.loads((folder / "annotations.json").read_text()):
        image, ids = Image.open(folder / record["image"]).convert("RGB"), np.array(Image.open(folder / record["mask"]))
        for segment in record["segments"]:
            target = ids == segment["id"]
            if segment["isthing"] and not segment["iscrowd"] and target.sum() > 1000:
                yield f"{record['id']}/{segment['id']}", image, target, np.zeros_like(target)


def pets_objects(data: Path, split: str = "test") -> Iterator[Example]:
    """One animal per photo; the unknown band is ignored."""
    folder = data / "seg_pets"
    for row in csv.DictReader((folder / "index.csv").read_text().splitlines()):
        if row["split"] == split and row["mask"]:
            ids = np.array(Image.open(folder / row["mask"]))
            yield row["path"], Image.open(folder / row["path"]).convert("RGB"), ids == 1, ids == 2


def bsds_objects(data: Path) -> Iterator[Example]:
    """Human-drawn regions above 2 % of the picture."""
    for path in sorted((data / "seg_bsds/images").glob("*.jpg")):
        ids = np.array(Image.open(data / "seg_bsds/regions" / f"{path.stem}.png"))
        image = Image.open(path).convert("RGB")
        for k in np.unique(ids[ids > 0]):
            if (ids == k).mean() > 0.02:
                yield f"{path.stem}/{k}", image, ids == k, np.zeros(ids.shape, bool)


def held_out_objects(data: Path) -> list[Example]:
    """Objects that neither trained the model nor test it: of photos that the training script keeps back, and pets for validation."""
    folder, found = data / "seg_more", []
    for record in held_back(json.loads((folder / "annotations.json").read_text())):
        ids = np.array(Image.open(folder / record["mask"]))
        image = Image.open(folder / record["image"]).convert("RGB")
        things = [ids == s["id"] for s in record["segments"] if s["isthing"] and not s["iscrowd"]]
        for k, target in enumerate([t for t in things if t.sum() > 1000][:3]):
            found.append((f"{record['id']}/{k}", image, target, np.zeros_like(target)))
    return found + list(pets_objects(data, "val"))


SETS: dict[str, Callable[[Path], Iterator[Example]]] = {
    "coco test objects": coco_objects,
    "pets test": pets_objects,
    "bsds regions": bsds_objects,
}


def random_walker_predictor(image: Image.Image, side: int = 128) -> Callable[[list[Click]], np.ndarray]:
    """scikit-image's random walker at `side` pixels; the picture's border counts as background until a click says otherwise."""
    from skimage.segmentation import random_walker

    scale = side / max(image.size)
    small = np.asarray(image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.BOX)) / 255.0

    def predict(clicks: list[Click]) -> np.ndarray:
        seeds = np.zeros(small.shape[:2], np.int64)
        seeds[[0, -1]], seeds[:, [0, -1]] = 2, 2
        rows, cols = np.indices(seeds.shape)
        for click in clicks:
            near = (cols - click.x * scale) ** 2 + (rows - click.y * scale) ** 2 <= 2.5**2
            seeds[near] = 1 if click.positive else 2
        if (seeds == 1).sum() == 0:
            return np.zeros(image.size[::-1], bool)
        inside = random_walker(small, seeds, beta=300, mode="cg_j", tol=1e-2, channel_axis=-1, return_full_prob=True)[0]
        return (
            np.asarray(Image.fromarray(inside.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)) > 0.5
        )

    return predict


def grabcut_predictor(image: Image.Image, side: int = 256) -> Callable[[list[Click]], np.ndarray]:
    """OpenCV's GrabCut at `side` pixels: the clicks are sure, the border probably background, all else probably the object."""
    import cv2

    scale = side / max(image.size)
    small = np.asarray(image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.BOX))[
        ..., ::-1
    ].copy()

    def predict(clicks: list[Click]) -> np.ndarray:
        kinds = np.full(small.shape[:2], cv2.GC_PR_FGD, np.uint8)
        edge = max(2, side // 16)
        kinds[:edge], kinds[-edge:], kinds[:, :edge], kinds[:, -edge:] = (cv2.GC_PR_BGD,) * 4
        rows, cols = np.indices(kinds.shape)
        for click in clicks:
            near = (cols - click.x * scale) ** 2 + (rows - click.y * scale) ** 2 <= (side / 32) ** 2
            kinds[near] = cv2.GC_FGD if click.positive else cv2.GC_BGD
        cv2.setRNGSeed(0)
        cv2.grabCut(small, kinds, None, np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_MASK)
        inside = ((kinds == cv2.GC_FGD) | (kinds == cv2.GC_PR_FGD)).astype(np.float32)
        return np.asarray(Image.fromarray(inside).resize(image.size, Image.Resampling.BILINEAR)) > 0.5

    return predict


def grabcut(data: Path, weights: Path | None, limit: int, own: bool, name: str = NAME) -> dict[str, dict[str, Any]]:
    """Mean IoU of GrabCut after one click, beside the model's."""
    session, table = SessionPredictor(segmenter_of(weights, name)), {}
    for kind, read in SETS.items():
        examples = spaced(list(read(data)), limit)
        methods = {name: session.start, "GrabCut": lambda _, image: grabcut_predictor(image)}
        for method, start in list(methods.items())[: 1 if own else 2]:
            rows = [
                simulate_clicks(start(label, image), target, max_clicks=1, ignore=ignore)
                for label, image, target, ignore in tqdm(examples, desc=f"{kind}, {method}", mininterval=5)
            ]
            table[f"{kind}: {method}"] = {"mIoU@1": round(miou_at_k(rows, 1), 4), "objects": len(rows)}
    return table


def rating(data: Path, limit: int, keep: bool, name: str = NAME) -> tuple[dict[str, dict[str, Any]], Rating]:
    """Calibration error of the model's estimate on one half of the held-out objects, with lines fitted on the other half."""
    segmenter, rows = InteractiveSegmenter(ClickNetEngine(load_weights(name))), []
    examples = spaced(held_out_objects(data), limit)
    for number, (_, image, target, ignore) in enumerate(tqdm(examples, desc="held-out objects", mininterval=5)):
        segmenter.set_image(image)
        masks: list[Mask] = []

        def predict(clicks: list[Click], masks: list[Mask] = masks) -> np.ndarray:
            masks.append(segmenter.add_click(clicks[-1].x, clicks[-1].y, clicks[-1].positive))
            return masks[-1].binary

        measured, estimates = simulate_clicks(predict, target, max_clicks=6, ignore=ignore), [m.iou for m in masks]
        rows += [(number % 2, k, e, m) for k, (e, m) in enumerate(zip(estimates, measured, strict=False), 1)]
    half = [[r for r in rows if r[0] == part] for part in (0, 1)]
    line = Rating.fit([r[2] for r in half[0]], [r[3] for r in half[0]], [r[1] for r in half[0]])
    table = {}
    for count in range(1, CLICKS + 1):
        own = [r for r in half[1] if min(r[1], CLICKS) == count]
        raw, true = [r[2] for r in own], [r[3] for r in own]
        put_right = line(torch.tensor(raw)[:, None], torch.full((len(own),), count))[:, 0].tolist()
        table[f"click {count}" if count < CLICKS else f"clicks {CLICKS} to 6"] = {
            "measured IoU": round(float(np.mean(true)), 3),
            "the model's estimate": round(float(np.mean(raw)), 3),
            "its calibration error": round(calibration_error(raw, true), 3),
            "put right": round(float(np.mean(put_right)), 3),
            "its calibration error then": round(calibration_error(put_right, true), 3),
            "correlation": round(float(np.corrcoef(raw, true)[0, 1]), 3),
            "masks": len(own),
        }
    if keep:
        entry = bundled.weight_entry(name)
        bundled.record(dataclasses.replace(entry, extra={**entry.extra, "rating": line.to_dict()}))
    return table, line


class SessionPredictor:
    """Feeds simulated clicks to an `InteractiveSegmenter` one at a time, as a user would."""

    def __init__(self, segmenter: InteractiveSegmenter):
        self.segmenter, self.shown = segmenter, None

    def start(self, name: str, image: Image.Image) -> Callable[[list[Click]], np.ndarray]:
        """The predictor for one object."""
        if self.shown is not image:
            self.segmenter.set_image(image)
            self.shown = image
        self.segmenter.reset()
        return lambda clicks: self.segmenter.add_click(clicks[-1].x, clicks[-1].y, clicks[-1].positive).binary


def play(
    examples: list[Example], start: Callable[[str, Image.Image], Callable[[list[Click]], np.ndarray]], title: str
) -> list[list[float]]:
    """IoU after each click on each object: at least 5 clicks, then on until 90 % IoU or 20 clicks."""
    return [
        simulate_clicks(start(name, image), target, min_clicks=5, ignore=ignore, stop_at=0.9)
        for name, image, target, ignore in tqdm(examples, desc=title, mininterval=5)
    ]


def summary(rows: list[list[float]]) -> dict[str, Any]:
    """The metrics of some objects."""
    (noc85, nof85), (noc90, nof90) = noc(rows, 0.85), noc(rows, 0.90)
    found = {f"mIoU@{k}": miou_at_k(rows, k) for k in (1, 3, 5)}
    found |= {"NoC@85": noc85, "NoF@85": nof85, "NoC@90": noc90, "NoF@90": nof90, "objects": len(rows)}
    return {k: round(v, 4) for k, v in found.items()}


def segmenter_of(weights: Path | None, name: str = NAME) -> InteractiveSegmenter:
    """The bundled model `name`, or the one of a training script's file."""
    if weights is None:
        return InteractiveSegmenter(name, device="cpu")
    model = clicknet_mobilenetv2()
    load_state(model, {k: v.float() if v.is_floating_point() else v for k, v in read_tensors(weights).items()})
    return InteractiveSegmenter(model, device="cpu")


def jitter(data: Path, weights: Path | None, limit: int, name: str = NAME, draws: int = 3) -> dict[str, dict[str, Any]]:
    """Mean IoU after one click in the middle of the object, and after one elsewhere in it."""
    session, table = SessionPredictor(segmenter_of(weights, name)), {}
    for kind, read in SETS.items():
        rng, middle, elsewhere = np.random.default_rng(0), [], []
        examples = spaced(list(read(data)), limit)
        for label, image, target, ignore in tqdm(examples, desc=kind, mininterval=5):
            predict = session.start(label, image)
            middle += simulate_clicks(predict, target, max_clicks=1, ignore=ignore)
            depth = ndimage.distance_transform_edt(np.pad(target & ~ignore, 1))[1:-1, 1:-1]
            spots = np.argwhere(depth > depth.max() / 3)
            for y, x in spots[rng.integers(len(spots), size=draws)].tolist():
                predict = session.start(label, image)
                elsewhere.append(iou(predict([Click(x, y)]), target, ignore))
        row = {"mIoU@1, middle": float(np.mean(middle)), "mIoU@1, elsewhere": float(np.mean(elsewhere))}
        row["lost"] = row["mIoU@1, middle"] - row["mIoU@1, elsewhere"]
        table[kind] = {**{k: round(v, 4) for k, v in row.items()}, "objects": len(examples), "draws": draws}
    return table


def quality(
    data: Path, weights: Path | None, limit: int, baseline: int, name: str = NAME
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Rows by "set / method", and each object's IoU after one click by set.

    `limit` objects per set at most (evenly spaced), the baseline on `baseline` of them.
    """
    session, first = SessionPredictor(segmenter_of(weights, name)), {}
    table: dict[str, dict[str, Any]] = {}
    for kind, read in SETS.items():
        examples = spaced(list(read(data)), limit)
        rows = play(examples, session.start, kind)
        table[f"{kind}: {name}"] = summary(rows)
        first[kind] = [round(row[0], 4) for row in rows]
        if baseline:
            few = spaced(list(range(len(examples))), baseline)
            walker = play(
                [examples[i] for i in few], lambda _, image: random_walker_predictor(image), f"{kind}, random walker"
            )
            if len(few) < len(examples):
                kind = f"{kind}, {len(few)} of them"
                table[f"{kind}: {name}"] = summary([rows[i] for i in few])
            table[f"{kind}: random walker"] = summary(walker)
    return table, first


def spaced(items: list[Any], count: int) -> list[Any]:
    """`count` items spread evenly (all for 0)."""
    if not count or count >= len(items):
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def cpu_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Least process CPU time of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


@torch.inference_mode()
def cost(huge: bool, repeats: int) -> dict[str, dict[str, Any]]:
    """CPU seconds for the picture (once) and for each click, one thread.

    The TinyViT here halves the resolution once more than MobileSAM's does in its last stage: 27.4 instead of 38.8 GMAC.
    """
    import timm
    from transformers import SamConfig, SamModel, SamVisionConfig, SamVisionModel

    torch.set_num_threads(1)
    picture = torch.rand(1, 3, 1024, 1024)
    rows: dict[str, dict[str, Any]] = {}
    sam = SamModel(SamConfig(vision_config=SamVisionConfig(num_hidden_layers=1, global_attn_indexes=[0]))).eval()
    embedding = torch.randn(1, 256, 64, 64)
    click = {"input_points": torch.tensor([[[[500.0, 500.0]]]]), "input_labels": torch.tensor([[[1]]])}
    decoder = cpu_seconds(lambda: sam(image_embeddings=embedding, **click), repeats)
    builders: dict[str, Callable[[], SqueezeSAM]] = {
        "SqueezeSAM base, 512": squeeze_sam_base,
        "SqueezeSAM small, 512": squeeze_sam_small,
        "SqueezeSAM tiny, 512": squeeze_sam_tiny,
    }
    models = {name: build().eval() for name, build in builders.items()}
    points, labels = torch.tensor([[[[500.0, 500.0]]]]), torch.tensor([[[1]]])
    encoders: dict[str, Any] = {
        "TinyViT 5M encoder, 1024 (MobileSAM-like)": timm.create_model("tiny_vit_5m_224", num_classes=0),
        "SAM ViT-B encoder, 1024": SamVisionModel(SamVisionConfig()),
    }
    for name, model in tqdm({**models, **encoders}.items(), desc="cost"):
        model.eval()
        if isinstance(model, SqueezeSAM):
            seconds = cpu_seconds(lambda model=model: model(picture, points, labels), repeats)
            rows[name] = {"picture": 0.0, "click": seconds}
        else:
            run = model.forward_features if name.startswith("Tiny") else model
            times = repeats if name.startswith("Tiny") else 1
            rows[name] = {"picture": cpu_seconds(lambda run=run: run(picture), times), "click": decoder}
    if huge:
        config = SamVisionConfig(
            hidden_size=1280,
            num_hidden_layers=32,
            num_attention_heads=16,
            mlp_dim=5120,
            global_attn_indexes=[7, 15, 23, 31],
        )
        model = SamVisionModel(config).eval()
        rows["SAM ViT-H encoder, 1024"] = {"picture": cpu_seconds(lambda: model(picture), 1), "click": decoder}
    rows["ClickNet (bundled), 224"] = bundled_cost(repeats)
    base = rows["SqueezeSAM base, 512"]["click"]
    for row in rows.values():
        row["first mask"] = row["picture"] + row["click"]
        row["5 clicks"] = row["picture"] + 5 * row["click"]
        row["20 clicks"] = row["picture"] + 20 * row["click"]
        row["picture vs one base click"] = row["picture"] / base
    return {name: {k: round(v, 4) for k, v in row.items()} for name, row in rows.items()}


def bundled_cost(repeats: int) -> dict[str, Any]:
    """CPU seconds of the bundled model through the public segmenter: the picture, and a first click (two looks)."""
    segmenter = InteractiveSegmenter(device="cpu")
    picture = np.random.default_rng(0).integers(0, 255, (768, 1024, 3), np.uint8)
    seconds = cpu_seconds(lambda: segmenter.set_image(picture), repeats)
    times = []
    for _ in range(repeats):
        segmenter.set_image(picture)  # forgets the views of the last click
        times.append(cpu_seconds(lambda: segmenter.add_click(500, 300), 1))
    return {"picture": seconds, "click": min(times)}


def show(table: dict[str, dict[str, Any]]) -> str:
    """A markdown table."""
    columns = list(next(iter(table.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{row[c]:.3g}" for c in columns) + " |" for name, row in table.items()]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["quality", "jitter", "rating", "grabcut", "cost"])
    default = os.environ.get("MMKIT_DATA_DIR", Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--limit", type=int, default=0, help="objects per set (0: all)")
    parser.add_argument("--baseline", type=int, default=1000, help="objects per set for the random walker (0: none)")
    parser.add_argument(
        "--weights", type=Path, help="a file of examples/train_clicknet.py instead of the bundled weights"
    )
    parser.add_argument(
        "--name", default=NAME, help="of the bundled weights, or what those of --weights will be called"
    )
    parser.add_argument("--own", action="store_true", help="the other methods' rows stay as an earlier run wrote them")
    parser.add_argument("--record", action="store_true", help="keep the fitted rating in the manifest")
    parser.add_argument("--huge", action="store_true", help="also measure SAM ViT-H")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.part == "cost" and args.name != NAME:
        parser.error("--name means nothing for cost, which does not depend on the weights")
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    if args.part == "quality":
        baseline = 0 if args.own else args.baseline
        table, found["first clicks"] = quality(args.data, args.weights, args.limit, baseline, args.name)
    elif args.part == "jitter":
        table = jitter(args.data, args.weights, args.limit, args.name)
    elif args.part == "rating":
        table, line = rating(args.data, args.limit, args.record, args.name)
        found["rating"] = line.to_dict()
    elif args.part == "grabcut":
        table = grabcut(args.data, args.weights, args.limit, args.own, args.name)
    else:
        table = cost(args.huge, args.repeats)
    usual, target = results_file(args.part, NAME), results_file(args.part, args.name)
    if args.own and usual.exists():
        rows = json.loads(usual.read_text())["rows"]
        table |= {k: v for k, v in rows.items() if k.endswith((": random walker", ": GrabCut"))}
    print(show(table))
    about: dict[str, Any] = {
        "torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count(), "device": "cpu",
        "limit": args.limit, "repeats": args.repeats,
    }  # fmt: skip
    if args.part in ("quality", "jitter"):
        file = args.weights or bundled.weight_entry(args.name).path
        about["weights sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    write_json(target, {**about, **found, "rows": table})
    target.with_suffix(".md").write_text(show(table) + "\n")


if __name__ == "__main__":
    main()
