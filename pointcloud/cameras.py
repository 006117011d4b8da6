"""Cameras and pictures taken by them, in the conventions of the rasteriser: world to camera, x right, y down, z forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkit.errors import InputError


@dataclass(frozen=True)
class Camera:
    """C cameras with pictures of one size: viewmats (C, 4, 4), Ks (C, 3, 3)."""

    viewmats: Tensor
    Ks: Tensor
    width: int
    height: int

    def __len__(self) -> int:
        return len(self.viewmats)

    def __getitem__(self, which: int | slice | Sequence[int]) -> Camera:
        index = [which] if isinstance(which, int) else which
        return Camera(self.viewmats[index], self.Ks[index], self.width, self.height)

    @property
    def positions(self) -> Tensor:
        """Camera centres (C, 3) in the world."""
        turn, shift = self.viewmats[:, :3, :3], self.viewmats[:, :3, 3]
        return -(turn.transpose(1, 2) @ shift.unsqueeze(-1)).squeeze(-1)

    def resized(self, width: int, height: int) -> Camera:
        """The same cameras with other pictures: intrinsics scale with them."""
        factor = torch.tensor([width / self.width, height / self.height, 1.0])[:, None]
        return Camera(self.viewmats, self.Ks * factor, width, height)


@dataclass
class PosedImages:
    """Pictures of a still scene with their cameras.

    Attributes:
        images: (V, H, W, 3) uint8.
        camera: V cameras.
        names: of the pictures.
        points: (P, 3) known points of the scene, if any, and `point_colors` (P, 3) in 0..1.
    """

    images: Tensor
    camera: Camera
    names: list[str]
    points: Tensor | None = None
    point_colors: Tensor | None = None

    def __post_init__(self) -> None:
        shape = (len(self.camera), self.camera.height, self.camera.width, 3)
        if tuple(self.images.shape) != shape or self.images.dtype != torch.uint8:
            raise InputError(
                f"images must be uint8 {shape}, one per camera; got {self.images.dtype} {tuple(self.images.shape)}."
            )
        if not (self.camera.viewmats.isfinite().all() and self.camera.Ks.isfinite().all()):
            raise InputError("A camera is not finite; leave out pictures whose pose was lost.")

    def __len__(self) -> int:
        return len(self.images)

    def split(self, every: int = 8) -> tuple[PosedImages, PosedImages]:
        """Pictures to fit and pictures to judge by: every `every`th, from the middle of the first few on, is held out."""
        if len(self) < 2:
            raise InputError("At least two pictures are needed to hold one out.")
        held = list(range(min(every // 2, len(self) - 1), len(self), every))
        return self.subset([i for i in range(len(self)) if i not in held]), self.subset(held)

    def subset(self, which: Sequence[int]) -> PosedImages:
        """Some of the pictures, with the same points."""
        which = list(which)
        return PosedImages(
            self.images[which], self.camera[which], [self.names[i] for i in which], self.points, self.point_colors
        )

    def resized(self, longest: int) -> PosedImages:
        """At most `longest` pixels on the longer side."""
        width, height = self.camera.width, self.camera.height
        factor = longest / max(width, height)
        if factor >= 1:
            return self
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        pictures = [np.asarray(Image.fromarray(x.numpy()).resize(size, Image.Resampling.BOX)) for x in self.images]
        images = torch.from_numpy(np.stack(pictures))
        return PosedImages(images, self.camera.resized(*size), self.names, self.points, self.point_colors)


def look_at(positions: Tensor, target: Tensor, up: Tensor) -> Tensor:
    """View matrices (C, 4, 4) of cameras at `positions` (C, 3) that see `target` in the middle, with `up` upwards."""
    forward = torch.nn.functional.normalize(target - positions, dim=-1)
    right = torch.linalg.cross(forward, up.expand_as(forward))
    if (right.norm(dim=-1) < 1e-6).any():
        raise InputError("A camera looks along `up`; choose another direction for it.")
    right = torch.nn.functional.normalize(right, dim=-1)
    turn = torch.stack([right, torch.linalg.cross(forward, right), forward], 1)
    views = torch.eye(4).repeat(len(positions), 1, 1)
    views[:, :3, :3], views[:, :3, 3] = turn, -(turn @ positions.unsqueeze(-1)).squeeze(-1)
    return views


def orbit(
    centre: Tensor, distance: float, azimuths: Sequence[float], elevation: float = 20.0, *, width: int = 256, height: int = 256,
    fov: float = 50.0, up: Tensor | None = None,
) -> Camera:  # fmt: skip
    """Cameras on a circle around `centre`.

    Args:
        azimuths, elevation: in degrees; elevation 0 looks from the side, 90 from above.
        fov: angle across the longer side, in degrees.
        up: the scene's upward direction; default -y, as in scenes whose cameras stand upright.

    Raises:
        InputError: no distance above 0, an angle that is not finite.
    """
    if not 0 < distance < math.inf:
        raise InputError(f"distance must be above 0 and finite, not {distance}.")
    for name, angles in (("azimuth", azimuths), ("elevation", [elevation])):
        if bad := [a for a in angles if not math.isfinite(a)]:
            raise InputError(f"{name} is an angle in degrees, not {bad[0]}.")
    up = torch.tensor([0.0, -1.0, 0.0]) if up is None else torch.nn.functional.normalize(up.float(), dim=0)
    side = torch.tensor([0.0, 0.0, -1.0]) if abs(float(up[2])) < 0.9 else torch.tensor([0.0, 1.0, 0.0])
    side = torch.nn.functional.normalize(side - (side @ up) * up, dim=0)
    other = torch.linalg.cross(up, side)
    angle = torch.tensor([math.radians(a) for a in azimuths])
    height_part = math.radians(max(-89.0, min(89.0, elevation)))
    ring = angle.cos()[:, None] * side + angle.sin()[:, None] * other
    positions = centre.cpu() + distance * (math.cos(height_part) * ring + math.sin(height_part) * up)
    focal = 0.5 * max(width, height) / math.tan(math.radians(fov) / 2)
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
    return Camera(look_at(positions, centre.cpu(), up), K.repeat(len(positions), 1, 1), width, height)
