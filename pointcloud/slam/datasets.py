"""RGB-D sequences from the layouts people have: Replica, ScanNet, TUM, 7-Scenes, plain folders.

Frames are read one by one when they are asked for, labels too; nothing is kept.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkit.data.images import open_image
from mmkit.data.listing import is_hidden, natural
from mmkit.errors import InputError
from mmkit.pointcloud.slam.frames import RGBDFrame
from mmkit.pointcloud.slam.poses import rigid, rotation_matrix
from mmkit.pointcloud.slam.tree import SemanticTree
from mmkit.storage.files import expanded

PICTURES = (".png", ".jpg", ".jpeg")
Labeler = Callable[[Tensor], Tensor]
"""A segmenter: colours (H, W, 3) uint8 -> ids (H, W), or scores (H, W, K) in the order of the tree's classes."""


class RGBDSequence:
    """A list of pictures with depths; poses and labels may be missing.

    Args:
        colors, depths: files, one each a frame.
        K: (3, 3) of the pictures as they are stored; pixel centres at 0.5.
        depth_scale: stored units per metre.
        poses: camera to world, a (4, 4) each or `None` where unknown or not finite.
        labels: files of pixel values, or `None`.
        tree: of the labels.
        longest: shrink frames to so many pixels on the longer side.
        every: keep every so many frames.
        distortion: k1, k2, p1, p2, k3 of the lens; pictures are straightened.
        size: (width, height) the pictures are brought to first, for data sets whose depths are smaller than their pictures.
        name: for messages.

    Raises:
        InputError: no frames, unequal counts, or no camera: K or distortion are not finite numbers.
    """

    def __init__(
        self, colors: Sequence[Path], depths: Sequence[Path], K: np.ndarray, *, depth_scale: float = 1000.0,
        poses: Sequence[np.ndarray | None] | None = None, labels: Sequence[Path] | None = None, tree: SemanticTree | None = None,
        longest: int | None = None, every: int = 1, distortion: Sequence[float] = (), size: tuple[int, int] | None = None,
        name: str = "sequence",
    ):  # fmt: skip
        counts = {"pictures": len(colors), "depth pictures": len(depths)}
        counts |= {} if poses is None else {"poses": len(poses)}
        counts |= {} if labels is None else {"label pictures": len(labels)}
        if len(set(counts.values())) != 1:
            said = ", ".join(f"{n} {what}" for what, n in counts.items())
            raise InputError(f"{name}: the counts differ: {said}. Remove what has no partner.")
        if not colors:
            raise InputError(f"{name} has no frames.")
        if not 0 < depth_scale < math.inf:
            raise InputError(f"{name}: depth_scale must be above 0, not {depth_scale}.")
        if every < 1:
            raise InputError(f"every must be at least 1, not {every}.")
        self.colors, self.depths, self.tree, self.name = list(colors)[::every], list(depths)[::every], tree, name
        self.labels = None if labels is None else list(labels)[::every]
        self.K, self.depth_scale, self.longest, self.size = _camera(K, name), float(depth_scale), longest, size
        self.distortion = _lens(distortion, name)
        self.poses: list[Tensor | None] = [None] * len(self.colors)
        if poses is not None:
            self.poses = [_known(p, f"{name}, pose {every * i}") for i, p in enumerate(list(poses)[::every])]

    def __len__(self) -> int:
        return len(self.colors)

    def __iter__(self) -> Iterator[RGBDFrame]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> RGBDFrame:
        if not 0 <= index < len(self):
            raise IndexError(index)
        color = self._picture(index)
        stored = _single(self.depths[index])
        size = self.size or (stored.shape[1], stored.shape[0])
        if color.size != size:
            if abs(color.width / color.height - size[0] / size[1]) > 0.02:
                raise InputError(
                    f"{self.colors[index]} has {color.size} pixels, {self.depths[index].name} {stored.shape[::-1]}; their shapes differ."
                )
            scale = np.array([[size[0] / color.width], [size[1] / color.height], [1.0]])
            color = color.resize(size)
        else:
            scale = np.ones((3, 1))
        depth = np.where((stored > 0) & (stored < 65535), stored / self.depth_scale, 0).astype(np.float32)
        labels = None if self.labels is None else _single(self.labels[index]).astype(np.int64)
        if depth.shape != size[::-1]:
            depth = _nearest(depth, size)
        if labels is not None and labels.shape != depth.shape:
            labels = _nearest(labels, size)
        frame = RGBDFrame(
            torch.from_numpy(np.array(color)), torch.from_numpy(depth), torch.from_numpy(self.K * scale).float(),
            None if labels is None else torch.from_numpy(labels), self.poses[index], self.colors[index].name,
        )  # fmt: skip
        return straightened(frame, self.distortion).resized(self.longest)

    def _picture(self, index: int) -> Image.Image:
        return open_image(self.colors[index]).convert("RGB")

    def trajectory(self) -> Tensor | None:
        """True poses (F, 4, 4), NaN where unknown; `None` when none is known."""
        return stacked(self.poses)


