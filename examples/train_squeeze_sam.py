"""Train the bundled photo model of SqueezeSAM ("squeezesam-photo") from simulated clicks.

    python examples/train_squeeze_sam.py --data ../shared/data --minutes 120 --output runs/sam.safetensors
    python benchmarks/interactive.py quality --weights runs/sam.safetensors
    python examples/train_squeeze_sam.py --bundle runs/sam.safetensors      # add the measured file to mmkit.weights

Data, all below `--data`: `seg_pets` (Oxford-IIIT Pet, CC-BY-SA-4.0), the CC-BY-2.0, CC-BY-SA-2.0 and unrestricted pictures
of `seg_coco`, `pc_mosd` (BSD-3), and without masks `fewshot_dreambooth` (CC-BY-4.0) and `cls_clothing` (CC0). Regions of
similar color, found in all of these without supervision (Felzenszwalb and Huttenlocher 2004), are further objects: they
teach the network to follow edges and clicks where nothing is a pet. Everything lies in memory; pictures are cropped,
composited, painted over with procedural objects and clicked there. The same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.segmentation import felzenszwalb
from torch import Tensor

from mmkit.storage import read_tensors, write_safetensors
from mmkit.training import FitConfig, fit
from mmkit.vision.clicks import (
    SqueezeSAM,
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
SUMMARY = (
    "Click segmentation at 128 pixels, trained for less than two hours on one CPU core, mostly on cats and dogs. The first click "
    "gets large objects that stand out; most others take a few corrections, and fine outlines stay soft. Load SAM or SAM 2 for "
    "demanding work."
)
BACKGROUND, OBJECT, UNKNOWN = 0, 1, 2


@dataclass
class Bank:
    """Pictures and their objects on square canvases, in the accelerator's memory.

    Attributes:
        images: uint8 `(I, 3, S, S)`, the picture at the top left; sizes `(I, 2)` its height and width. S may exceed the
            side of the network, so that crops around small objects stay sharp.
        maps: uint8 `(I, S, S)` segment ids.
        owner: `(O,)` picture of each object; table: uint8 `(O, 256)` segment id -> background, object or unknown.
        boxes: `(O, 4)` x0, y0, x1, y1 of each object; weight: `(O,)` sampling weight.
    """

    images: Tensor
    sizes: Tensor
    maps: Tensor
    owner: Tensor
    table: Tensor
    boxes: Tensor
    weight: Tensor


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


def build_bank(groups: list[tuple[float, list]], side: int, device: torch.device) -> Bank:
    """Canvases of all pictures; each group's objects share its sampling weight."""
    images, sizes, maps, owner, table, boxes, weight = [], [], [], [], [], [], []
    for share, rows in groups:
        total = sum(o["weight"] for _, _, objects in rows for o in objects) or 1.0
        for image, segments, objects in rows:
            scale = side / max(image.size)
            w, h = (max(1, round(x * scale)) for x in image.size)
            canvas, ids = np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.uint8)
            canvas[:h, :w] = np.asarray(image.convert("RGB").resize((w, h), Image.Resampling.BICUBIC))
            ids[:h, :w] = np.asarray(Image.fromarray(segments).resize((w, h), Image.Resampling.NEAREST))
            for o in objects:
                ys, xs = np.nonzero(np.isin(ids, list(o["ids"])))
                if len(ys) < 40:
                    continue
                row = np.zeros(256, np.uint8)
                row[list(o["unknown"])], row[list(o["ids"])] = UNKNOWN, OBJECT
                owner.append(len(images))
                table.append(row)
                boxes.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                weight.append(share * o["weight"] / total)
            images.append(canvas)
            sizes.append([h, w])
            maps.append(ids)
    return Bank(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(device),
        torch.tensor(sizes, dtype=torch.float32, device=device),
        torch.from_numpy(np.stack(maps)).to(device),
        torch.tensor(owner, device=device),
        torch.from_numpy(np.stack(table)).to(device),
        torch.tensor(np.array(boxes), dtype=torch.float32, device=device),
        torch.tensor(weight, device=device),
    )


