"""Small videos whose frames carry their own number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmkit.video import write_video

BITS = 8


def numbered(n: int, height: int = 48, width: int = 96) -> np.ndarray[Any, Any]:
    """`n` frames; eight vertical bars show the frame's number in binary."""
    bits = np.array([[i >> b & 1 for b in range(BITS)] for i in range(n)], np.uint8) * 255
    bars = np.repeat(bits, width // BITS, axis=1)
    return np.ascontiguousarray(np.broadcast_to(bars[:, None, :, None], (n, height, width, 3)))


def numbers(frames: np.ndarray[Any, Any]) -> list[int]:
    """What `numbered` drew."""
    step = frames.shape[2] // BITS
    row = frames[:, frames.shape[1] // 2, step // 2 :: step].mean(-1) > 127
    return [int(sum(int(v) << b for b, v in enumerate(bits))) for bits in row]


def make(path: Path, n: int = 60, **options: Any) -> Path:
    """Write a numbered video."""
    return write_video(path, numbered(n), **options)