def _camera(K: np.ndarray, name: str) -> np.ndarray:
    """K (3, 3). Raises `InputError` unless it is that of a camera."""
    K = np.asarray(K, np.float64)
    if K.shape != (3, 3) or not np.isfinite(K).all() or min(K[0, 0], K[1, 1]) <= 0:
        raise InputError(f"{name}: {K.tolist()} is no camera: 3 x 3 finite numbers, focal lengths above 0.")
    return K


def _lens(distortion: Any, name: str) -> tuple[float, ...]:
    try:
        found = tuple(float(d) for d in distortion)
    except (TypeError, ValueError):
        found = (math.nan,)
    if len(found) > 5 or not all(map(math.isfinite, found)):
        raise InputError(f"{name}: distortion is a list of k1, k2, p1, p2, k3, not {distortion!r}.")
    return found


def stacked(poses: Sequence[Tensor | None]) -> Tensor | None:
    """Poses as one tensor, NaN where unknown; `None` when none is known."""
    if all(p is None for p in poses):
        return None
    lost = torch.full((4, 4), math.nan, dtype=torch.float64)
    return torch.stack([lost if p is None else p for p in poses])


def _known(pose: np.ndarray | None, what: str) -> Tensor | None:
    """A pose, or `None` where it is missing or holds inf or nan (which means that it was lost)."""
    return (
        None
        if pose is None or not np.isfinite(pose).all()
        else rigid(torch.from_numpy(np.array(pose, np.float64)), what)
    )


def _single(path: Path) -> np.ndarray:
    """A picture with one channel, as stored."""
    values = np.asarray(open_image(path))
    if values.ndim == 3 and values.shape[2] in (3, 4) and (values[..., :1] == values[..., :3]).all():
        values = values[..., 0]
    if values.ndim != 2:
        raise InputError(f"{path} must have one channel (depths or labels); it has shape {values.shape}.")
    return values.astype(np.int64) if values.dtype.kind == "b" else values


def _nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows = ((np.arange(size[1]) + 0.5) * values.shape[0] / size[1]).astype(int)
    columns = ((np.arange(size[0]) + 0.5) * values.shape[1] / size[0]).astype(int)
    return values[rows][:, columns]


def straightened(frame: RGBDFrame, distortion: Sequence[float]) -> RGBDFrame:
    """The frame of a camera without lens distortion (k1, k2, p1, p2, k3): colours interpolated, depths of the nearest pixel."""
    if not any(distortion):
        return frame
    k1, k2, p1, p2, k3 = [*distortion, 0.0, 0.0, 0.0, 0.0, 0.0][:5]
    K, (height, width) = frame.K.double(), frame.depth.shape
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    x, y = (columns + 0.5 - K[0, 2]) / K[0, 0], (rows + 0.5 - K[1, 2]) / K[1, 1]
    r = x * x + y * y
    radial = 1 + r * (k1 + r * (k2 + r * k3))
    u = x * radial + 2 * p1 * x * y + p2 * (r + 2 * x * x)
    v = y * radial + p1 * (r + 2 * y * y) + 2 * p2 * x * y
    grid = torch.stack([2 * (u * K[0, 0] + K[0, 2]) / width - 1, 2 * (v * K[1, 1] + K[1, 2]) / height - 1], -1)[
        None
    ].float()

    def moved(values: Tensor, mode: str) -> Tensor:
        return torch.nn.functional.grid_sample(values[None], grid, mode=mode, align_corners=False)[0]

    color = (
        moved(frame.color.permute(2, 0, 1).float(), "bilinear").permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
    )
    depth = moved(frame.depth[None], "nearest")[0]
    labels = None if frame.labels is None else moved(frame.labels[None].float(), "nearest")[0].long()
    return RGBDFrame(color, depth, frame.K, labels, frame.pose, frame.name)


