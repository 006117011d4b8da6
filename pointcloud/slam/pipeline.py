"""A recording of a depth camera goes in; its path, a labelled map and a report come out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch

from mmkit.devices import resolve_device, resolve_dtype
from mmkit.errors import InputError
from mmkit.pipelines import Pipeline
from mmkit.pointcloud.slam.config import HierSLAMConfig
from mmkit.pointcloud.slam.datasets import RGBDSequence, open_sequence
from mmkit.pointcloud.slam.evaluation import evaluate
from mmkit.pointcloud.slam.frames import Frames, RGBDFrame
from mmkit.pointcloud.slam.model import SemanticGaussians
from mmkit.pointcloud.slam.result import SlamResult
from mmkit.pointcloud.slam.synthetic import SyntheticRoom
from mmkit.pointcloud.slam.system import HierSLAM, Step
from mmkit.pointcloud.slam.tree import SemanticTree
from mmkit.pointcloud.slam.video import SUFFIXES, RGBDVideo
from mmkit.storage.files import expanded


class SemanticSLAMPipeline(Pipeline):
    """`pipeline("semantic-slam")`: there are no weights, `model` is a preset's name or a `HierSLAMConfig`.

    Args:
        model: "cpu_small" (default), "cpu_live", "replica", "scannet", "tum", or settings.
        tree: of the labels, for data that bring none: a `SemanticTree` or its file.
        labeler, depth_source, backend: of `HierSLAM`.
        settings: changes of the preset.

    Example:
        >>> import mmkit
        >>> slam = mmkit.pipeline("semantic-slam", map_every=1, map_iters=4, track_iters=2)
        >>> from mmkit.pointcloud.slam import SyntheticRoom
        >>> result = slam(SyntheticRoom(frames=2, width=64, height=48), progress=False)
        >>> result.poses.shape
        (2, 4, 4)
    """

    task: ClassVar[str] = "semantic-slam"
    default_weights: ClassVar[str] = "cpu_small"

    def __init__(
        self, model: HierSLAMConfig | str | None = None, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto",
        tree: SemanticTree | str | os.PathLike[str] | None = None, labeler: Callable[..., Any] | None = None,
        depth_source: Callable[..., Any] | None = None, backend: str = "auto", **settings: Any,
    ):  # fmt: skip
        if resolve_dtype(dtype, torch.float32) != torch.float32:
            raise InputError("Maps are float32; leave dtype out.")
        self.device, self.dtype = resolve_device(device), torch.float32
        if isinstance(model, HierSLAMConfig):
            self.settings = HierSLAMConfig(**{**model.to_dict(), **settings})
        elif model is None or isinstance(model, str):
            self.settings = HierSLAMConfig.preset(self.default_weights if model is None else model, **settings)
        else:
            raise InputError(f"model must be a preset's name or a HierSLAMConfig, not {type(model).__name__}.")
        self.tree = tree if isinstance(tree, SemanticTree) or tree is None else SemanticTree.from_json(tree)
        self.options = {"labeler": labeler, "depth_source": depth_source, "backend": backend}
        self.model = SemanticGaussians(0)

    def __call__(
        self, data: str | os.PathLike[str] | Frames | None = None, *, every: int = 1, output: str | os.PathLike[str] | None = None,
        resume: bool = True, depth: str | os.PathLike[str] | None = None, progress: bool = True,
        callbacks: Iterable[Callable[[HierSLAM, Step], None]] = (), judge_every: int = 1,
    ) -> SlamResult:  # fmt: skip
        """Map a recording.

        Args:
            data: a folder in one of the layouts of `open_sequence`, a sequence, or `None`: a drawn room.
            every: of a folder or a film, take every so many frames.
            depth: for a film as `data`, the folder of its depth pictures; a camera.json lies beside the film.
            output: a folder for the state, from which an interrupted run goes on.
            resume: do so.
            progress: show a bar.
            callbacks: called after every frame with the system and the step.
            judge_every: frames between those that the report's picture figures are of.
        """
        if isinstance(data, (str, os.PathLike)):
            sequence: Any = self._opened(expanded(data), every, depth)
        elif every != 1 or depth is not None:
            raise InputError("every and depth are for a folder or a film as data. Leave them out.")
        else:
            sequence = SyntheticRoom(frames=24) if data is None else _checked(data)
        tree = getattr(sequence, "tree", None) or self.tree
        slam = HierSLAM(self.settings, tree, **self.options)  # type: ignore[arg-type]
        wall, cpu = time.perf_counter(), time.process_time()
        steps = slam.run(sequence, output=output, resume=resume, progress=progress, callbacks=callbacks)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.model = slam.map
        clean = getattr(sequence, "clean", None)
        report = {
            **evaluate(slam, sequence, every=judge_every, reference=clean, with_scale=slam.depth_source is not None),
            "seconds": wall, "cpu_seconds": cpu, "frames_per_second": len(steps) / max(wall, 1e-9), "tracker": slam.tracker,
            "bytes": slam.bytes(), "loops_closed": len(slam.loops),
        }  # fmt: skip
        if tree is not None:
            report["storage"] = tree.storage()
        labels = slam.labels()
        ids = None if labels is None or tree is None else torch.tensor(tree.ids)[labels].int().numpy()
        truth = getattr(sequence, "trajectory", lambda: None)()
        return SlamResult(
            slam.trajectory().numpy(), torch.tensor(slam.tracked).numpy(), slam.map.as_splats(), ids,
            None if truth is None else truth[: len(slam)].numpy(), report, slam,
        )  # fmt: skip

    def _opened(self, path: Path, every: int, depth: str | os.PathLike[str] | None) -> RGBDSequence:
        """The recording at a path. Raises `InputError` for what would mean nothing with it."""
        film = path.suffix.lower() in SUFFIXES
        if film and depth is None:
            raise InputError(f"{path} is a film; give the folder of its depth pictures as `depth` (--depth).")
        if depth is not None and not film:
            raise InputError(
                f"{path} is no film ({', '.join(SUFFIXES)}), so `depth` (--depth) means nothing. Leave it out."
            )
        found = (
            RGBDVideo(path, depth, every=every)
            if film and depth is not None
            else open_sequence(path, tree=self.tree, every=every)
        )
        if self.tree is not None and found.labels is None and self.options["labeler"] is None:
            raise InputError(f"{path} holds no label pictures, so `tree` (--tree) means nothing. Leave it out.")
        return found


def _checked(data: Any) -> Any:
    """A sequence in memory. Raises `InputError` unless it is one of frames."""
    try:
        count, first = len(data), data[0] if len(data) else None
    except (TypeError, KeyError, AttributeError):
        count, first = 0, None
    if not count or not isinstance(first, RGBDFrame):
        raise InputError(
            f"A recording is a folder, or a sequence of at least one RGBDFrame, not {type(data).__name__} of {type(first).__name__}."
        )
    return data
