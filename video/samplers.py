"""Which frames of a video a model sees: the sampling rules of the published recipes, with their exact arithmetic.

Every sampler answers `sample(length, train=, rng=, fps=)` with integer indices `(clips, num_frames)` in `[0, length)`.
With `train=True` it draws from `rng` (a numpy `Generator`); without, the indices depend on `length` alone. Rounding
is half to even.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mmkit.errors import InputError

Indices = np.ndarray[Any, Any]


class Sampler(Protocol):
    """What a data set, pipeline or `read_frames` takes as a sampler."""

    num_frames: int
    clips: int

    def sample(
        self, length: int, *, train: bool = False, rng: np.random.Generator | None = None, fps: float | None = None
    ) -> Indices:
        """Indices `(clips, num_frames)`, int64."""
        ...


def _check(sampler: Any, length: int) -> None:
    if length < 1:
        raise InputError(f"A video must have at least one frame to sample from, not {length}.")
    for name in ("num_frames", "clips", "stride"):
        if getattr(sampler, name, 1) < 1:
            raise InputError(f"{type(sampler).__name__}: {name} must be at least 1, not {getattr(sampler, name)}.")


def _generator(rng: np.random.Generator | None) -> np.random.Generator:
    return rng if rng is not None else np.random.default_rng()


@dataclass(frozen=True)
class UniformSampler:
    """One frame from each of `num_frames` equal parts of the video (the Something-Something recipe of mmaction2).

    With g = (n-1)/num_frames: in training, frame i is drawn from `[round(g*i), round(g*(i+1))]`, both ends included; else
    it is `round(g*i) + int(g/(clips+1) * (j+1))` for clip j. Short videos repeat frames.
    """

    num_frames: int = 8
    clips: int = 1

    def sample(
        self, length: int, *, train: bool = False, rng: np.random.Generator | None = None, fps: float | None = None
    ) -> Indices:
        """Indices `(clips, num_frames)`; see the class."""
        _check(self, length)
        g = (length - 1) / self.num_frames
        edges = np.round(g * np.arange(self.num_frames + 1)).astype(np.int64)
        if train:
            return _generator(rng).integers(edges[:-1], edges[1:] + 1, size=(self.clips, self.num_frames))
        steps = np.array([int(g / (self.clips + 1) * (j + 1)) for j in range(self.clips)], dtype=np.int64)
        return edges[None, :-1] + steps[:, None]


@dataclass(frozen=True)
class SegmentSampler:
    """Temporal segments of TSN (arXiv 1608.00859): middle, or in training a random frame, of each segment.

    Frame i is `floor(n*(i+0.5)/num_frames)`; in training drawn from `[floor(n*i/num_frames), floor(n*(i+1)/num_frames))`.
    """

    num_frames: int = 8
    clips: int = 1

    def sample(
        self, length: int, *, train: bool = False, rng: np.random.Generator | None = None, fps: float | None = None
    ) -> Indices:
        """Indices `(clips, num_frames)`; without training all clips are equal."""
        _check(self, length)
        edges = length * np.arange(self.num_frames + 1) // self.num_frames
        if train:
            high = np.maximum(edges[1:], edges[:-1] + 1)
            return np.minimum(
                _generator(rng).integers(edges[:-1], high, size=(self.clips, self.num_frames)), length - 1
            )
        middle = np.floor(length * (np.arange(self.num_frames) + 0.5) / self.num_frames).astype(np.int64)
        return np.repeat(middle[None], self.clips, 0)


@dataclass(frozen=True)
class DenseSampler:
    """Clips of consecutive frames with a fixed interval (the Kinetics recipe; "8x16" is frames x stride).

    In training the offset is random; else `clips` clips are spread from the first to the last possible position, and
    one clip sits in the middle. Indices past the end wrap around (`pad="loop"`, as mmaction2 does) or stay on the last
    frame (`pad="repeat_last"`).

    Attributes:
        num_frames, stride, clips: length of a clip, distance of its frames, number of clips.
        pad: "loop" or "repeat_last".
        target_fps: take frames as if the video had this rate: the span is scaled by fps/target_fps.
    """

    num_frames: int = 8
    stride: int = 16
    clips: int = 1
    pad: str = "loop"
    target_fps: float | None = None

    def sample(
        self, length: int, *, train: bool = False, rng: np.random.Generator | None = None, fps: float | None = None
    ) -> Indices:
        """Indices `(clips, num_frames)`; `fps` is needed with `target_fps`."""
        _check(self, length)
        if self.pad not in ("loop", "repeat_last"):
            raise InputError(f"pad must be 'loop' or 'repeat_last', not {self.pad!r}.")
        ratio = self._ratio(fps)
        span = self.num_frames * self.stride * ratio if train else ((self.num_frames - 1) * self.stride + 1) * ratio
        offsets = self._train_offsets(length, span, _generator(rng)) if train else self._offsets(length, span)
        steps = np.arange(self.num_frames) * self.stride
        if self.target_fps is not None:
            steps = np.linspace(0, max(span - 1, 0), self.num_frames).astype(np.int64)
        indices = offsets[:, None] + steps[None]
        return indices % length if self.pad == "loop" else np.minimum(indices, length - 1)

    def _ratio(self, fps: float | None) -> float:
        if self.target_fps is None:
            return 1.0
        if not self.target_fps > 0 or fps is None or not fps > 0:
            raise InputError(f"target_fps={self.target_fps} needs the video's fps, got {fps}.")
        return fps / self.target_fps

    def _offsets(self, n: int, span: float) -> Indices:
        room = max(n - span, 0)
        if self.clips == 1:
            return np.array([int(room // 2)], dtype=np.int64)
        return np.round(np.arange(self.clips) * room / (self.clips - 1)).astype(np.int64)

    def _train_offsets(self, n: int, span: float, rng: np.random.Generator) -> Indices:
        c = self.clips
        average = int((n - span + 1) // c)
        if average > 0:
            return np.arange(c) * average + rng.integers(0, average, size=c)
        if n > max(c, span):
            return np.sort(rng.integers(0, int(n - span + 1), size=c))
        if average == 0:
            return np.round(np.arange(c) * (n - span + 1) / c).astype(np.int64)
        return np.zeros(c, dtype=np.int64)


def window_starts(duration: float, window: float, hop: float | None = None) -> Indices:
    """Start times of windows of `window` seconds, `hop` seconds apart, from the start of `duration` on.

    Where more than a quarter of a hop would stay behind the last, one more ends with `duration`.
    """
    if not window > 0 or (hop is not None and not hop > 0):
        raise InputError(f"window and hop must be positive seconds, not {window} and {hop}.")
    hop = hop or window
    last = max(duration - window, 0.0)
    starts = np.arange(0.0, last + 1e-9, hop)
    if last - starts[-1] > 0.25 * hop:
        starts = np.append(starts, last)
    return starts
