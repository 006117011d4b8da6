"""The result: what happens in a video, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmkit.results import Result, chart_text, figure_image, json_text, png


@dataclass(frozen=True)
class Window:
    """One stretch of the video: `start` and `end` in seconds, and the score of every class `(num_classes,)`."""

    start: float
    end: float
    scores: np.ndarray[Any, Any]


@dataclass(frozen=True)
class VideoClassification(Result):
    """Answer for one video.

    Attributes:
        labels, scores: the best classes, best first, scores in 0..1, averaged over the windows.
        windows: per window, in time order.
        class_names: all classes.
        strip: the frames the first window's clip is made of, uint8 `(T, H, W, 3)`, and `strip_seconds` their times.
        path, duration, num_frames, fps, num_replaced, num_corrupt: of the video, see `Clip`.
    """

    labels: tuple[str, ...]
    scores: tuple[float, ...]
    windows: tuple[Window, ...]
    class_names: tuple[str, ...]
    strip: np.ndarray[Any, Any]
    strip_seconds: np.ndarray[Any, Any]
    path: str
    duration: float
    num_frames: int
    fps: float
    num_replaced: int = 0
    num_corrupt: int = 0

    @property
    def damage(self) -> str:
        """What was damaged in the video, as a sentence; empty when nothing was."""
        if not (self.num_replaced or self.num_corrupt):
            return ""
        return (
            f"The video is damaged: {self.num_replaced} frames were replaced by a neighbour and {self.num_corrupt} packets or "
            "frames are bad, so the answer may be wrong."
        )

    @property
    def label(self) -> str:
        """The best class."""
        return self.labels[0]

    def segments(self) -> list[dict[str, Any]]:
        """Per window its start, end (seconds), best label and score."""
        best = [int(w.scores.argmax()) for w in self.windows]
        return [
            {"start": w.start, "end": w.end, "label": self.class_names[i], "score": float(w.scores[i])}
            for w, i in zip(self.windows, best, strict=True)
        ]

    def formats(self) -> dict[str, Callable[[], bytes]]:
        """`.json`: labels, scores and windows; `.png`: the picture `plot` draws."""
        top = [{"label": a, "score": b} for a, b in zip(self.labels, self.scores, strict=True)]
        facts = {"path": self.path, "duration": self.duration, "num_frames": self.num_frames, "fps": self.fps}
        record = {
            **facts,
            "num_replaced": self.num_replaced,
            "num_corrupt": self.num_corrupt,
            "top": top,
            "windows": self.segments(),
        }
        return {".json": lambda: json_text(record), ".png": lambda: png(self.plot())}

    def plot(self) -> Image.Image:
        """The sampled frames, and the best classes' scores over time."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        top, bottom = figure.subplots(2, 1, height_ratios=(1, 1.4))
        top.imshow(np.concatenate(list(self.strip), axis=1))
        top.set_axis_off()
        shown = f"{chart_text(Path(self.path).name)}: {chart_text(self.label)} ({self.scores[0]:.0%})"
        top.set_title(shown, loc="left")
        for label in self.labels:
            index = self.class_names.index(label)
            times = [t for w in self.windows for t in (w.start, w.end)]
            bottom.plot(
                times, [float(w.scores[index]) for w in self.windows for _ in range(2)], label=chart_text(label)
            )
        bottom.set(xlabel="seconds", ylabel="score", ylim=(-0.03, 1.03), xlim=(0, max(self.duration, 1e-3)))
        bottom.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        return figure_image(figure)
