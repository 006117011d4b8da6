"""Distil the bundled MobileNetV2 into a tiny ViT, from photographs without labels: how a small model of one's own gets a start.

    python examples/pretrain_tiny_vit.py --output runs/drawn                                       # about half an hour
    python examples/distill_tiny_vit.py --data data --start runs/drawn --output runs/tiny          # about 70 CPU minutes
    python examples/distill_tiny_vit.py --data data --start runs/drawn --crops 2000 --steps 50     # a look at how it works

Each step sees as many drawn pictures, at 32 pixels, as crops of photographs, at 64. On the drawn ones it learns to name the class. On
the photographs it has no labels: it learns to say what MobileNetV2 feels about the same crop as a whole (its pooled features and its 1000
classes), and in each place of a 4 x 4 grid. Until the last fifth of the steps it sees only half of the places, other ones each time, which
costs half. What the teacher says is asked once; `--scratch` keeps it, `--output` the checkpoints from which the same command goes on, and
at the end the model, as a folder for `create_backbone`. `--bundle` replaces the bundled `tiny_vit`, which was made so.

The photographs: those of `photos_more`, `seg_more` (COCO, CC-BY-2.0 or without known restrictions), `fewshot_dreambooth` (CC-BY-4.0 and
Unsplash), and the training photos of `cls_clothing` (CC0), without their labels. Printed are the accuracy on freshly drawn pictures, and of
a linear probe on the validation photos of clothes at 64 pixels.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmkit.backbones import create_backbone, save_backbone
from mmkit.data import ImageTransform, load_image, open_dataset
from mmkit.data.drawn.pictures import ProceduralImages, class_names
from mmkit.data.licenses import permissive_pictures
from mmkit.memory import keep_freed_memory
from mmkit.storage import read_tensors, write_safetensors
from mmkit.training import FitConfig, fit
from mmkit.training.metrics import accuracy
from mmkit.vision.classification import probe_answers
from mmkit.weights import WeightEntry, bundle

ARCHITECTURE = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 4}
MEAN = STD = (0.5, 0.5, 0.5)
SIDE, TEACHER_SIDE = 64, 128
WHOLE, PLACE = 256, 128
"""How many principal components of the teacher's features are kept, of the whole crop and of each place."""


