"""Scenes to learn clicking from: crops, composites and drawn objects, made on the accelerator from a bank of pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmkit.vision.clicks.model import MEAN

BACKGROUND = 0
OBJECT = 1
UNKNOWN = 2
"""What a pixel is to an object: outside it, part of it, or not counted."""


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


def build_bank(groups: list[tuple[float, list]], side: int, device: torch.device) -> Bank:
    """Canvases of all pictures; each group's objects share its sampling weight.

    Args:
        groups: (share, rows) each; a row is a PIL image, its segment ids uint8 `(H, W)`, and its objects as dicts: "ids" and "unknown"
            (tuples of segment ids that belong to the object, or are not to count), and "weight" within the group. Objects of fewer
            than 40 pixels are left out; a picture without objects serves as background.
        side: of the canvases, in pixels.
        device: where the bank lives and scenes are made.
    """
    pictures: list[tuple[np.ndarray, list[int], np.ndarray]] = []  # canvas, height and width, segment ids
    found: list[tuple[int, np.ndarray, list[int], float]] = []  # picture, table, box, weight
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
                kinds = np.zeros(256, np.uint8)
                kinds[list(o["unknown"])], kinds[list(o["ids"])] = UNKNOWN, OBJECT
                box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                found.append((len(pictures), kinds, box, share * o["weight"] / total))
            pictures.append((canvas, [h, w], ids))
    canvases, sizes, maps = zip(*pictures, strict=True)
    owner, table, boxes, weight = zip(*found, strict=True)
    return Bank(
        torch.from_numpy(np.stack(canvases)).permute(0, 3, 1, 2).contiguous().to(device),
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
        """A batch: "image" `(n, 3, S, S)` in 0..1, "target" and "valid" bool `(n, S, S)`.

        Args:
            n: size of the batch.
            procedural: share of drawn scenes; at least one sample shows an object of the bank.
            composite: share of the others whose object is pasted on another picture.
            distractor: share of samples that get a cut-out of another one.
        """
        drawn = min(round(n * procedural), n - 1)
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