# ---------------------------------------------------------------------------------------------------------- the layouts


def intrinsics(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """K (3, 3) of focal lengths and centre, in pixels."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def folder_of(path: str | os.PathLike[str]) -> Path:
    """The folder of that path. Raises `InputError` when there is none."""
    folder = expanded(path)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder.")
    return folder


def pictures_of(folder: Path, pattern: str = "*") -> list[Path]:
    """The pictures of a folder whose names match, in natural order; hidden ones do not count."""
    found = [p for p in folder.glob(pattern) if p.suffix.lower() in PICTURES and not is_hidden(p.name)]
    return sorted(found, key=lambda p: natural(p.stem))


def _numbers(path: Path) -> np.ndarray:
    try:
        return np.array(
            [
                [float(x) for x in line.split()]
                for line in path.read_text().splitlines()
                if line.split() and line[0] != "#"
            ]
        )
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a table of numbers: {error}.") from error


def _matrix(path: Path) -> np.ndarray | None:
    """A (4, 4) from a file; `None` where the file is missing."""
    if not path.is_file():
        return None
    values = _numbers(path)
    if values.shape != (4, 4):
        raise InputError(f"{path} must hold a 4 x 4 matrix; it has shape {values.shape}.")
    return values


def _intrinsic(path: Path) -> np.ndarray:
    """K (3, 3) of a file that holds it, or a (4, 4) around it."""
    values = _numbers(path)
    if values.ndim != 2 or min(values.shape) < 3:
        raise InputError(f"{path} must hold a 3 x 3 or 4 x 4 matrix; it has shape {values.shape}.")
    return values[:3, :3]


class ReplicaDataset(RGBDSequence):
    """`results/frame*.jpg` (or .png) and `depth*.png`, `traj.txt`, `semantic_class/semantic_class_*.png`, `info_semantic_tree.json`.

    The centre of projection of its files is that of integer pixel centres; half a pixel is added.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        tree: SemanticTree | None = None,
        longest: int | None = None,
        every: int = 1,
    ):
        root = folder_of(folder)
        results = root / "results" if (root / "results").is_dir() else root
        values = _numbers(root / "traj.txt")
        if values.ndim != 2 or values.shape[1] != 16:
            raise InputError(f"{root / 'traj.txt'} must hold 16 numbers a line, a camera-to-world matrix.")
        labels = pictures_of(root / "semantic_class", "semantic_class_*") if (root / "semantic_class").is_dir() else []
        known = root / "info_semantic_tree.json"
        tree = SemanticTree.from_json(known) if tree is None and known.is_file() else tree
        about = root / "cam_params.json" if (root / "cam_params.json").is_file() else root.parent / "cam_params.json"
        K, scale = intrinsics(600.0, 600.0, 599.5, 339.5), 6553.5
        if about.is_file():
            usual = {"fx": 600.0, "fy": 600.0, "cx": 599.5, "cy": 339.5, "scale": scale}
            try:
                camera = {k: float(v) for k, v in json.loads(about.read_text()).get("camera", {}).items() if k in usual}
            except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(f"{about} must hold a camera with fx, fy, cx, cy and scale: {error!r}.") from error
            *lengths, scale = (usual | camera).values()
            K = intrinsics(*lengths)
        K[:2, 2] += 0.5
        super().__init__(
            pictures_of(results, "frame*"), pictures_of(results, "depth*"), K, depth_scale=scale,
            poses=list(values.reshape(-1, 4, 4)), labels=labels or None, tree=tree, longest=longest, every=every, name=root.name,
        )  # fmt: skip


