"""What happens in a video, and when: a path in, labels with scores and times out."""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmkit.backbones import load_weights
from mmkit.errors import InputError
from mmkit.pipelines import Pipeline, finite
from mmkit.video.frames import Clip
from mmkit.video.io import VideoReader
from mmkit.video.samplers import DenseSampler, UniformSampler, window_starts
from mmkit.video.transforms import ClipTransform
from mmkit.video.zeroi2v.model import VideoClassifier
from mmkit.video.zeroi2v.result import VideoClassification, Window
from mmkit.weights import list_weights, weight_entry


class VideoClassificationPipeline(Pipeline):
    """`mmkit.pipeline("video-classification")`.

    With no model the bundled default answers in which direction one object moves over still ground, or that the whole picture moves, as
    under a panning camera. Several objects that go different ways and actions are out of its reach; see `mmkit.weights.weight_entry`.

    Example:
        >>> import mmkit, tempfile
        >>> from mmkit.data.drawn.motion import drawn_motion
        >>> from mmkit.video import write_video
        >>> clips, _ = drawn_motion(1, torch.Generator().manual_seed(0), num_frames=24, label=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_video(f"{folder}/clip.mp4", (255 * clips[0]).byte().permute(0, 2, 3, 1))
        ...     result = mmkit.pipeline("video-classification")(path, top_k=3)
        >>> result.label
        'moves right'
    """

    task = "video-classification"
    default_weights = "video_motion"

    def load(self, model: str | os.PathLike[str]) -> nn.Module:
        """A bundled name, or a folder written by `VideoClassifier.save_pretrained`."""
        if str(model) in list_weights() and weight_entry(str(model)).model == "video_classifier":
            return load_weights(str(model))
        return VideoClassifier.from_pretrained(model)

    def example(self) -> tuple[torch.Tensor, ...]:
        """A clip in numbers, (1, T, 3, H, W)."""
        model: Any = self.model
        return (torch.zeros(1, model.num_frames, 3, model.img_size, model.img_size),)

    @torch.no_grad()
    def __call__(
        self,
        video: str | os.PathLike[str],
        *,
        top_k: int = 5,
        window: float | None = None,
        hop: float | None = None,
        num_crops: int = 1,
        backwards: bool = False,
        tolerance: float = 0.5,
        backend: str = "auto",
        progress: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> VideoClassification:
        """Classify a video file, or a folder of pictures.

        Args:
            video: its path.
            top_k: number of labels to return.
            window: length in seconds of the stretches that get their own answer; `None` takes the whole video as one.
            hop: seconds from one window to the next; default `window`.
            num_crops: 1 (centre) or 3 views of each frame, averaged.
            backwards: show every window to the model in reverse.
            tolerance, backend: see `VideoReader`.
            progress: show a bar for long videos.
            on_progress: called with (windows done, windows in total); may raise to cancel.

        Raises:
            VideoDecodeError: the file cannot be read.
            InputError: another argument is out of range, or a model that answers with NaN or infinite values.
        """
        model = self.model
        if not isinstance(model, VideoClassifier):
            raise InputError(f"The video-classification pipeline needs a VideoClassifier, not {type(model).__name__}.")
        if top_k < 1:
            raise InputError(f"top_k must be at least 1, not {top_k}.")
        sampler: Any = UniformSampler(model.num_frames)
        if model.stride:
            sampler = DenseSampler(model.num_frames, model.stride)
        prepare = ClipTransform(model.img_size, model.mean, model.std, num_crops=num_crops)
        with VideoReader(video, tolerance=tolerance, backend=backend) as reader:
            spans = _spans(reader, window, hop)
            chosen = [first + sampler.sample(last - first + 1, fps=reader.fps)[0] for first, last in spans]
            windows: list[Window] = []
            strip = np.zeros((0, 1, 1, 3), np.uint8)
            bar = tqdm(total=len(spans), desc="windows", unit="window", disable=not progress or len(spans) < 8)
            with bar:
                for (first, last), clip in zip(spans, _clips(reader, chosen, model.img_size), strict=True):
                    frames = clip.frames[::-1] if backwards else clip.frames
                    strip = frames if not windows else strip
                    views = prepare(torch.from_numpy(frames.copy()).permute(0, 3, 1, 2))[0]
                    logits = model(_batch(views).to(self.device, self.dtype))
                    scores = finite(logits).softmax(-1).mean(0).cpu().numpy()
                    windows.append(Window(*_times(reader, first, last), scores))
                    bar.update()
                    if on_progress is not None:
                        on_progress(len(windows), len(spans))
            mean = np.mean([w.scores for w in windows], axis=0)
            order = np.argsort(-mean, kind="stable")[: min(top_k, len(mean))]
            return VideoClassification(
                labels=tuple(model.class_names[i] for i in order),
                scores=tuple(float(mean[i]) for i in order),
                windows=tuple(windows),
                class_names=model.class_names,
                strip=strip,
                strip_seconds=reader.seconds[chosen[0]][:: -1 if backwards else 1],
                path=str(reader.path),
                duration=reader.duration,
                num_frames=len(reader),
                fps=reader.fps,
                num_replaced=reader.num_replaced,
                num_corrupt=reader.num_corrupt,
            )

    @torch.no_grad()
    def compare_merged(self, *, num_frames: int | None = None, rounds: int = 5, seed: int = 0) -> dict[str, Any]:
        """What merging changes: the largest difference of the scores, and the cost of either form.

        Args:
            num_frames: clip length, default the model's.
            rounds: timed calls of each form, in turns.
            seed: of the random clip.

        Returns:
            `difference` (largest, of logits), `milliseconds` and `parameters` of "unmerged" and "merged" (CPU time on the
            CPU, median), and `time_ratio` merged / unmerged.

        Raises:
            InputError: the model has no linear adapters left to merge.
        """
        model = self.model
        if not isinstance(model, VideoClassifier) or model.merged:
            raise InputError("This model is merged already, or has no linear adapters: there is nothing to compare.")
        forms = {"unmerged": model, "merged": copy.deepcopy(model).merge()}
        generator = torch.Generator().manual_seed(seed)
        shape = (1, num_frames or model.num_frames, 3, model.img_size, model.img_size)
        clip = torch.randn(shape, generator=generator).to(self.device, self.dtype)
        logits = {k: m(clip).float() for k, m in forms.items()}
        times: dict[str, list[float]] = {k: [] for k in forms}
        for _ in range(max(1, rounds)):
            for name, form in forms.items():
                start = time.process_time()
                form(clip)
                if clip.is_cuda:
                    torch.cuda.synchronize()
                times[name].append(1000 * (time.process_time() - start))
        cost = {k: statistics.median(v) for k, v in times.items()}
        return {
            "difference": float((logits["merged"] - logits["unmerged"]).abs().max()),
            "milliseconds": cost,
            "parameters": {k: _parameters(m) for k, m in forms.items()},
            "time_ratio": cost["merged"] / max(cost["unmerged"], 1e-9),
        }


def _parameters(model: VideoClassifier) -> int:
    """Values a deployed model holds; the trained copy of a norm stands in for the original."""
    own = {k for k, _ in model.named_parameters()}
    copies = {k for k in own if k.startswith("zeroi2v.") and f"backbone.{k.removeprefix('zeroi2v.')}" in own}
    return sum(p.numel() for k, p in model.named_parameters() if k not in copies)


def _batch(views: Tensor) -> Tensor:
    return views if views.dim() == 5 else views[None]


def _times(reader: VideoReader, first: int, last: int) -> tuple[float, float]:
    end = float(reader.seconds[last + 1]) if last + 1 < len(reader) else reader.duration
    return float(reader.seconds[first]), end


def _spans(reader: VideoReader, window: float | None, hop: float | None) -> list[tuple[int, int]]:
    """First and last frame of every window."""
    if window is None:
        return [(0, len(reader) - 1)]
    spans = []
    for start in window_starts(reader.duration, window, hop):
        first = reader.index_at(float(start) + 0.5 / reader.fps)
        last = max(first, reader.index_at(float(start) + window - 0.5 / reader.fps))
        spans.append((first, last))
    return spans


def _clips(reader: VideoReader, chosen: list[np.ndarray[Any, Any]], size: int) -> Any:
    """The clips of all windows from one decoding pass; frames are dropped as soon as no window needs them."""
    last_use = {int(i): n for n, indices in enumerate(chosen) for i in indices}
    frames: dict[int, np.ndarray[Any, Any]] = {}
    stream = reader.stream(last_use, size=size)
    for n, indices in enumerate(chosen):
        while any(int(i) not in frames for i in indices):
            index, frame = next(stream)
            frames[index] = frame
        if n == len(chosen) - 1:
            for _ in stream:  # lets the reader judge the damage
                continue
        yield Clip(
            frames=np.stack([frames[int(i)] for i in indices]),
            indices=indices,
            seconds=reader.seconds[indices],
            num_frames=len(reader),
            fps=reader.fps,
            duration=reader.duration,
            path=str(reader.path),
            backend=reader.backend,
        )
        frames = {i: f for i, f in frames.items() if last_use[i] > n}
