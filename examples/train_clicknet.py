"""Train the bundled click models from simulated clicks on one CPU core.

    python examples/train_clicknet.py --steps 2800 --until 1143 --output runs/first.safetensors
    python examples/train_clicknet.py --start runs/first.safetensors --steps 850 --report 425 --lr 0.0012 \\
        --shares 0.6 0.1 0.03 0.27 --output runs/second.safetensors        # and further such rounds: RECIPES below has them all
    python benchmarks/interactive.py quality --weights runs/clicknet.safetensors
    python examples/train_clicknet.py --bundle runs/clicknet.safetensors      # add the measured file to mmkit.weights

The encoder is the bundled ImageNet MobileNetV2 and stays as it is; the decoder learns what ships: a look at the whole picture, a
window around what it found, a closer look, further clicks there. Objects are seen as the product sees them, or fill 0.3 to 80 % of the
first view, log-uniformly; a quarter of them is cut out and pasted on other photos. Data, all below `--data`: `seg_more`, the
unrestricted, CC-BY-2.0 and CC-BY-SA-2.0 pictures of `seg_coco`, `seg_pets` (CC-BY-SA-4.0), `pc_mosd` (BSD-3), and without masks
`fewshot_dreambooth` (CC-BY-4.0), `cls_clothing` (CC0) and `photos_more`: regions of similar color, found without supervision
(Felzenszwalb and Huttenlocher 2004), are further objects. `--permissive` leaves the share-alike pictures out ("clicknet-permissive"),
`--animals` brings cats and dogs back: those of `fewshot_dreambooth`, as the model of the round before finds them from clicks that were
set by hand. The same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkit.backbones import load_weights
from mmkit.devices import cpu_multiplies_bf16
from mmkit.storage import read_metadata, read_tensors, write_safetensors
from mmkit.training import FitConfig, fit
from mmkit.vision.clicks import (
    Bank,
    ClickNet,
    InteractiveSegmenter,
    SceneMaker,
    build_bank,
    clicknet_mobilenetv2,
    miou_at_k,
    simulate_clicks,
    two_look_loss,
)

Row = tuple[Image.Image, np.ndarray, list[dict]]
SHARE_ALIKE = ("CC-BY-SA-2.0",)
FREE = ("CC-BY-2.0", "no-known-copyright-restrictions", *SHARE_ALIKE)
"""Licenses of the COCO pictures that are trained on; the others of `seg_coco/train` only measure progress."""
PHOTO, PERMISSIVE = "clicknet-photo", "clicknet-permissive"
SHARES = "--shares 0.6 0.1 0.03 0.27"


class Recipe(NamedTuple):
    """How one of the bundled files was made: options of each round, the last of which writes runs/clicknet.safetensors."""

    rounds: tuple[str, ...]
    data: str
    license: str
    remark: str = ""

    def command(self, name: str) -> str:
        """From the data to the bundled file."""
        return " && ".join(
            (
                *(f"python examples/train_clicknet.py --data data --threads 1 {options}" for options in self.rounds),
                f"python benchmarks/interactive.py quality --own --name {name} --data data --weights runs/clicknet.safetensors",
                f"python examples/train_clicknet.py --name {name} --bundle runs/clicknet.safetensors",
                f"python benchmarks/interactive.py rating --record --name {name} --data data",
            )
        )


RECIPES = {
    PHOTO: Recipe(
        (
            "--steps 2800 --until 1143 --output runs/first.safetensors",
            f"--start runs/first.safetensors {SHARES} --lr 0.0012 --steps 850 --report 425 --output runs/second.safetensors",
            f"--start runs/second.safetensors {SHARES} --lr 0.0015 --steps 4200 --until 2120 --check 72 --output runs/third.safetensors",
            f"--start runs/third.safetensors {SHARES} --lr 0.0008 --steps 1000 --report 250 --check 72 --output runs/clicknet.safetensors",
        ),
        "COCO excerpts (CC-BY-2.0, CC-BY-SA-2.0 or unrestricted, 409 photos), Oxford-IIIT Pet excerpt (CC-BY-SA-4.0, 543 photos), mOSD "
        "table tops (BSD-3, 8 scenes); without masks DreamBooth subjects (CC-BY-4.0), clothes (CC0) and further COCO photos; encoder: "
        "MobileNetV2 trained by Google on ImageNet-1k",
        "CC-BY-SA-4.0 (trained on CC-BY-SA-4.0, CC-BY-SA-2.0, CC-BY-2.0, CC-BY-4.0, BSD-3 and CC0 pictures; encoder Apache-2.0)",
    ),
    PERMISSIVE: Recipe(
        (
            "--permissive --steps 2800 --until 1143 --output runs/first.safetensors",
            f"--permissive --start runs/first.safetensors {SHARES} --lr 0.0012 --steps 850 --report 425 --output runs/second.safetensors",
            f"--permissive --start runs/second.safetensors {SHARES} --lr 0.0015 --steps 4200 --until 1407 --check 72 "
            "--output runs/third.safetensors",
            "--permissive --animals --start runs/third.safetensors --shares 0.56 0.16 0.03 0.25 --lr 0.001 --steps 1300 --report 260 "
            "--check 72 --output runs/fourth.safetensors",
            "--permissive --animals --start runs/fourth.safetensors --shares 0.6 0.12 0.03 0.25 --lr 0.0012 --steps 1000 --report 500 "
            "--check 72 --output runs/clicknet.safetensors",
        ),
        "COCO excerpts (CC-BY-2.0 or unrestricted, 262 photos), DreamBooth subjects (CC-BY-4.0; cats and dogs on 36 photos, outlined from "
        "clicks), mOSD table tops (BSD-3, 8 scenes); without masks further DreamBooth subjects and COCO photos and clothes (CC0); "
        "encoder: MobileNetV2 trained by Google on ImageNet-1k",
        "Apache-2.0",
        "Made without share-alike pictures: clicknet-photo, whose license is CC-BY-SA, knows animals better. ",
    ),
}
SUMMARY = (
    "Click segmentation of photographs: an ImageNet MobileNetV2 sees each view at 224 pixels, a decoder of 1.6 M parameters answers the "
    "clicks. Of {objects} everyday objects {missed85} % do not reach 85 % overlap in 20 clicks, and {missed90} % not 90 %. One click "
    "overlaps {coco} % with everyday objects and {pets} % with pets, where GrabCut reaches {coco_cut} and {pets_cut} %. Small things in "
    "crowds and hair-fine outlines take several clicks. {remark}Load SAM or SAM 2 for demanding work."
)
ANIMALS = Path(__file__).with_name("clicknet_animals.json")
"""Clicks on 36 photos of eight cats and dogs, set by hand: x and y as shares of width and height, and 1 where it is the animal."""
HELD_BACK = 5
"""Every fifth fully labelled photo of `seg_more` is kept back; benchmarks/interactive.py fits the rating on them."""


def read_pets(folder: Path, split: str) -> list[Row]:
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


def read_coco(folder: Path, records: list[dict]) -> list[Row]:
    """Things, weighted so that no class outweighs the others by its number, and (rarely) stuff."""
    kinds = Counter(s["category"] for r in records for s in r["segments"])
    found = []
    for record in records:
        segments = np.array(Image.open(folder / record["mask"]))
        objects = []
        for s in record["segments"]:
            if s["iscrowd"] or (segments == s["id"]).sum() < 500:
                continue
            weight = kinds[s["category"]] ** -0.5 * (1.0 if s["isthing"] else 0.7)
            objects.append({"ids": (s["id"],), "unknown": (), "weight": weight, "thing": bool(s["isthing"])})
        found.append((Image.open(folder / record["image"]), segments, objects))
    return found


def coco_records(data: Path, permissive: bool) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and photos of other licenses that measure progress."""
    licenses = [name for name in FREE if not (permissive and name in SHARE_ALIKE)]
    first = json.loads((data / "seg_coco/train/annotations.json").read_text())
    more = json.loads((data / "seg_more/annotations.json").read_text())
    kept = {r["image"] for r in held_back(more)}
    more = [r for r in more if r["license"] in licenses and r["image"] not in kept]
    rows = read_coco(data / "seg_coco/train", [r for r in first if r["license"] in licenses])
    return rows + read_coco(data / "seg_more", more), read_coco(
        data / "seg_coco/train", [r for r in first if r["license"] not in FREE]
    )


