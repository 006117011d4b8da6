"""Posed pictures from COLMAP models, transforms.json (NeRF, nerfstudio), and folders of pictures with a trajectory."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkit.data.images import load_image, open_image
from mmkit.errors import InputError
from mmkit.ops.gaussian.reference import rotation
from mmkit.pointcloud.cameras import Camera, PosedImages
from mmkit.storage.files import expanded

MAX_POINTS = 200_000
"""Known points that are kept, evenly chosen."""


def load_posed_images(path: str | os.PathLike[str], *, longest: int | None = None) -> PosedImages:
    """Read whichever of the layouts a folder or file has; `longest`: shrink pictures to that many pixels.

    Raises:
        InputError: no known layout, a missing or damaged file, distorted cameras.
    """
    path = expanded(path)
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    if path.suffix == ".json" or (path / "transforms.json").is_file() or (path / "transforms_train.json").is_file():
        return load_transforms(path, longest=longest)
    if _colmap_model(path) is not None:
        return load_colmap(path, longest=longest)
    return load_trajectory(path, longest=longest)


def drawn_scene(views: int = 24, size: int = 128, *, seed: int | None = None, between: bool = False) -> PosedImages:
    """A still life of `mmkit.data.drawn.solids`, without known points; `between`: from places between the others, to judge by."""
    from mmkit.data.drawn.solids import drawn_views

    images, _, matrices, K = drawn_views(views, size, seed=seed, between=between)
    camera = Camera(torch.from_numpy(matrices), torch.from_numpy(K).repeat(views, 1, 1), size, size)
    return PosedImages(torch.from_numpy(images), camera, [f"view {i}" for i in range(views)])


def _assemble(
    files: list[Path], views: list[Any], ks: list[Any], sizes: list[tuple[int, int] | None], longest: int | None,
    points: Tensor | None = None, colors: Tensor | None = None,
) -> PosedImages:  # fmt: skip
    """Decode, bring to one size, and scale the intrinsics, which belong to pictures of `sizes`."""
    if not files:
        raise InputError("No picture with a pose was found.")
    images, scaled, target = [], [], None
    for file, K, size in zip(files, ks, sizes, strict=True):
        picture = load_image(file)
        width, height = size or picture.size
        if min(width, height) < 1:
            raise InputError(f"{file}: its camera says {width} x {height} pixels, which no picture has.")
        if target is None:
            factor = min(1.0, (longest or math.inf) / max(picture.size))
            target = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        images.append(torch.from_numpy(np.asarray(picture.resize(target, reducing_gap=3.0)).copy()))
        scaled.append(np.asarray(K, np.float64) * np.array([[target[0] / width], [target[1] / height], [1.0]]))
    assert target is not None
    camera = Camera(torch.from_numpy(np.stack(views)).float(), torch.from_numpy(np.stack(scaled)).float(), *target)
    if points is not None and len(points) > MAX_POINTS:
        kept = torch.linspace(0, len(points) - 1, MAX_POINTS).long()
        points, colors = points[kept], None if colors is None else colors[kept]
    return PosedImages(torch.stack(images), camera, [f.name for f in files], points, colors)


def _intrinsics(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    if not all(math.isfinite(x) for x in (fx, fy, cx, cy)) or min(fx, fy) <= 0:
        raise InputError(f"Focal lengths {fx}, {fy} and centre {cx}, {cy} are not those of a camera.")
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


# ------------------------------------------------------------------------------------------------------ transforms.json


def load_transforms(path: str | os.PathLike[str], *, longest: int | None = None) -> PosedImages:
    """NeRF's and nerfstudio's layout: camera-to-world matrices with y up and z back; a folder or its transforms file."""
    path = expanded(path)
    if path.is_dir():
        path = next(
            (path / n for n in ("transforms.json", "transforms_train.json") if (path / n).is_file()),
            path / "transforms.json",
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        frames = tree["frames"]
        files, views, ks = [], [], []
        sizes: list[tuple[int, int] | None] = []
        for frame in frames:
            own = {**tree, **frame}
            file = path.parent / str(frame["file_path"])
            file = file if file.suffix else file.with_suffix(".png")
            matrix = np.asarray(frame["transform_matrix"], np.float64)
            if matrix.shape not in ((3, 4), (4, 4)) or not np.isfinite(matrix).all():
                raise InputError(f"{path}: the matrix of {file.name} is not 4 x 4 finite numbers.")
            distorted = [k for k in ("k1", "k2", "k3", "k4", "p1", "p2") if abs(float(own.get(k) or 0)) > 1e-6]
            if distorted:
                raise InputError(
                    f"{path}: cameras with lens distortion ({', '.join(distorted)}) are not read; undistort first."
                )
            files.append(file)
            views.append(_inverse(matrix[:3, :3] * np.array([1, -1, -1]), matrix[:3, 3]))
            size = (int(own["w"]), int(own["h"])) if "w" in own and "h" in own else open_image(file).size
            fx = float(own["fl_x"]) if "fl_x" in own else size[0] / (2 * math.tan(float(own["camera_angle_x"]) / 2))
            ks.append(
                _intrinsics(
                    fx, float(own.get("fl_y", fx)), float(own.get("cx", size[0] / 2)), float(own.get("cy", size[1] / 2))
                )
            )
            sizes.append(size)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError) as error:
        raise InputError(f"{path} is not a usable transforms file ({type(error).__name__}: {error}).") from error
    return _assemble(files, views, ks, sizes, longest)


def _inverse(turn: np.ndarray, position: np.ndarray) -> np.ndarray:
    """World to camera, from the camera's axes (columns) and place."""
    if abs(np.linalg.det(turn) - 1) > 0.05:
        raise InputError(f"A pose is no rotation: its determinant is {np.linalg.det(turn):.3g}.")
    u, _, vt = np.linalg.svd(turn)  # poses of real data are rotations only nearly
    turn = u @ vt
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = turn.T, -turn.T @ position
    return out