def crop(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random part of the photo, a tenth of it or all, sometimes in other colors, squeezed into a square."""
    width, height = photo.size
    area, ratio = width * height * math.exp(rng.uniform(math.log(0.1), 0)), math.exp(rng.uniform(-0.3, 0.3))
    w, h = min(width, round(math.sqrt(area * ratio))), min(height, round(math.sqrt(area / ratio)))
    x, y = rng.integers(width - w + 1), rng.integers(height - h + 1)
    part = photo.resize((TEACHER_SIDE, TEACHER_SIDE), Image.Resampling.BICUBIC, (x, y, x + w, y + h))
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        if rng.random() < 0.3:
            part = enhance(part).enhance(rng.uniform(0.6, 1.4))
    return part


class Basis:
    """Principal components of standardised features (N, C), brought nearer to one spread, which half precision serves better."""

    def __init__(self, sample: Tensor, keep: int):
        self.mean, self.std = sample.mean(0), sample.std(0) + 1e-3
        scaled = (sample - self.mean) / self.std
        variance, axes = torch.linalg.eigh(scaled.T @ scaled / len(scaled))
        weight = variance[-keep:].clamp(min=1e-6) ** -0.25
        self.axes = axes[:, -keep:] * weight
        self.axes /= (scaled @ self.axes).square().mean().sqrt()

    def __call__(self, features: Tensor) -> Tensor:
        return ((features - self.mean) / self.std @ self.axes).half()


@torch.no_grad()
def ask_teacher(photos: list[Image.Image], count: int, seed: int) -> dict[str, Tensor]:
    """`count` crops (N, 3, 64, 64) uint8 and what MobileNetV2 says: `whole` (N, 256), `places` (N, 4, 4, 128), `names` (N, 1000)."""
    teacher = create_backbone("mobilenetv2").eval().to(memory_format=torch.channels_last)
    parts: dict[str, list[Tensor]] = {"crops": [], "whole": [], "places": [], "names": []}
    bases: tuple[Basis, Basis] | None = None
    for start in range(0, count, 2000):  # the first 2000 tell the principal components
        maps = []
        for first in range(start, min(start + 2000, count), 50):
            crops = [
                crop(photos[i % len(photos)], np.random.default_rng((seed, i)))
                for i in range(first, min(first + 50, start + 2000, count))
            ]
            x = torch.from_numpy(np.stack([np.asarray(c) for c in crops])).permute(0, 3, 1, 2) / 127.5 - 1
            maps.append(teacher.forward_features(x))
            small = [np.asarray(c.resize((SIDE, SIDE), Image.Resampling.BOX)) for c in crops]
            parts["crops"].append(torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2))
        found = torch.cat(maps)
        pooled, grid = found.mean((2, 3)), found.permute(0, 2, 3, 1)
        bases = bases or (Basis(pooled, WHOLE), Basis(grid.flatten(0, 2)[::4], PLACE))
        parts["whole"].append(bases[0](pooled))
        parts["places"].append(bases[1](grid))
        parts["names"].append(teacher.get_classifier()(pooled).half())
        print(f"teacher: {start + len(found)} of {count} crops", flush=True)
    return {k: torch.cat(v) for k, v in parts.items()}


def lessons(data: Path, count: int, seed: int, scratch: Path | None) -> dict[str, Tensor]:
    """What `ask_teacher` says, from `scratch` where it has the same number of crops."""
    files = [p for name in ("photos_more", "seg_more") for p in permissive_pictures(data / name)]
    files += sorted((data / "fewshot_dreambooth").glob("*/*.jpg"))
    files += 2 * sorted(
        (data / "cls_clothing" / "train").glob("*/*.jpg")
    )  # twice as often; their labels are not looked at
    if scratch and scratch.is_file():
        kept = read_tensors(scratch, allow_pickle_format=False)
        if len(kept["crops"]) == count:
            return kept
    photos = []
    for file in files:
        photo = load_image(file)
        photo.thumbnail((320, 320))
        photos.append(photo)
    found = ask_teacher(photos, count, seed)
    if scratch:
        write_safetensors(scratch, found)
    return found


def as_spread(parts: Tensor) -> Tensor:
    """Components of a `Basis` (..., K) with the spread that they have in the features: what varies most is learnt first."""
    sample = parts.flatten(0, -2)[:4000].float()
    spread = sample.var(0).sqrt()  # theirs is its square
    return (parts.float() * spread / (sample * spread).square().mean().sqrt()).half()


class Lessons(Dataset[tuple[Tensor, ...]]):
    """A crop, what the teacher says of it, a drawn picture and its class; crops and their places are mirrored half of the time."""

    def __init__(self, taught: dict[str, Tensor], drawn: Drawn):
        self.taught, self.drawn = taught, drawn

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        photo, whole, places, names = (self.taught[k][index] for k in ("crops", "whole", "places", "names"))
        if torch.rand(()) < 0.5:
            photo, places = photo.flip(2), places.flip(1)
        picture, label = self.drawn[index]
        return photo.float() / 127.5 - 1, whole.float(), places.float(), names.float(), picture, torch.tensor(label)


class Drawn(Dataset[tuple[Tensor, int]]):
    """`length` procedural pictures, drawn once and kept in memory as (3, 32, 32) in -1..1."""

    def __init__(self, length: int, seed: int):
        source = ProceduralImages(length, 32, seed)
        pictures = [(np.asarray(image), label) for image, label in source]
        self.images = torch.from_numpy(np.stack([image for image, _ in pictures])).permute(0, 3, 1, 2).contiguous()
        self.labels = [label for _, label in pictures]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].float() / 127.5 - 1, self.labels[index]


class Student(nn.Module):
    """The ViT, any size of picture, and what turns its features into the teacher's."""

    def __init__(self, start: Path):
        super().__init__()
        self.vit = create_backbone(str(start), dynamic_img_size=True)
        dim = ARCHITECTURE["embed_dim"]
        self.whole, self.places, self.names = nn.Linear(dim, WHOLE), nn.Linear(dim, PLACE), nn.Linear(dim, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x)

    def some_places(self, x: Tensor, cells: Tensor) -> Tensor:
        """Tokens (N, 1 + 4 k, C), the class first, of crops of which only the `cells` (N, k) of the 4 x 4 grid are seen."""
        vit = self.vit
        x = vit._pos_embed(vit.patch_embed(x))
        side = SIDE // 8
        corner = (cells // 4) * 2 * side + cells % 4 * 2
        index = (corner[..., None] + torch.tensor([0, 1, side, side + 1])).flatten(1)
        seen = x[:, 1:].gather(1, index[..., None].expand(-1, -1, x.shape[2]))
        return vit.norm(vit.blocks(torch.cat([x[:, :1], seen], 1)))


class Loss:
    """Class of the drawn picture; features, features per place and class probabilities of the teacher.

    Attributes:
        step, whole_from: whole crops are seen from that step on, half of their places before.
    """

    def __init__(self, whole_from: int):
        self.step, self.whole_from = 0, whole_from

    def __call__(self, model: Student, batch: tuple[Tensor, ...]) -> Tensor:
        photo, whole, places, names, picture, label = batch
        if self.step < self.whole_from:
            cells = torch.rand(len(photo), 16).argsort(1)[:, :8]
            tokens = model.some_places(photo, cells)
            grid = tokens[:, 1:].unflatten(1, (8, 4)).mean(2)
            places = places.flatten(1, 2).gather(1, cells[..., None].expand(-1, -1, PLACE))
        else:
            tokens = model.vit.forward_features(photo)
            grid = tokens[:, 1:].unflatten(1, (4, 2, 4, 2)).mean((2, 4))
        said = F.kl_div((model.names(tokens[:, 0]) / 2).log_softmax(-1), (names / 2).softmax(-1), reduction="batchmean")
        drawn = F.cross_entropy(model.vit(picture), label, label_smoothing=0.05)
        return (
            F.mse_loss(model.whole(tokens[:, 0]), whole)
            + 0.5 * F.mse_loss(model.places(grid), places)
            + 0.3 * said
            + drawn
        )


def probe(vit: nn.Module, clothes: Path) -> float:
    """Validation accuracy of a classifier solved on the frozen features of the training photos: 10 kinds of clothes at 64 pixels."""
    data = open_dataset(clothes).with_transform(ImageTransform(SIDE, MEAN, STD, crop_pct=0.9))
    return probe_answers(vit, data.split("train"), data.split("val")).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the photographs, and the clothes to test on"
    )
    parser.add_argument("--start", type=Path, required=True, help="what pretrain_tiny_vit.py wrote")
    parser.add_argument("--scratch", type=Path, help="file that keeps what the teacher said, about 1 GB")
    parser.add_argument("--crops", type=int, default=48_000, help="as many pictures are drawn")
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for checkpoints and the model")
    parser.add_argument("--bundle", action="store_true", help="replace the bundled tiny_vit")
    args = parser.parse_args()
    keep_freed_memory()

    names = class_names()
    taught = lessons(args.data, args.crops, args.seed, args.scratch)
    taught |= {key: as_spread(taught[key]) for key in ("whole", "places")}
    torch.manual_seed(args.seed)
    student = Student(args.start)
    val = Drawn(1200, args.seed + 2)
    config = FitConfig(
        max_steps=args.steps, batch_size=args.batch_size, lr=1e-3, weight_decay=0.05, warmup_steps=args.steps // 20,
        checkpoint_every=1000, restore_best=False, eval_every=1, seed=args.seed, device="cpu",
    )  # fmt: skip
    train, loss = Lessons(taught, Drawn(args.crops, args.seed + 1)), Loss(round(0.8 * args.steps))
    result = fit(
        student,
        train,
        val,
        loss_fn=loss,
        on_step=lambda info: setattr(loss, "step", info.step),
        config=config,
        output_dir=args.output and args.output / "training",
    )
    if result.stopped != "finished":
        raise SystemExit(
            f"stopped after {result.steps} steps ({result.stopped}); the same command with --output goes on"
        )

    vit = student.vit.eval()
    vit.load_state_dict({k: v.half().float() for k, v in vit.state_dict().items()})
    right = accuracy(vit, torch.utils.data.DataLoader(val, 256))["accuracy"]
    probed = probe(vit, args.data / "cls_clothing")
    print(
        f"{right:.4f} on {len(val)} fresh pictures of {len(names)} classes; {probed:.4f} with a probe on photos of clothes"
    )
    if args.output:
        print(f"saved to {save_backbone(vit, args.output / 'model')}")
    if args.bundle:
        score = {
            "accuracy on drawn pictures": round(right, 4),
            "probe on validation photos of clothes": round(probed, 4),
        }
        print(f"bundled as {bundle(entry(args, names, score), vit.state_dict()).file}")


def entry(args: argparse.Namespace, names: list[str], score: dict[str, float]) -> WeightEntry:
    """What the manifest says."""
    return WeightEntry(
        name="tiny_vit",
        model="timm:vit_tiny_patch16_224",
        config={**ARCHITECTURE, "num_classes": len(names)},
        summary="A 1.0 M parameter ViT for pictures of 32 to 64 pixels: it names drawn shapes, textures and glyphs, and has learnt from a "
        "MobileNetV2 what some photographs look like. A small starting point for adapters and tests; for photographs load mobilenetv2.",
        license="Apache-2.0",
        command="python examples/pretrain_tiny_vit.py --output runs/drawn && "
        f"python examples/distill_tiny_vit.py --data data --start runs/drawn --crops {args.crops} --steps {args.steps} "
        f"--batch-size {args.batch_size} --seed {args.seed} --bundle",
        data=f"{args.crops} pictures drawn by mmkit.data.drawn.pictures; as many crops of photographs without their labels: COCO "
        "(CC-BY-2.0 or without known restrictions), DreamBooth subjects (CC-BY-4.0), "
        "clothes (CC0, training photos); teacher: the bundled mobilenetv2",
        seed=args.seed,
        score=score,
        extra={"mean": MEAN, "std": STD, "class_names": names},
    )


if __name__ == "__main__":
    main()