def held_back(records: list[dict]) -> list[dict]:
    """The photos of `seg_more` that are not trained on."""
    return [r for r in records if r["annotation"] == "instances"][::HELD_BACK]


def read_tabletop(folder: Path) -> list[Row]:
    """Colored point clouds of table tops: each object surface is an object; invalid points are unknown."""
    found = []
    for path in sorted(folder.glob("*.npz")):
        scene = np.load(path)
        segments = scene["label"].astype(np.uint8)
        ids = [int(i) for i in np.unique(segments) if i >= 2 and (segments == i).sum() > 400]
        objects = [{"ids": (i,), "unknown": (0,), "weight": 1.0} for i in ids]
        found.append((Image.fromarray(scene["rgb"]), segments, objects))
    return found


def read_animals(data: Path, start: Path, band: int = 2) -> list[Row]:
    """Cats and dogs as the model `start` finds them from the clicks of `ANIMALS`; `band` pixels along the outline (id 2) are unknown."""
    from scipy.ndimage import binary_dilation, binary_erosion

    model, found = clicknet_mobilenetv2(), []
    load_file(model, start)
    segmenter = InteractiveSegmenter(model.eval(), device="cpu")
    for name, clicks in json.loads(ANIMALS.read_text()).items():
        image = Image.open(data / f"fewshot_dreambooth/{name}.jpg").convert("RGB")
        segmenter.set_image(image)
        for x, y, positive in clicks:
            mask = segmenter.add_click(x * image.width, y * image.height, bool(positive)).binary
        outer, inner = binary_dilation(mask, iterations=band), binary_erosion(mask, iterations=band, border_value=1)
        segments = np.where(inner, 1, np.where(outer, 2, 0)).astype(np.uint8)
        found.append((image, segments, [{"ids": (1,), "unknown": (2,), "weight": 1.0}]))
    return found


