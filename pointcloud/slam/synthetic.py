"""The drawn room as an RGB-D sequence with labels and true poses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mmkit.data.drawn.rooms import DrawnRoom, flipped_labels, noisy
from mmkit.errors import InputError
from mmkit.pointcloud.slam.datasets import intrinsics, stacked
from mmkit.pointcloud.slam.frames import RGBDFrame
from mmkit.pointcloud.slam.tree import SemanticTree


class SyntheticRoom:
    """The drawn room as a sequence: known poses and labels, no files.

    Args:
        frames, width, height: of the sequence; the focal length is 0.8 widths.
        noise: of a depth camera.
        label_noise: share of 4 x 4 blocks with a wrong label.
        num_classes, objects: 24 classes in 3 levels of 3 by default; above 27 a balanced tree of 4 levels.
        speed: frames of the path per frame.
        seed: of the room and its noise.
    """

    def __init__(
        self, frames: int = 40, width: int = 160, height: int = 120, *, noise: bool = True, label_noise: float = 0.0,
        num_classes: int = 24, objects: int = 18, speed: float = 1.0, seed: int = 0,
    ):  # fmt: skip
        if frames < 1 or width < 16 or height < 16:
            raise InputError(
                f"A drawn sequence has at least 1 frame of 16 x 16 pixels, not {frames} of {width} x {height}."
            )
        self.room = DrawnRoom(seed, objects, num_classes)
        self.frames, self.width, self.height, self.speed, self.seed = frames, width, height, speed, seed
        self.noise, self.label_noise = noise, label_noise
        self.K = intrinsics(0.8 * width, 0.8 * width, width / 2, height / 2)
        fan_out = (3, 3, 3) if num_classes <= 27 else (4, 4, 2, 2) if num_classes <= 64 else (8, 8, 8)
        self.tree = SemanticTree.balanced(self.room.class_names, fan_out)
        self.poses = [torch.from_numpy(self.room.pose(speed * t)) for t in range(frames)]
        self.name = f"drawn room {seed}"

    def __len__(self) -> int:
        return self.frames

    def __iter__(self) -> Iterator[RGBDFrame]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> RGBDFrame:
        return self._frame(index, self.noise)

    def clean(self, index: int) -> RGBDFrame:
        """A frame without noise, to judge by."""
        return self._frame(index, False)

    def _frame(self, index: int, noise: bool) -> RGBDFrame:
        if not 0 <= index < len(self):
            raise IndexError(index)
        color, depth, labels = self.room.render(self.poses[index].numpy(), self.K, self.width, self.height)
        if noise:
            rng = np.random.default_rng((self.seed, index))
            color, depth = noisy(color, depth, rng)
            if self.label_noise:
                labels = flipped_labels(labels, self.room.num_classes, self.label_noise, rng)
        return RGBDFrame(
            torch.from_numpy(np.rint(255 * color).astype(np.uint8)), torch.from_numpy(depth.astype(np.float32)),
            torch.from_numpy(self.K).float(), torch.from_numpy(labels), self.poses[index], f"frame {index}",
        )  # fmt: skip

    def trajectory(self) -> Tensor | None:
        """True poses (F, 4, 4)."""
        return stacked(self.poses)