class ScanNetDataset(RGBDSequence):
    """`color/*.jpg`, `depth/*.png`, `pose/*.txt` (inf: lost), `intrinsic/intrinsic_color.txt`, `label-filt/*.png`; sized as the depths."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        tree: SemanticTree | None = None,
        longest: int | None = None,
        every: int = 1,
    ):
        root = folder_of(folder)
        colors = pictures_of(root / "color")
        about = root / "intrinsic" / "intrinsic_color.txt"
        K = intrinsics(1169.62, 1167.11, 646.30, 489.93)
        if about.is_file():
            K = _intrinsic(about)
        place = next((root / n for n in ("label-filt", "label", "labels") if (root / n).is_dir()), None)
        super().__init__(
            colors, pictures_of(root / "depth"), K, poses=[_matrix(root / "pose" / f"{c.stem}.txt") for c in colors],
            labels=pictures_of(place) if place else None, tree=tree, longest=longest, every=every, name=root.name,
        )  # fmt: skip


class SevenScenesDataset(RGBDSequence):
    """`frame-*.color.*`, `.depth.png`, `.pose.txt`, and `camera-intrinsics.txt` where there is one (else 585, 320, 240)."""

    def __init__(self, folder: str | os.PathLike[str], *, longest: int | None = None, every: int = 1):
        root = folder_of(folder)
        colors = pictures_of(root, "*.color.*")
        names = [c.name.split(".")[0] for c in colors]
        about = root / "camera-intrinsics.txt"
        K = _intrinsic(about) if about.is_file() else intrinsics(585.0, 585.0, 320.0, 240.0)
        super().__init__(
            colors, [root / f"{n}.depth.png" for n in names], K, poses=[_matrix(root / f"{n}.pose.txt") for n in names],
            longest=longest, every=every, name=root.name,
        )  # fmt: skip


_TUM = {
    "freiburg1": ((517.3, 516.5, 318.6, 255.3), (0.2624, -0.9531, -0.0054, 0.0026, 1.1633)),
    "freiburg2": ((520.9, 521.0, 325.1, 249.7), (0.2312, -0.7849, -0.0033, -0.0001, 0.9172)),
    "freiburg3": ((535.4, 539.2, 320.1, 247.6), ()),
}


class TUMDataset(RGBDSequence):
    """`rgb.txt`, `depth.txt`, `groundtruth.txt`: paired by nearest time within 0.08 s, thinned to 32 frames a second.

    Intrinsics and lens by the folder's name (freiburg1, 2 or 3), or `K` and `distortion`.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, K: np.ndarray | None = None, distortion: Sequence[float] | None = None,
        depth_scale: float = 5000.0, longest: int | None = None, every: int = 1, apart: float = 0.08,
    ):  # fmt: skip
        root = folder_of(folder)
        colors, depths = (_timed(root / f"{n}.txt") for n in ("rgb", "depth"))
        truth = _numbers(root / "groundtruth.txt") if (root / "groundtruth.txt").is_file() else np.zeros((0, 8))
        if len(truth) and truth.shape[1] != 8:
            raise InputError(f"{root / 'groundtruth.txt'} must hold 8 numbers a line: t tx ty tz qx qy qz qw.")
        kind = next((k for k in _TUM if k in root.name or f"fr{k[-1]}" in root.name), "freiburg1")
        chosen, last = [], -math.inf
        for time, file in colors:
            near = min(depths, key=lambda row: abs(row[0] - time))
            if abs(near[0] - time) < apart and time - last > 1 / 32:
                chosen.append((time, root / file, root / near[1]))
                last = time
        poses = [_pose_at(truth, time, apart) for time, _, _ in chosen] if len(truth) else None
        super().__init__(
            [c[1] for c in chosen], [c[2] for c in chosen], intrinsics(*_TUM[kind][0]) if K is None else K, depth_scale=depth_scale,
            poses=poses, longest=longest, every=every, distortion=_TUM[kind][1] if distortion is None else distortion, name=root.name,
        )  # fmt: skip


def _timed(path: Path) -> list[tuple[float, str]]:
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        found = [(float(line[0]), line[1]) for line in lines]
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path} must hold a time and a file name a line: {error}.") from error
    if not found:
        raise InputError(f"{path} lists no pictures.")
    return found


def _pose_at(truth: np.ndarray, time: float, apart: float) -> np.ndarray | None:
    near = int(np.abs(truth[:, 0] - time).argmin())
    return pose_of_line(truth[near, 1:]) if abs(truth[near, 0] - time) < apart else None


def pose_of_line(values: np.ndarray) -> np.ndarray:
    """Camera to world (4, 4) of tx ty tz qx qy qz qw."""
    out = np.eye(4)
    out[:3, :3] = rotation_matrix(torch.from_numpy(values[[6, 3, 4, 5]].astype(np.float64))).numpy()
    out[:3, 3] = values[:3]
    return out