class SceneSampler:
    """Batches of training pictures, made on the accelerator from a `Bank`."""

    def __init__(self, bank: Bank, side: int):
        self.bank, self.side, self.device = bank, side, bank.images.device
        self.canvas = bank.images.shape[-1]
        self.mean = torch.tensor(MEAN, device=self.device).view(1, 3, 1, 1)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform random numbers on the device."""
        return torch.rand(*shape, device=self.device) * (high - low) + low

    def crop(self, picture: Tensor, center: Tensor, extent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Random affine crops: pictures `(N, 3, S, S)` in 0..1, segment ids `(N, S, S)`, inside-the-picture masks.

        `center` `(N, 2)` x, y and `extent` `(N,)`, the side of the crop, are in canvas pixels.
        """
        n, side = len(picture), self.side
        angle = torch.randn(n, device=self.device) * 0.14
        stretch = self.uniform(n, low=-0.16, high=0.16).exp()
        flip = torch.where(self.uniform(n) < 0.5, -1.0, 1.0)
        cos, sin = angle.cos(), angle.sin()
        theta = torch.stack(
            [
                torch.stack([flip * cos * stretch, -sin / stretch], dim=-1),
                torch.stack([flip * sin * stretch, cos / stretch], dim=-1),
            ],
            dim=1,
        )
        theta = theta * (extent / self.canvas)[:, None, None]
        theta = torch.cat([theta, (2 * center / self.canvas - 1)[..., None]], dim=-1)
        grid = F.affine_grid(theta, [n, 3, side, side], align_corners=False)
        fine = self.bank.images[picture].float() / 255
        images = F.grid_sample(fine, grid, align_corners=False)
        if self.canvas > side:  # large extents from a coarser copy: bilinear sampling alone would alias
            coarse = F.grid_sample(F.avg_pool2d(fine, self.canvas // side), grid, align_corners=False)
            images = torch.where((extent > 1.25 * side)[:, None, None, None], coarse, images)
        ids = F.grid_sample(self.bank.maps[picture][:, None].float(), grid, mode="nearest", align_corners=False)[:, 0]
        limit = 2 * self.bank.sizes[picture].flip(1) / self.canvas - 1
        inside = (grid >= -1).all(-1) & (grid <= limit[:, None, None]).all(-1)
        return images, ids.long(), inside

    def objects(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Crops around objects: pictures, target, known and inside, all `(N, S, S)` but the first."""
        bank = self.bank
        choice = torch.multinomial(bank.weight, n, replacement=True)
        picture, box = bank.owner[choice], bank.boxes[choice]
        size = bank.sizes[picture]
        largest = (box[:, 2:] - box[:, :2]).amax(dim=1)
        middle = (box[:, 2:] + box[:, :2]) / 2
        whole = self.uniform(n) < 0.4
        near = largest * self.uniform(n, low=math.log(1.1), high=math.log(4.0)).exp()
        extent = self.canvas * self.uniform(n, low=0.75, high=1.3)
        extent = torch.where(whole, extent, near.clamp(64, 1.2 * self.canvas))
        offset = (self.uniform(n, 2) - 0.5) * ((extent - largest).clamp(min=0.1 * extent))[:, None]
        center = torch.where(
            whole[:, None], size.flip(1) / 2 + (self.uniform(n, 2) - 0.5) * 0.4 * self.canvas, middle + offset
        )
        images, ids, inside = self.crop(picture, center, extent)
        kind = bank.table[choice].gather(1, ids.flatten(1)).view_as(ids)
        return images, (kind == OBJECT) & inside, (kind != UNKNOWN) & inside, inside

    def backgrounds(self, n: int) -> Tensor:
        """Random crops that lie mostly inside a picture, without padding visible: `(N, 3, S, S)`."""
        picture = torch.randint(len(self.bank.images), (n,), device=self.device)
        size = self.bank.sizes[picture].flip(1)
        extent = size.amin(dim=1) * self.uniform(n, low=0.3, high=0.85)
        center = extent[:, None] / 2 + self.uniform(n, 2) * (size - extent[:, None])
        images, _, inside = self.crop(picture, center, extent)
        return torch.where(inside[:, None], images, self.mean)

    def shapes(self, n: int, size_low: float, size_high: float) -> Tensor:
        """Random star-shaped blobs, soft-edged alpha `(N, S, S)`."""
        axis = torch.linspace(0, 1, self.side, device=self.device)
        x = axis.view(1, 1, -1) - self.uniform(n, 1, 1, low=0.1, high=0.9)
        y = axis.view(1, -1, 1) - self.uniform(n, 1, 1, low=0.1, high=0.9)
        turn, aspect = self.uniform(n, 1, 1, high=6.3), self.uniform(n, 1, 1, low=-0.8, high=0.8).exp()
        u, v = (x * turn.cos() + y * turn.sin()) * aspect, (y * turn.cos() - x * turn.sin()) / aspect
        angle = torch.atan2(v, u)
        radius = torch.ones_like(angle)
        for k in range(1, 7):
            strength = self.uniform(n, 1, 1) * 0.5 / k
            radius = radius + strength * (k * angle + self.uniform(n, 1, 1, high=6.3)).cos()
        power = torch.where(self.uniform(n, 1, 1) < 0.3, 8.0, 2.0)  # some squarish ones
        reach = (u.abs() ** power + v.abs() ** power) ** (1 / power)
        scale = self.uniform(n, 1, 1, low=math.log(size_low), high=math.log(size_high)).exp()
        return ((scale * radius.clamp(min=0.2) - reach) * self.side / 1.5 + 0.5).clamp(0, 1)

    def paint(self, n: int) -> Tensor:
        """Surfaces for procedural objects: photo texture, or a color with a gradient and stripes: `(N, 3, S, S)`."""
        photo = self.backgrounds(n)
        axis = torch.linspace(-1, 1, self.side, device=self.device)
        wave = axis.view(1, 1, 1, -1) * self.uniform(n, 3, 1, 1, low=-1) + axis.view(1, 1, -1, 1) * self.uniform(
            n, 3, 1, 1, low=-1
        )
        stripes = (wave[:, :1] * self.uniform(n, 1, 1, 1, low=5, high=60)).sin() * self.uniform(n, 1, 1, 1, high=0.15)
        flat = self.uniform(n, 3, 1, 1) + 0.3 * wave + stripes
        tint = (photo - photo.mean(dim=(2, 3), keepdim=True)) * 0.8 + self.uniform(n, 3, 1, 1)
        kind = self.uniform(n, 1, 1, 1)
        return torch.where(kind < 0.4, photo, torch.where(kind < 0.7, tint, flat)).clamp(0, 1)

    def procedural(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Layered objects, half of them made of parts in different colors (the target is the whole)."""
        images = self.backgrounds(n)
        ids = torch.zeros(n, self.side, self.side, dtype=torch.long, device=self.device)
        layers = int(torch.randint(3, 8, ()))
        for layer in range(1, layers + 1):
            alpha = self.shapes(n, 0.06, 0.32)
            surface = self.paint(n)
            if layer % 2:  # a second part, cut by the first one's outline or attached to it
                part = self.shapes(n, 0.1, 0.3)
                surface = torch.where(part[:, None] > 0.5, self.paint(n), surface)
            shade = 1 + 0.25 * (self.uniform(n, 1, 1, 1) - 0.5)
            images = images * (1 - alpha[:, None]) + (surface * shade).clamp(0, 1) * alpha[:, None]
            ids = torch.where(alpha > 0.5, layer, ids)
        wanted = torch.randint(1, layers + 1, (n, 1, 1), device=self.device)
        known = torch.ones_like(ids, dtype=torch.bool)
        return images, ids == wanted, known, known

    def sample(
        self, n: int, procedural: float = 0.15, composite: float = 0.25, distractor: float = 0.15
    ) -> dict[str, Tensor]:
        """A batch: "image" `(n, 3, S, S)` in 0..1, "target" and "valid" bool `(n, S, S)`."""
        drawn = round(n * procedural)
        images, target, known, inside = self.objects(n - drawn)
        pasted = (self.uniform(n - drawn, 1, 1) < composite) & target.flatten(1).any(1)[:, None, None]
        alpha = F.avg_pool2d(target[:, None].float(), 3, stride=1, padding=1)
        both = torch.where(pasted[..., None], images * alpha + self.backgrounds(n - drawn) * (1 - alpha), images)
        images, known, inside = both, known | pasted, inside | pasted
        if drawn:
            more = self.procedural(drawn)
            images, target, known, inside = (
                torch.cat(pair) for pair in zip((images, target, known, inside), more, strict=True)
            )
        images, target, known = self.occlude(images, target, known, inside, distractor)
        images = self.recolor(images)
        images = torch.where(inside[:, None], images, self.mean)
        valid = known & inside & (target.flatten(1).sum(1) >= 64)[:, None, None]
        return {"image": images, "target": target & valid, "valid": valid}

    def occlude(
        self, images: Tensor, target: Tensor, known: Tensor, inside: Tensor, share: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Paste cut-outs of other samples of the batch, in front of or behind the target."""
        n = len(images)
        cut = F.avg_pool2d(target.roll(1, 0)[:, None].float(), 3, stride=1, padding=1)
        theta = torch.zeros(n, 2, 3, device=self.device)
        theta[:, 0, 0] = self.uniform(n, low=0.9, high=2.5) * torch.where(self.uniform(n) < 0.5, -1.0, 1.0)
        theta[:, 1, 1] = theta[:, 0, 0].abs()
        theta[:, :, 2] = self.uniform(n, 2, low=-1.5, high=1.5)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        other = F.grid_sample(torch.cat([images.roll(1, 0), cut], dim=1), grid, align_corners=False)
        alpha = other[:, 3:] * (self.uniform(n, 1, 1, 1) < share) * inside[:, None]
        covered = (target & (alpha[:, 0] > 0.5)).flatten(1).sum(1) / target.flatten(1).sum(1).clamp(min=1)
        behind = (self.uniform(n) < 0.5) | (covered > 0.5)
        alpha = torch.where(behind[:, None, None, None], alpha * ~target[:, None], alpha)
        images = images * (1 - alpha) + other[:, :3] * alpha
        front = alpha[:, 0] > 0.5
        return images, target & ~front, known | front

    def recolor(self, images: Tensor) -> Tensor:
        """Brightness, contrast, saturation, channel shift, gamma, blur and noise, each on some samples."""
        n = len(images)
        grey = images.mean(dim=1, keepdim=True)
        images = grey + (images - grey) * self.uniform(n, 1, 1, 1, low=0.4, high=1.5)
        center = images.mean(dim=(2, 3), keepdim=True)
        images = center + (images - center) * self.uniform(n, 1, 1, 1, low=0.65, high=1.35)
        images = images * self.uniform(n, 1, 1, 1, low=0.7, high=1.3) + self.uniform(n, 3, 1, 1, low=-0.08, high=0.08)
        images = images.clamp(1e-4, 1) ** self.uniform(n, 1, 1, 1, low=-0.35, high=0.35).exp()
        soft = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
        images = torch.where(self.uniform(n, 1, 1, 1) < 0.25, soft, images)
        images = torch.where(self.uniform(n, 1, 1, 1) < 0.07, images.mean(dim=1, keepdim=True), images)
        return (images + torch.randn_like(images) * self.uniform(n, 1, 1, 1, high=0.03)).clamp(0, 1)


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


def bundle_file(path: Path, command: str, seed: int) -> None:
    """Add a trained file to the bundled weights, with the scores `benchmarks/interactive.py quality --weights` gave it."""
    from mmkit.weights import WeightEntry, bundle

    results = json.loads((Path(__file__).parents[1] / "benchmarks/results/interactive_quality.json").read_text())
    if results["weights sha256"] != hashlib.sha256(path.read_bytes()).hexdigest():
        raise SystemExit(f"First measure this file: python benchmarks/interactive.py quality --weights {path}")
    score = {
        f"{row.split(':')[0]} {k}": v
        for row, values in results["rows"].items()
        if row.endswith(": squeezesam-photo") and " of them" not in row
        for k, v in values.items()
    }
    entry = bundle(
        WeightEntry(
            name="squeezesam-photo",
            model="squeeze_sam_photo",
            config={},
            summary=SUMMARY,
            license="CC-BY-SA-4.0 (trained on CC-BY-SA-4.0, CC-BY-SA-2.0, CC-BY-2.0, CC-BY-4.0, BSD-3 and CC0 pictures)",
            command=command,
            data="Oxford-IIIT Pet excerpt (CC-BY-SA-4.0, 543 photos), COCO excerpt (26 photos, CC-BY-2.0, CC-BY-SA-2.0 or unrestricted), "
            "mOSD table tops (BSD-3, 8 scenes), backgrounds from DreamBooth subjects (CC-BY-4.0) and a clothing set (CC0), procedural",
            seed=seed,
            score=score,
        ),
        {k: v.float() if v.is_floating_point() else v for k, v in read_tensors(path).items()},
    )
    print(f"bundled {entry.file}: {pretty(score)}")


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
    parser.add_argument("--bundle", type=Path, help="do not train: add this measured file to mmkit.weights")
    args = parser.parse_args()
    if args.bundle:
        from safetensors import safe_open

        with safe_open(args.bundle, "pt") as file:
            notes = file.metadata()
        bundle_file(args.bundle, notes["command"], int(notes["seed"]))
    else:
        train(args)


if __name__ == "__main__":
    main()
