"""The system: frames go in one after the other, a path and a labelled map come out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mmkit.errors import InputError, InterruptedRun, RunDiffersError
from mmkit.pointcloud.slam import gicp, loops, storage
from mmkit.pointcloud.slam.depths import aligned_depth
from mmkit.pointcloud.slam.frames import Frames, RGBDFrame
from mmkit.pointcloud.slam.keyframes import Keyframe, KeyframeSelector
from mmkit.pointcloud.slam.mapping import add_gaussians, fit_window
from mmkit.pointcloud.slam.model import scene_radius
from mmkit.pointcloud.slam.poses import inverse
from mmkit.pointcloud.slam.state import SlamState
from mmkit.pointcloud.slam.tracking import Tracked, extrapolated, photometric
from mmkit.storage import folder_lock
from mmkit.storage.folders import check_free
from mmkit.training.setup import StopSignals


@dataclass(frozen=True)
class Step:
    """What became of a frame: its camera-to-world pose, whether it was tracked, and what mapping did."""

    index: int
    pose: Tensor
    tracked: bool
    relocalised: bool
    loss: float
    share: float
    keyframe: bool
    mapped: bool
    added: int
    gaussians: int
    map_loss: float
    track_seconds: float
    map_seconds: float


class HierSLAM(SlamState):
    """Semantic SLAM on a map of Gaussians. The world is the first camera's frame; `poses` are camera to world.

    Args:
        config: settings, or the name of a preset.
        tree: of the labels; without one (and without `semantics="flat"`) labels are left out.
        backend: of `mmkit.ops.rasterization`.
        labeler: gives labels to frames that have none: colours (H, W, 3) uint8 to ids (H, W), or to scores (H, W, K) of the tree's
            classes, as open-vocabulary segmenters give. It is asked for mapped frames only.
        depth_source: gives depths to frames (a monocular run): colours and K to depths (H, W) up to scale and shift, which are
            fitted to the map's (arXiv 2502.14931).

    Raises:
        BackendUnavailableError: the tracker "gicp" without `small_gicp`.

    Example:
        >>> from mmkit.pointcloud.slam import HierSLAM, HierSLAMConfig, SyntheticRoom
        >>> room = SyntheticRoom(frames=3, width=64, height=48)
        >>> slam = HierSLAM(HierSLAMConfig.preset("cpu_small", map_every=1, map_iters=4, track_iters=2), room.tree)
        >>> steps = slam.run(room, progress=False)
        >>> [s.tracked for s in steps]
        [True, True, True]
    """

    # ------------------------------------------------------------------------------------------------------- one frame

    def step(self, frame: RGBDFrame) -> Step:
        """Track one frame, and map it if it is its turn.

        Raises:
            InputError: a first frame without depth.
        """
        c, index = self.config, len(self.poses)
        self.seen = None
        started = time.perf_counter()
        guess = extrapolated(self.poses, moving=not self.tracked or self.tracked[-1])
        if self.depth_source is not None:
            frame = aligned_depth(frame, self.depth_source, self, guess)
        small = frame.resized(c.resolution)
        if index == 0 and not bool((small.depth > 0).any()):
            raise InputError(
                f"Frame {frame.name}: the first frame has no depth at all, so there is nothing to begin a map with."
            )
        points = self.scans.thin(frame) if self.tracker == "gicp" else None
        relocalised = False
        if index == 0:
            tracked, good = Tracked(self._first_pose(frame), 0.0, 1.0), True
        else:
            tracked = self._track(frame, small, guess, points)
            good = self.tracker in ("constant", "given") or not self.detector.lost(tracked)
            if not good:
                tracked, relocalised = self._relocalise(small, guess, points)
                good = relocalised
                if not good:
                    warnings.warn(
                        f"Frame {index} ({frame.name}): tracking is lost; the map is left alone.", stacklevel=2
                    )
        self.poses.append(tracked.pose)
        self.tracked.append(good)
        middle = time.perf_counter()
        keyframe = good and (index == 0 or (index + 1) % c.keyframe_every == 0)
        mapped = good and (index == 0 or (index + 1) % c.map_every == 0)
        if good and points is not None and (index % c.scan_every == 0 or relocalised):
            self.scans.insert(index, points, tracked.pose)
        added, map_loss = 0, float("nan")
        if keyframe or mapped:
            present = Keyframe(index, self._labelled(small), inverse(tracked.pose).float())
            if index == 0:
                self.radius = scene_radius(small.depth)
            if mapped:
                added, map_loss = self._map(present)
            if keyframe:
                self._keep(present)
                if c.loop_closure and points is not None and loops.close_loop(self, present, points):
                    tracked.pose = self.poses[-1]
        return Step(
            index, self.poses[-1], good, relocalised, tracked.loss, tracked.share, keyframe, mapped, added, len(self.map), map_loss,
            middle - started, time.perf_counter() - middle,
        )  # fmt: skip

    def _first_pose(self, frame: RGBDFrame) -> Tensor:
        if self.tracker == "given" and frame.pose is None:
            raise InputError(f'Frame {frame.name} has no pose; the tracker "given" needs one for every frame.')
        self._origin = frame.pose
        return torch.eye(4, dtype=torch.float64)

    def _track(self, frame: RGBDFrame, small: RGBDFrame, guess: Tensor, points: Any) -> Tracked:
        """The frame's pose, by the tracker of the settings."""
        c = self.config
        if self.tracker == "given":
            if frame.pose is None or self._origin is None:
                raise InputError(f'Frame {frame.name} has no pose; the tracker "given" needs one for every frame.')
            return Tracked(inverse(self._origin) @ frame.pose, 0.0, 1.0)
        if self.tracker == "constant":
            return Tracked(guess, 0.0, 1.0)
        if self.tracker == "photometric":
            return photometric(self.map, small, guess, c, self.backend)
        guess, found = self._geometry(small, points, guess)
        if not c.refine_iters:
            return Tracked(guess, 0.0, found)
        rates = (c.refine_lr_rotation, c.refine_lr_translation)
        tracked = photometric(self.map, small, guess, c, self.backend, iterations=c.refine_iters, rates=rates)
        tracked.share = min(tracked.share, found)
        return tracked

    def _geometry(self, small: RGBDFrame, points: Any, guess: Tensor) -> tuple[Tensor, float]:
        """Align the scan; where few points find partners, the camera moved far: look around."""
        pose, found = self.scans.align(points, guess)
        if found >= 0.5 or len(points) < gicp.LEAST:
            return pose, found
        start = self.poses[-1]
        near = loops.searched(self, small, points, [guess, start] if not torch.equal(guess, start) else [start])
        return (pose, found) if near is None else near

    def _relocalise(self, small: RGBDFrame, guess: Tensor, points: Any) -> tuple[Tracked, bool]:
        """Where a lost camera is, or the guess and `False`."""
        found = loops.relocalised(self, small, points) if self.config.relocalise else None
        return (Tracked(guess, float("nan"), 0.0), False) if found is None else (found, True)

    def _labelled(self, small: RGBDFrame) -> RGBDFrame:
        """The frame with class numbers for labels, or without any."""
        if self.code_tree is None or self.tree is None:
            return dataclasses.replace(small, labels=None)
        ids = small.labels
        if ids is None and self.labeler is not None:
            said = torch.as_tensor(self.labeler(small.color))
            size = tuple(small.depth.shape)
            if tuple(said.shape) == (*size, self.tree.num_classes):
                return dataclasses.replace(small, labels=said.argmax(-1))
            if tuple(said.shape) != size:
                raise InputError(
                    f"The labeler must return ids {size} or scores {(*size, self.tree.num_classes)}; it returned {tuple(said.shape)}."
                )
            ids = said.long()
        if ids is None:
            return small
        leaves = self.tree.leaf_of(ids)
        strange = set(ids[leaves < 0].unique().tolist()) - self.unknown_labels
        if strange:
            self.unknown_labels |= strange
            text = f"labels {sorted(strange)[:8]} are not in the tree; their pixels are not learned."
            warnings.warn(f"Frame {small.name}: {text}", stacklevel=3)
        return dataclasses.replace(small, labels=leaves)

    def _map(self, present: Keyframe) -> tuple[int, float]:
        c = self.config
        first = len(self.map) == 0
        added = add_gaussians(self.map, present.frame, present.view, present.index, c, self.generator, self.backend)
        if not len(self.map):
            return added, float("nan")
        selector = KeyframeSelector(c.window, self.generator)
        chosen = selector.choose(present.frame, present.view, self.keyframes)
        window = [self.keyframes[i] for i in chosen] + [present]
        iterations = c.first_map_iters if first and c.first_map_iters is not None else c.map_iters
        loss = fit_window(
            self.map,
            window,
            c,
            self.generator,
            iterations,
            self.radius,
            self.loss,
            self.head,
            self.head_optimizer,
            self.backend,
        )
        return added, loss

    def _keep(self, present: Keyframe) -> None:
        """Add a keyframe; beyond the bound the one between the nearest neighbours in time goes."""
        self.keyframes.append(present)
        if len(self.keyframes) > self.config.max_keyframes:
            numbers = [k.index for k in self.keyframes]
            gaps = [numbers[i + 1] - numbers[i - 1] for i in range(1, len(numbers) - 1)]
            del self.keyframes[1 + gaps.index(min(gaps))]

    # ----------------------------------------------------------------------------------------------------- many frames

    def run(
        self, sequence: Frames, *, output: str | os.PathLike[str] | None = None, resume: bool = True, save_every: int = 20,
        progress: bool = True, callbacks: Iterable[Callable[[HierSLAM, Step], None]] = (),
    ) -> list[Step]:  # fmt: skip
        """Step through a sequence, from where this system stands.

        Args:
            sequence: frames.
            output: a folder that keeps the state every `save_every` frames, at the end, and when Ctrl-C or SIGTERM ends the run; with
                `resume` it goes on from there and ends as if nothing had happened.
            callbacks: called after every frame with the system and the step; what they raise ends the run.

        Returns:
            The steps taken by this call.

        Raises:
            InputError: the folder's state is of another sequence or of other settings (`RunDiffersError`), or another run uses it.
            StorageError: the state cannot be written; the folder keeps the one before.
            InterruptedRun: by Ctrl-C or SIGTERM, with the state saved.
        """
        steps: list[Step] = []
        listeners = list(callbacks)
        with (
            self._kept(sequence, output, resume) as keep,
            tqdm(total=len(sequence), initial=len(self), disable=not progress, desc="mapping", unit="frame") as bar,
        ):
            for index in range(len(self), len(sequence)):
                frame = sequence[index]
                steps.append(self.step(frame))
                bar.update()
                bar.set_postfix(loss=f"{steps[-1].loss:.4f}", gaussians=len(self.map), lost=self.tracked.count(False))
                keep(frame, (index + 1) % save_every == 0 or index + 1 == len(sequence))
                for listener in listeners:
                    listener(self, steps[-1])
        return steps

    @contextlib.contextmanager
    def _kept(
        self, sequence: Frames, output: str | os.PathLike[str] | None, resume: bool
    ) -> Iterator[Callable[[RGBDFrame, bool], None]]:
        """Yield what is to be called with each frame and whether the state is due; the folder is ours meanwhile."""
        if output is None:
            self._require_same(sequence, "this system")
            yield lambda frame, due: None
            return
        check_free(output, (storage.KIND,))
        with folder_lock(output, beside=True) as folder, StopSignals() as signals:
            if resume and (folder / "mmkit.json").is_file() and not self.poses:
                storage.restore(self, folder)
            self._require_same(sequence, folder)

            def keep(frame: RGBDFrame, due: bool) -> None:
                if due or signals.number:
                    self.seen = sequence[0].digest() + frame.digest()
                    storage.save(self, folder)
                if signals.number:
                    raise InterruptedRun(len(self), signals.number, folder)

            yield keep

    def _require_same(self, sequence: Frames, where: object) -> None:
        """Raise `RunDiffersError` unless `sequence` begins with what was seen."""
        if len(self) > len(sequence):
            raise RunDiffersError(where, {"data": f"another recording: {len(self)} frames are now {len(sequence)}"})
        if self.seen is not None and self.seen != sequence[0].digest() + sequence[len(self) - 1].digest():
            raise RunDiffersError(where, {"data": "another recording: its first or its latest frame differs"})

    # ------------------------------------------------------------------------------------------------------------ files

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write everything that `load` needs to go on, into a folder."""
        return storage.save(self, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], **options: Any) -> HierSLAM:
        """Read a folder of `save`; `options`: backend, labeler, depth_source."""
        slam = cls(*storage.settings(folder), **options)
        storage.restore(slam, folder)
        return slam

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write the map as splats: .ply (with an int `label`: the tree's id, -1 without labels), .splat, .spz, .sog or .glb."""
        return storage.export(self, path)


HiSLAM = HierSLAM
"""The name of the first version of the paper."""