# --------------------------------------------------------------------------------------------------------------- COLMAP

_MODELS = {0: ("SIMPLE_PINHOLE", 3), 1: ("PINHOLE", 4), 2: ("SIMPLE_RADIAL", 4), 3: ("RADIAL", 5), 4: ("OPENCV", 8)}
_LENGTHS = dict(_MODELS.values())


def _colmap_model(folder: Path) -> Path | None:
    """The folder that holds cameras.bin or cameras.txt."""
    for place in (folder, folder / "sparse" / "0", folder / "sparse", folder / "colmap" / "sparse" / "0"):
        if any((place / f"cameras{suffix}").is_file() for suffix in (".bin", ".txt")):
            return place
    return None


def load_colmap(
    folder: str | os.PathLike[str], *, images: str | os.PathLike[str] | None = None, longest: int | None = None
) -> PosedImages:
    """A sparse model of COLMAP, text or binary, with its points; `images`: the pictures' folder, default `images` nearby."""
    folder = expanded(folder)
    model = _colmap_model(folder)
    if model is None:
        raise InputError(f"{folder} holds no cameras.bin or cameras.txt, nor does its sparse/0.")
    binary = (model / "cameras.bin").is_file()
    try:
        cameras = dict(_cameras_bin(model / "cameras.bin") if binary else _cameras_txt(model / "cameras.txt"))
        poses = list(_images_bin(model / "images.bin") if binary else _images_txt(model / "images.txt"))
        found = _points_bin(model / "points3D.bin") if binary else _points_txt(model / "points3D.txt")
    except (OSError, struct.error, ValueError, IndexError, KeyError) as error:
        raise InputError(f"{model} is not a readable COLMAP model ({type(error).__name__}: {error}).") from error
    places = (
        [expanded(images)] if images else [folder / "images", model / "images", model.parent.parent / "images", folder]
    )
    place = next((p for p in places if p.is_dir() and poses and (p / poses[0][0]).is_file()), places[0])
    files, views, ks = [], [], []
    sizes: list[tuple[int, int] | None] = []
    for name, quat, shift, camera in sorted(poses, key=lambda row: row[0]):
        if camera not in cameras:
            raise InputError(f"{model}: picture {name!r} names camera {camera}, which is not listed.")
        kind, size, p = cameras[camera]
        if kind not in ("SIMPLE_PINHOLE", "PINHOLE") and any(abs(x) > 1e-6 for x in p[4 if kind == "OPENCV" else 3 :]):
            raise InputError(f"{model}: camera {camera} is distorted ({kind}); run `colmap image_undistorter` first.")
        fx, fy, cx, cy = p[:4] if kind in ("PINHOLE", "OPENCV") else (p[0], p[0], p[1], p[2])
        view = np.eye(4)
        view[:3, :3], view[:3, 3] = rotation(torch.tensor(quat, dtype=torch.float64)).numpy(), shift
        files.append(place / name)
        views.append(view)
        ks.append(_intrinsics(fx, fy, cx, cy))
        sizes.append(size)
    points, colors = (torch.from_numpy(x).float() for x in found)
    return _assemble(
        files, views, ks, sizes, longest, points if len(points) else None, colors / 255 if len(points) else None
    )