def load_file(model: ClickNet, path: Path) -> None:
    """The tensors of `path`, in full precision."""
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in read_tensors(path).items()})


def read_plain(data: Path, permissive: bool) -> list[Row]:
    """Free pictures without masks."""
    paths = sorted((data / "fewshot_dreambooth").glob("*/*.jpg"))
    paths += sorted((data / "cls_clothing").glob("train/*/*.jpg"))[::2]
    for row in csv.DictReader((data / "photos_more/index.csv").read_text().splitlines()):
        if row["license"] in FREE and not (permissive and row["license"] in SHARE_ALIKE):
            paths.append(data / "photos_more" / row["path"])
    images = [Image.open(path).convert("RGB") for path in paths]
    return [(image, np.zeros(image.size[::-1], np.uint8), []) for image in images]


def find_regions(rows: list[Row], cache: Path, side: int = 256) -> list[Row]:
    """Regions of similar color as objects, at one of three scales; parts of known objects are left out. Cached, for it is slow."""
    from skimage.segmentation import felzenszwalb

    images = [row[0].convert("RGB") for row in rows]
    for image in images:
        image.thumbnail((512, 512), Image.Resampling.BICUBIC)
    kept = dict(np.load(cache)) if cache.exists() else {}
    found = []
    for i, (image, (_, segments, objects)) in enumerate(zip(images, rows, strict=True)):
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.BICUBIC)
        if str(i) not in kept:
            kept[str(i)] = np.minimum(
                felzenszwalb(np.asarray(small), (150, 400, 1000)[i % 3], sigma=0.8, min_size=120) + 1, 255
            ).astype(np.uint8)
        ids = kept[str(i)]
        named = [j for o in objects if o.get("thing", True) for j in (*o["ids"], *o["unknown"])]
        things = np.asarray(Image.fromarray(np.isin(segments, named)).resize(small.size, Image.Resampling.NEAREST))
        area = np.bincount(ids.ravel(), minlength=256)
        part = np.bincount(ids[things], minlength=256) > 0.3 * area
        share = area / ids.size
        wanted = [int(j) for j in np.nonzero((share > 0.006) & (share < 0.7) & ~part)[0] if 0 < j < 255]
        found.append((image, ids, [{"ids": (j,), "unknown": (), "weight": share[j] ** 0.5} for j in wanted]))
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(cache, **kept)  # type: ignore[arg-type]
    return found


