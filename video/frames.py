"""Frames in memory: clips, and decoded frames as upright RGB arrays of the asked size."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkit.errors import InputError


class VideoDecodeError(InputError):
    """A video cannot be read: missing, empty, not a video, or damaged beyond `tolerance`."""


def check_fps(fps: object) -> None:
    """Raise `InputError` unless `fps` is a frame rate that video files can hold."""
    if not isinstance(fps, numbers.Real) or not 1e-6 <= float(fps) <= 1e6:
        raise InputError(f"fps must be frames per second, above 0 and at most a million, not {fps!r}.")


@dataclass(frozen=True)
class Clip:
    """Frames of one video.

    Attributes:
        frames: uint8 `(T, H, W, 3)`, RGB.
        indices: frame number of each, `(T,)`.
        seconds: presentation time of each, `(T,)`, from the start of the video.
        num_frames, fps, duration: of the whole video (average rate; seconds).
        num_replaced: frames that could not be decoded and show their nearest decoded neighbour in time.
        num_corrupt: data packets the decoder refused, plus frames it marked as damaged, up to now.
        path, backend: where they came from.
    """

    frames: np.ndarray[Any, Any]
    indices: np.ndarray[Any, Any]
    seconds: np.ndarray[Any, Any]
    num_frames: int
    fps: float
    duration: float
    num_replaced: int = 0
    num_corrupt: int = 0
    path: str = ""
    backend: str = "pyav"

    def __len__(self) -> int:
        return len(self.frames)

    def tensor(self) -> Tensor:
        """The frames as a uint8 tensor `(T, 3, H, W)`, without a copy."""
        return torch.from_numpy(self.frames).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Placement:
    """How a stored picture is turned to be looked at: rows and columns swapped first, then mirrored."""

    swapped: bool = False
    mirrored: bool = False  # left and right
    flipped: bool = False  # top and bottom

    @classmethod
    def of(cls, frame: Any) -> Placement:
        """From the display matrix, whose first two rows hold where the stored x and y axes point (ISO 14496-12, 6.2.2)."""
        from av.sidedata.sidedata import SideDataContainer

        container: Any = SideDataContainer  # `frame.side_data` keeps frame and decoder alive in a circle
        data = container(frame).get("DISPLAYMATRIX")
        if data is None:
            return cls()
        a, b, _, c, d, *_ = np.frombuffer(data, np.int32, 9).astype(np.int64)
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(swapped=True, mirrored=bool(c < 0), flipped=bool(b < 0))
        return cls(mirrored=bool(a < 0), flipped=bool(d < 0))

    def apply(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A view of `(H, W, 3)` as it is looked at."""
        array = array.transpose(1, 0, 2) if self.swapped else array
        return array[:: -1 if self.flipped else 1, :: -1 if self.mirrored else 1]


def to_rgb(frame: Any, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """A decoded frame as upright RGB of `size` (height, width)."""
    placement = Placement.of(frame)
    height, width = (size[1], size[0]) if placement.swapped else size
    return placement.apply(frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA"))


def resize(frame: np.ndarray[Any, Any], size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """An RGB array `(H, W, 3)` in another size (height, width)."""
    if frame.shape[:2] == size:
        return frame
    from PIL import Image

    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BOX))


def is_cover_art(stream: Any) -> bool:
    """Whether a stream of a container is the picture of its cover and no video."""
    import av

    return bool(stream.disposition & av.stream.Disposition.attached_pic)