def _cameras_txt(path: Path) -> Iterator[tuple[int, tuple[str, tuple[int, int], list[float]]]]:
    for line in _lines(path):
        number, kind, width, height, *values = line.split()
        if kind not in _LENGTHS or len(values) != _LENGTHS[kind]:
            raise InputError(
                f"{path}: camera model {kind} with {len(values)} numbers is not read; undistort to PINHOLE."
            )
        yield int(number), (kind, (int(width), int(height)), [float(v) for v in values])


def _images_txt(path: Path) -> Iterator[tuple[str, list[float], list[float], int]]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    for line in lines[::2]:  # the lines between list points seen
        if line.strip():
            _, *numbers, camera, name = line.split(maxsplit=9)
            if len(numbers) != 7:
                raise ValueError(f"{line[:80]!r} is no picture: its number, 7 of its pose, camera and name")
            yield name, [float(x) for x in numbers[:4]], [float(x) for x in numbers[4:7]], int(camera)


def _points_txt(path: Path) -> tuple[np.ndarray, np.ndarray]:
    rows = [line.split()[1:7] for line in _lines(path)] if path.is_file() else []
    values = np.array(rows, np.float64).reshape(-1, 6)
    return values[:, :3], values[:, 3:]


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]


def _count(data: bytes, least: int, path: Path) -> int:
    (n,) = struct.unpack_from("<Q", data)
    if n * least > len(data):
        raise InputError(f"{path} claims {n} entries in {len(data)} bytes.")
    return int(n)


def _cameras_bin(path: Path) -> Iterator[tuple[int, tuple[str, tuple[int, int], list[float]]]]:
    data, at = path.read_bytes(), 8
    for _ in range(_count(data, 24, path)):
        number, model, width, height = struct.unpack_from("<iiQQ", data, at)
        if model not in _MODELS:
            raise InputError(f"{path}: camera model number {model} is not read; undistort to PINHOLE.")
        kind, length = _MODELS[model]
        yield number, (kind, (width, height), list(struct.unpack_from(f"<{length}d", data, at + 24)))
        at += 24 + 8 * length


def _images_bin(path: Path) -> Iterator[tuple[str, list[float], list[float], int]]:
    data, at = path.read_bytes(), 8
    for _ in range(_count(data, 64, path)):
        *pose, camera = struct.unpack_from("<7di", data, at + 4)
        end = data.index(b"\0", at + 64)
        name = data[at + 64 : end].decode("utf-8")
        (seen,) = struct.unpack_from("<Q", data, end + 1)
        at = end + 9 + 24 * seen
        yield name, list(pose[:4]), list(pose[4:]), camera


