"""One RGB-D picture with what is known about it, and its points in space."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmkit.errors import InputError


@dataclass(frozen=True)
class RGBDFrame:
    """One picture.

    Attributes:
        color: (H, W, 3) uint8.
        depth: (H, W) float32, metres along the camera's axis; 0 where unknown.
        K: (3, 3) float32 intrinsics in pixels; the centre of the first pixel is (0.5, 0.5).
        labels: (H, W) pixel values of a label picture (ids of the tree), or `None`.
        pose: (4, 4) float64 camera to world, or `None` where it is not known.
        name: for messages.
    """

    color: Tensor
    depth: Tensor
    K: Tensor
    labels: Tensor | None = None
    pose: Tensor | None = None
    name: str = ""

    def __post_init__(self) -> None:
        size = tuple(self.depth.shape)
        if self.color.dtype != torch.uint8 or tuple(self.color.shape) != (*size, 3):
            raise InputError(
                f"Frame {self.name}: color must be uint8 {(*size, 3)}, like the depth; got {self.color.dtype} {tuple(self.color.shape)}."
            )
        if self.labels is not None and tuple(self.labels.shape) != size:
            raise InputError(f"Frame {self.name}: labels must be {size}; got {tuple(self.labels.shape)}.")
        if (
            self.K.shape != (3, 3)
            or not self.K.isfinite().all()
            or float(self.K[0, 0]) <= 0
            or float(self.K[1, 1]) <= 0
        ):
            raise InputError(f"Frame {self.name}: K must be a finite (3, 3) with focal lengths above 0.")
        if not self.depth.isfinite().all() or bool((self.depth < 0).any()):
            raise InputError(f"Frame {self.name}: depths must be finite and not negative; 0 means unknown.")

    def digest(self) -> bytes:
        """32 bytes that other colours, depths, labels or intrinsics change."""
        found = hashlib.sha256()
        for part in (self.color, self.depth, self.K, self.labels):
            found.update(b"" if part is None else part.contiguous().numpy().tobytes())
        return found.digest()

    @property
    def width(self) -> int:
        """Pixels across."""
        return self.depth.shape[1]

    @property
    def height(self) -> int:
        """Pixels down."""
        return self.depth.shape[0]

    def rgb(self) -> Tensor:
        """Colours (H, W, 3) in 0..1."""
        return self.color.float() / 255

    def resized(self, longest: int | None) -> RGBDFrame:
        """At most `longest` pixels on the longer side: colours averaged, depths and labels of the nearest pixel."""
        if longest is None or max(self.width, self.height) <= longest:
            return self
        factor = longest / max(self.width, self.height)
        width, height = max(1, round(self.width * factor)), max(1, round(self.height * factor))
        picture = self.color.permute(2, 0, 1)[None].float()
        small = torch.nn.functional.interpolate(picture, (height, width), mode="area")[0].permute(1, 2, 0)
        rows = ((torch.arange(height) + 0.5) * self.height / height).long()
        columns = ((torch.arange(width) + 0.5) * self.width / width).long()
        scale = torch.tensor([[width / self.width], [height / self.height], [1.0]])
        return dataclasses.replace(
            self, color=small.round().clamp(0, 255).to(torch.uint8), depth=self.depth[rows][:, columns], K=self.K * scale,
            labels=None if self.labels is None else self.labels[rows][:, columns],
        )  # fmt: skip


class Frames(Protocol):
    """What `run` takes: a sequence of frames."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> RGBDFrame: ...


def points_of_depth(depth: Tensor, K: Tensor, *, offset: float = 0.5) -> Tensor:
    """Points (H, W, 3) in the camera of a depth picture (H, W).

    `offset` is where a pixel's centre lies; the official code un-projects with 0, half a pixel beside where it renders.
    """
    rows, columns = torch.meshgrid(torch.arange(depth.shape[0]), torch.arange(depth.shape[1]), indexing="ij")
    x = (columns + offset - K[0, 2]) * depth / K[0, 0]
    y = (rows + offset - K[1, 2]) * depth / K[1, 1]
    return torch.stack([x, y, depth], -1)


def to_world(points: Tensor, view: Tensor) -> Tensor:
    """Points (..., 3) of a camera in the world; `view` (4, 4) is world to camera."""
    return (points - view[:3, 3]) @ view[:3, :3]
