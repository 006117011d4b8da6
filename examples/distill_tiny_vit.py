"""Distil the bundled MobileNetV2 into a tiny ViT, from photographs without labels: how a small model of one's own gets a start.

    python examples/distill_tiny_vit.py --data data --scratch teacher.safetensors --output runs/tiny    # about 20 CPU minutes
    python examples/distill_tiny_vit.py --data data --crops 2000 --steps 50                             # a look at how it works

Each step sees as many drawn pictures, at 32 pixels, as crops of photographs, at 64. On the drawn ones it learns to name the class. On
the photographs it has no labels: it learns to say what MobileNetV2 feels about the same crop as a whole (its pooled features and its 1000
classes), and in each place of a 4 x 4 grid. What the teacher says is asked once; `--scratch` keeps it, `--output` the checkpoints from
which the same command goes on, and at the end the model, as a folder for `create_backbone`.

The photographs: those of `photos_more`, `seg_more` (COCO, CC-BY-2.0 or without known restrictions) and `fewshot_dreambooth` (CC-BY-4.0 and
Unsplash). Photographs of `cls_clothing`, on which the result is measured, are not among them: printed are the accuracy on freshly drawn
pictures, and of a linear probe on the validation photos of clothes at 64 pixels. The bundled `tiny_vit` was not made by this script but by
`pretrain_tiny_vit.py`, from drawn pictures alone.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from timm.layers import build_sincos2d_pos_embed
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
    """Principal components of standardised features (N, C), weakened so that the first ones do not drown the others."""

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

    def __init__(self, num_classes: int):
        super().__init__()
        self.vit = create_backbone(
            "timm:vit_tiny_patch16_224", num_classes=num_classes, dynamic_img_size=True, **ARCHITECTURE
        )
        begin(self.vit)
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


@torch.no_grad()
def begin(vit: nn.Module) -> None:
    """Weights as those of trained ViTs are on average (mimetic initialisation, arXiv 2305.09828): a token looks for what resembles it
    and takes the opposite of its value; places are sines and cosines. From timm's weights the first thousand steps go into that.
    """
    dim, heads = ARCHITECTURE["embed_dim"], ARCHITECTURE["num_heads"]
    size = dim // heads
    for block in vit.blocks:
        products = [0.7 * torch.randn(dim, dim) / dim**0.5 + 0.7 * torch.eye(dim) for _ in range(heads)]
        for head, product in enumerate(products):
            u, s, v = torch.linalg.svd(product)
            rows, scale = slice(head * size, (head + 1) * size), s[:size].sqrt()
            block.attn.qkv.weight[:dim][rows] = (u[:, :size] * scale).T
            block.attn.qkv.weight[dim : 2 * dim][rows] = (v.T[:, :size] * scale).T
        u, s, v = torch.linalg.svd(0.4 * torch.randn(dim, dim) / dim**0.5 - 0.4 * torch.eye(dim))
        block.attn.qkv.weight[2 * dim :] = s.sqrt()[:, None] * v
        block.attn.proj.weight.copy_(u * s.sqrt())
    side = ARCHITECTURE["img_size"] // ARCHITECTURE["patch_size"]
    vit.pos_embed[:, 1:] = build_sincos2d_pos_embed([side, side], dim)


def loss_fn(model: Student, batch: tuple[Tensor, ...]) -> Tensor:
    """Class of the drawn picture; features, features per place and class probabilities of the teacher."""
    photo, whole, places, names, picture, label = batch
    tokens = model.vit.forward_features(photo)
    grid = tokens[:, 1:].unflatten(1, (SIDE // 8, SIDE // 8)).permute(0, 3, 1, 2)
    local = model.places(F.avg_pool2d(grid, 2).permute(0, 2, 3, 1))
    said = F.kl_div(model.names(tokens[:, 0]).float().log_softmax(-1), names.softmax(-1), reduction="batchmean")
    drawn = F.cross_entropy(model.vit(picture).float(), label, label_smoothing=0.05)
    return (
        F.mse_loss(model.whole(tokens[:, 0]).float(), whole)
        + 0.5 * F.mse_loss(local.float(), places)
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
    parser.add_argument("--scratch", type=Path, help="file that keeps what the teacher said, about 1 GB")
    parser.add_argument("--crops", type=int, default=48_000, help="as many pictures are drawn")
    parser.add_argument("--steps", type=int, default=2_600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for checkpoints and the model")
    args = parser.parse_args()
    keep_freed_memory()

    names = class_names()
    taught = lessons(args.data, args.crops, args.seed, args.scratch)
    torch.manual_seed(args.seed)
    student = Student(len(names))
    val = Drawn(1200, args.seed + 2)
    config = FitConfig(
        max_steps=args.steps, batch_size=args.batch_size, lr=1.5e-3, weight_decay=0.05, warmup_steps=args.steps // 20,
        checkpoint_every=1000, restore_best=False, eval_every=1, seed=args.seed, device="cpu",
    )  # fmt: skip
    train = Lessons(taught, Drawn(args.crops, args.seed + 1))
    result = fit(
        student, train, val, loss_fn=loss_fn, config=config, output_dir=args.output and args.output / "training"
    )
    if result.stopped != "finished":
        raise SystemExit(
            f"stopped after {result.steps} steps ({result.stopped}); the same command with --output goes on"
        )

    vit = student.vit.eval()
    right = accuracy(vit, torch.utils.data.DataLoader(val, 256))["accuracy"]
    probed = probe(vit, args.data / "cls_clothing")
    print(
        f"{right:.4f} on {len(val)} fresh pictures of {len(names)} classes; {probed:.4f} with a probe on photos of clothes"
    )
    if args.output:
        print(f"saved to {save_backbone(vit, args.output / 'model')}")


if __name__ == "__main__":
    main()