def read_bank(args: argparse.Namespace) -> tuple[Bank, dict[str, list[tuple]]]:
    """Training pictures, and held-out objects by name: picture, target, ignored pixels."""
    data, step = Path(args.data), 12 if args.smoke else 1
    photos, others = coco_records(data, args.permissive)
    pets = [] if args.permissive else read_pets(data / "seg_pets", "train")
    pets += read_animals(data, args.start) if args.animals else []
    photos, pets, plain = photos[::step], pets[::step], read_plain(data, args.permissive)[::step]
    cache = Path(args.output).with_suffix("") / ("regions_smoke.npz" if args.smoke else "regions.npz")
    table, regions = read_tabletop(data / "pc_mosd/train")[::step], find_regions([*photos, *plain], cache)
    groups = zip(args.shares, (photos, pets, table, regions), strict=True)
    bank = build_bank([(share, rows) for share, rows in groups if rows], args.canvas, torch.device("cpu"))
    held_out = {
        "coco": spaced(masks([(i, s, [o for o in objects if o["thing"]]) for i, s, objects in others]), args.check),
        "pets": spaced(masks(read_pets(data / "seg_pets", "val")), args.check // 2),
    }
    print(f"{len(bank.images)} pictures, {len(bank.owner)} objects", flush=True)
    return bank, held_out


def masks(rows: list[Row]) -> list[tuple]:
    """Picture, target and ignored pixels of every object above 1000 pixels."""
    found = []
    for image, segments, objects in rows:
        for o in objects:
            target = np.isin(segments, o["ids"])
            if target.sum() > 1000:
                found.append((image.convert("RGB"), target, np.isin(segments, o["unknown"])))
    return found


def spaced(items: list, count: int) -> list:
    """At most `count` items, spread evenly."""
    return items[:: max(1, len(items) // max(1, count))][:count]


def scores(model: ClickNet, held_out: dict[str, list[tuple]]) -> dict[str, float]:
    """Mean IoU after one and three clicks through the public segmenter."""
    segmenter, found = InteractiveSegmenter(model, device="cpu"), {}
    for name, examples in held_out.items():
        rows = []
        for image, target, ignore in examples:
            segmenter.set_image(image)
            rows.append(
                simulate_clicks(
                    lambda clicks: segmenter.add_click(clicks[-1].x, clicks[-1].y, clicks[-1].positive).binary,
                    target, max_clicks=3, ignore=ignore,
                )
            )  # fmt: skip
        found |= {f"{name}@{k}": miou_at_k(rows, k) for k in (1, 3)}
    return found


def train(args: argparse.Namespace) -> None:
    """Train, and write the averaged weights in half precision; a file that the same command wrote stays."""
    output, reached, command = Path(args.output), [0], f"python examples/train_clicknet.py {' '.join(sys.argv[1:])}"
    if output.is_file() and read_metadata(output).get("command") == command:
        print(f"{output} is finished.")
        return
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    bank, held_out = read_bank(args)
    model = clicknet_mobilenetv2().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    own = load_weights("mobilenetv2").state_dict()
    model.encoder.load_state_dict({k: own[k] for k in model.encoder.state_dict()})
    maker = SceneMaker(bank, model.img_size)
    model.standardise(torch.cat([maker.batch(8)[1][0][:, :3] for _ in range(8)]))
    if args.start:
        load_file(model, args.start)
    halved = cpu_multiplies_bf16()
    fast = copy.deepcopy(model.encoder).to(torch.bfloat16 if halved else torch.float32)

    def loss_fn(model: ClickNet, numbers: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The scenes are made here; the data set only counts them."""
        return two_look_loss(model, maker, len(numbers), fast)

    config = FitConfig(
        max_steps=args.steps, max_seconds=60 * args.minutes, batch_size=args.batch_size, lr=args.lr, min_lr=0.01 * args.lr,
        warmup_steps=round(0.03 * args.steps), ema_decay=0.998, mixed_precision="bf16" if halved else "no", checkpoint_every=args.report,
        monitor="coco@1", restore_best=False, weight_decay=0.02, seed=args.seed, device="cpu", progress=False,
    )  # fmt: skip
    result = fit(
        model,
        range(args.batch_size * args.report),
        list(held_out),
        loss_fn=loss_fn,
        metrics_fn=lambda model, loader: report(model, held_out),
        config=config,
        output_dir=output.with_suffix(""),
        on_step=lambda info: reached.append(info.step),
        should_stop=lambda: reached[-1] >= (args.until or args.steps),
    )
    if result.stopped not in ("finished", "max_seconds", "cancelled"):
        raise SystemExit(f"{result.stopped} after {result.steps} steps; the same command continues")
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    write_safetensors(output, half, {"command": command, "steps": str(result.steps)})
    print(f"wrote {output} after {result.steps} steps", flush=True)


def report(model: ClickNet, held_out: dict[str, list[tuple]]) -> dict[str, float]:
    """`scores`, printed."""
    found = scores(model, held_out)
    print(" ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)
    return found


def results_file(part: str, name: str) -> Path:
    """Where `benchmarks/interactive.py` writes a part about the click model `name`."""
    return (
        Path(__file__).parents[1] / f"benchmarks/results/interactive_{part}{'' if name == PHOTO else '_' + name}.json"
    )


def bundle_file(path: Path, name: str) -> None:
    """Add a trained file to the bundled weights, with the scores `benchmarks/interactive.py quality --weights` gave it."""
    from mmkit.weights import WeightEntry, bundle

    recipe, results = RECIPES[name], json.loads(results_file("quality", name).read_text())
    if results["weights sha256"] != hashlib.sha256(path.read_bytes()).hexdigest():
        raise SystemExit(
            f"First measure this file: python benchmarks/interactive.py quality --name {name} --weights {path}"
        )
    cut = json.loads(results_file("grabcut", PHOTO).read_text())["rows"]
    rows = results["rows"]
    coco = rows[f"coco test objects: {name}"]
    kinds = (("coco", "coco test objects"), ("pets", "pets test"))
    summary = SUMMARY.format(
        objects=coco["objects"],
        remark=recipe.remark,
        **{f"missed{t}": f"{100 * coco[f'NoF@{t}'] / coco['objects']:.0f}" for t in (85, 90)},
        **{k: f"{100 * rows[f'{kind}: {name}']['mIoU@1']:.0f}" for k, kind in kinds},
        **{f"{k}_cut": f"{100 * cut[f'{kind}: GrabCut']['mIoU@1']:.0f}" for k, kind in kinds},
    )
    score = {}
    for row, values in rows.items():
        data, method = row.split(": ")
        if method == name:
            score |= {f"{data} {k}": v for k, v in values.items()}
        elif method == "random walker":
            score |= {f"{data} {k}, random walker": v for k, v in values.items() if k.startswith("mIoU")}
    entry = bundle(
        WeightEntry(
            name=name, model="clicknet_mobilenetv2", config={}, summary=summary, license=recipe.license, command=recipe.command(name),
            data=recipe.data, seed=0, score=score,
        ),
        {k: v.float() if v.is_floating_point() else v for k, v in read_tensors(path).items()},
    )  # fmt: skip
    print(f"bundled {entry.file}, {entry.path.stat().st_size / 1e6:.1f} MB: {score}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("MMKIT_DATA_DIR", Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--data", default=default, help="folder with seg_pets, seg_coco, ... (default: MMKIT_DATA_DIR)")
    parser.add_argument("--output", default="runs/clicknet.safetensors")
    parser.add_argument(
        "--start", type=Path, help="a file of an earlier run to go on from, with a learning rate that falls anew"
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs=4,
        default=[0.48, 0.22, 0.04, 0.26],
        help="of photos, pets, table tops and regions",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: as torch chooses)")
    parser.add_argument("--steps", type=int, default=2800, help="the learning rate falls over these")
    parser.add_argument(
        "--until", type=int, default=0, help="stop after this step, and write what was averaged so far (0: at the end)"
    )
    parser.add_argument("--minutes", type=float, default=240, help="stop after this time, counted over all resumes")
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--canvas", type=int, default=448, help="side at which pictures are kept")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=int, default=350, help="steps between evaluations and checkpoints")
    parser.add_argument("--check", type=int, default=36, help="held-out everyday objects per evaluation")
    parser.add_argument("--permissive", action="store_true", help="leave out pictures under share-alike licenses")
    parser.add_argument(
        "--animals", action="store_true", help="train on the cats and dogs of fewshot_dreambooth too; needs --start"
    )
    parser.add_argument("--smoke", action="store_true", help="a few pictures only, to see that everything runs")
    parser.add_argument("--name", choices=RECIPES, default=PHOTO, help="of the file that --bundle adds")
    parser.add_argument("--bundle", type=Path, help="do not train: add this measured file to mmkit.weights")
    args = parser.parse_args()
    if args.animals and not args.start:
        parser.error("--animals needs --start: the model of an earlier round finds them.")
    if args.bundle:
        bundle_file(args.bundle, args.name)
    else:
        train(args)


if __name__ == "__main__":
    main()