def camera_of(path: Path) -> tuple[dict[str, Any], np.ndarray, float]:
    """What a camera.json holds: everything, K (3, 3), and the stored units of depth per metre."""
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return (
            about,
            intrinsics(*(float(about[k]) for k in ("fx", "fy", "cx", "cy"))),
            float(about.get("depth_scale", 1000.0)),
        )
    except FileNotFoundError:
        raise InputError(f'{path.parent} needs a camera.json with "fx", "fy", "cx", "cy" and "depth_scale".') from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} must hold fx, fy, cx, cy and depth_scale: {error!r}.") from error


class RGBDFolder(RGBDSequence):
    """Your own data: `color/` (or `rgb/`), `depth/`, `camera.json`, and, if you have them, poses and `labels/`.

    `camera.json` holds fx, fy, cx, cy and depth_scale (stored units per metre, default 1000). Poses are camera to world: `pose.txt` with
    tx ty tz qx qy qz qw a line (a time before it or not) or 16 numbers a line, or `pose/<name>.txt` with a matrix each; inf or nan means
    lost. `labels/` holds pixel values, which `tree.json` or `tree` gives a meaning.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        tree: SemanticTree | None = None,
        longest: int | None = None,
        every: int = 1,
    ):
        root = folder_of(folder)
        about, K, scale = camera_of(root / "camera.json")
        colors = pictures_of(root / "color" if (root / "color").is_dir() else root / "rgb")
        depths = pictures_of(root / "depth")
        labels = pictures_of(root / "labels") if (root / "labels").is_dir() else []
        known = root / "tree.json"
        tree = SemanticTree.from_json(known) if tree is None and known.is_file() else tree
        poses = _poses(root, colors)
        super().__init__(
            colors, depths, K, depth_scale=scale, poses=poses, labels=labels or None, tree=tree, longest=longest, every=every,
            distortion=about.get("distortion", ()), name=root.name,
        )  # fmt: skip


def _poses(root: Path, colors: list[Path]) -> list[np.ndarray | None] | None:
    if (root / "pose").is_dir():
        return [_matrix(root / "pose" / f"{c.stem}.txt") for c in colors]
    file = next((root / n for n in ("pose.txt", "poses.txt", "traj.txt") if (root / n).is_file()), None)
    if file is None:
        return None
    values = _numbers(file)
    if values.ndim == 2 and values.shape[1] == 16:
        return list(values.reshape(-1, 4, 4))
    if values.ndim != 2 or values.shape[1] not in (7, 8):
        raise InputError(f"{file} must hold tx ty tz qx qy qz qw (a time before it or not) or 16 numbers a line.")
    return [pose_of_line(line[-7:]) if np.isfinite(line).all() else None for line in values]


def open_sequence(
    path: str | os.PathLike[str], *, tree: SemanticTree | None = None, longest: int | None = None, every: int = 1
) -> RGBDSequence:
    """Read whichever of the layouts a folder has.

    Args:
        tree: of the labels, if the folder has none of its own.
        longest: shrink frames to so many pixels on the longer side.
        every: keep every so many frames.

    Raises:
        InputError: no known layout, missing files, unequal counts.
    """
    root = folder_of(path)
    if (root / "rgb.txt").is_file():
        return TUMDataset(root, longest=longest, every=every)
    if any(root.glob("*.color.*")):
        return SevenScenesDataset(root, longest=longest, every=every)
    if (root / "traj.txt").is_file() and any(pictures_of(p, "frame*") for p in (root / "results", root)):
        return ReplicaDataset(root, tree=tree, longest=longest, every=every)
    if (root / "camera.json").is_file():
        return RGBDFolder(root, tree=tree, longest=longest, every=every)
    if (root / "color").is_dir() and ((root / "intrinsic").is_dir() or (root / "pose").is_dir()):
        return ScanNetDataset(root, tree=tree, longest=longest, every=every)
    raise InputError(
        f"{root} has none of the layouts that are read: Replica (results/, traj.txt), ScanNet (color/, depth/, pose/), TUM (rgb.txt), "
        "7-Scenes (frame-*.color.*), or your own: color/, depth/ and camera.json with fx, fy, cx, cy, depth_scale."
    )