def _points_bin(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        return np.zeros((0, 3)), np.zeros((0, 3))
    data, at, rows = path.read_bytes(), 8, []
    for _ in range(_count(data, 51, path)):
        _, x, y, z, r, g, b, _, track = struct.unpack_from("<Q3d3BdQ", data, at)
        rows.append((x, y, z, r, g, b))
        at += 51 + 8 * track
    values = np.array(rows, np.float64).reshape(-1, 6)
    return values[:, :3], values[:, 3:]


# --------------------------------------------------------------------------------------------- pictures and a trajectory


def load_trajectory(folder: str | os.PathLike[str], *, longest: int | None = None, every: int = 1) -> PosedImages:
    """Pictures with camera-to-world poses, and points from depth pictures when there are any.

    Layouts: 7-Scenes (`frame-N.color.*`, `.depth.png`, `.pose.txt` and `camera-intrinsics.txt`), or `color/` or `rgb/`, `depth/`,
    `pose.txt` (tx ty tz qx qy qz qw a line, a time before it or not, in the order of the pictures) and `camera.json` (fx, fy, cx,
    cy). Depths are 16-bit; millimetres in the first, thousandths in the second (`depth_scale` in camera.json).
    """
    folder = expanded(folder)
    try:
        seven = sorted(folder.glob("*.pose.txt"))
        if seven:
            K, scale = np.loadtxt(folder / "camera-intrinsics.txt").reshape(3, 3), 1000.0
            names = [p.name.removesuffix(".pose.txt") for p in seven]
            files = [next(iter(sorted(folder.glob(f"{name}.color.*"))), folder / f"{name}.color.jpg") for name in names]
            poses = [np.loadtxt(p).reshape(4, 4) for p in seven]
            depths = [folder / f"{name}.depth.png" for name in names]
        else:
            about = json.loads((folder / "camera.json").read_text(encoding="utf-8"))
            K = _intrinsics(*(float(about[k]) for k in ("fx", "fy", "cx", "cy")))
            scale = float(about.get("depth_scale", 1000.0))
            place = folder / "color" if (folder / "color").is_dir() else folder / "rgb"
            files = sorted((p for p in place.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg")), key=_natural)
            poses = [_tum_pose(line) for line in _lines(folder / "pose.txt")]
            depths = [folder / "depth" / f"{f.stem}.png" for f in files]
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{folder} has none of the layouts that are read (COLMAP, transforms.json, 7-Scenes, camera.json with pose.txt): {error}."
        ) from error
    if len(files) != len(poses):
        raise InputError(f"{folder} has {len(files)} pictures but {len(poses)} poses.")
    kept = [i for i in range(0, len(files), every) if np.isfinite(poses[i]).all()]
    views = [_inverse(poses[i][:3, :3], poses[i][:3, 3]) for i in kept]
    posed = _assemble([files[i] for i in kept], views, [K] * len(kept), [None] * len(kept), longest)
    if all(depths[i].is_file() for i in kept):
        posed.points, posed.point_colors = _points_of_depths(posed, [depths[i] for i in kept], K, scale)
    return posed


def _natural(path: Path) -> tuple[int, str]:
    return (int(path.stem), path.stem) if path.stem.isdecimal() else (2**62, path.stem)


def _tum_pose(line: str) -> np.ndarray:
    values = [float(x) for x in line.split()][-7:]
    if len(values) < 7:
        raise InputError(f"{line[:60]!r} is not a pose tx ty tz qx qy qz qw.")
    out = np.eye(4)
    x, y, z, w = values[3:]
    out[:3, :3] = rotation(torch.tensor([w, x, y, z], dtype=torch.float64)).numpy()
    out[:3, 3] = values[:3]
    return out


def _points_of_depths(posed: PosedImages, files: list[Path], K: np.ndarray, scale: float) -> tuple[Tensor, Tensor]:
    """Points of the world and their colours, a few from each picture."""
    rng = np.random.default_rng(0)
    each = max(1, MAX_POINTS // (4 * len(files)))
    points, colors = [], []
    for i, file in enumerate(files):
        depth = np.asarray(open_image(file), np.float64)
        rows, columns = np.nonzero((depth > 0) & (depth < 65535))
        chosen = rng.choice(len(rows), min(each, len(rows)), replace=False)
        rows, columns = rows[chosen], columns[chosen]
        z = depth[rows, columns] / scale
        local = np.stack([(columns + 0.5 - K[0, 2]) * z / K[0, 0], (rows + 0.5 - K[1, 2]) * z / K[1, 1], z], 1)
        view = posed.camera.viewmats[i].double().numpy()
        points.append((local - view[:3, 3]) @ view[:3, :3])
        height, width = posed.images.shape[1:3]
        y, x = rows * height // depth.shape[0], columns * width // depth.shape[1]
        colors.append(posed.images[i].numpy()[y, x] / 255.0)
    return torch.from_numpy(np.concatenate(points)).float(), torch.from_numpy(np.concatenate(colors)).float()
