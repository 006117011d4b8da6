"""Reading and writing point clouds: ply, pcd, obj, stl, off, glb, gltf, xyz, txt, pts, csv, npy, npz, h5, las, laz. Nothing is unpickled.

Meshes become clouds by sampling their surface.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmkit.errors import MAX_SEED, InputError, check_seed
from mmkit.pointcloud.pcd import read_pcd
from mmkit.storage import atomic_write
from mmkit.storage.files import expanded

logger = logging.getLogger("mmkit.pointcloud")

MESH_POINTS = 20_000
"""Points that are sampled from a mesh unless asked otherwise."""

_LOSS = 1e-5  # of the extent: where float32 would round coordinates by more, they are moved to the origin first


@dataclass
class PointCloud:
    """Points with what the file said about them.

    Attributes:
        xyz: (N, 3) float32, finite.
        rgb: (N, 3) uint8, or None. normals: (N, 3) float32, or None. labels: (N,) int64, or None.
        meta: "format"; "dropped": points without finite coordinates; "offset": what was subtracted from coordinates so large that
            float32 would have lost their detail, as those of surveys are.
    """

    xyz: np.ndarray
    rgb: np.ndarray | None = None
    normals: np.ndarray | None = None
    labels: np.ndarray | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.xyz)

    def take(self, index: np.ndarray) -> PointCloud:
        """The points at `index`, with all that belongs to them."""
        rgb, normals, labels = (None if a is None else a[index] for a in (self.rgb, self.normals, self.labels))
        return PointCloud(self.xyz[index], rgb, normals, labels, dict(self.meta))


def read_point_cloud(
    path: str | os.PathLike[str], num_points: int | None = None, *, seed: int = 0, index: int = 0
) -> PointCloud:
    """Read a cloud, or sample the surface of a mesh.

    Args:
        path: the suffix says the format.
        num_points: so many points, by chance; meshes give 20,000 by default, clouds all they have.
        seed: of the sampling.
        index: which cloud of an h5, npy or npz file that holds several, (n, N, 3).

    Raises:
        InputError: a missing, unreadable or empty file, an unknown suffix, no finite point, or a number of points below 1.
    """
    check_seed(seed)
    seed %= MAX_SEED + 1  # numpy takes none below 0
    if num_points is not None and (not isinstance(num_points, int | np.integer) or num_points < 1):
        raise InputError(f"num_points must be a whole number from 1, not {num_points!r}.")
    path = expanded(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path.name}: clouds are read from {', '.join(sorted(_READERS))}; not {path.suffix or 'no suffix'!r}."
        )
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file.")
    try:
        cloud = reader(path, num_points or MESH_POINTS, seed, index)
    except InputError:
        raise
    except Exception as error:  # damaged files make readers fail in every way there is
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{path.name} cannot be read as {path.suffix}: {reason}. Save or download it again."
        ) from error
    return _checked(cloud, path, num_points, seed)


def _checked(cloud: PointCloud, path: Path, num_points: int | None, seed: int) -> PointCloud:
    xyz = np.asarray(cloud.xyz)
    if xyz.ndim != 2 or xyz.shape[1] != 3 or xyz.dtype.kind not in "fiu":
        raise InputError(f"{path.name} holds {xyz.dtype} {xyz.shape}, not points (N, 3).")
    finite = (np.abs(xyz) <= np.finfo(np.float32).max).all(1)
    if not finite.any():
        raise InputError(f"{path.name} holds no point with finite coordinates.")
    if offset := rounding_offset(xyz[finite]):
        logger.info("%s: its coordinates are large; %s is subtracted (meta['offset'])", path.name, offset)
        xyz = xyz - offset
        cloud.meta["offset"] = offset
    with np.errstate(over="ignore"):  # those rows are left out below
        cloud.xyz = np.ascontiguousarray(xyz, np.float32)
    cloud.rgb = None if cloud.rgb is None else _bytes(cloud.rgb)
    cloud.normals = None if cloud.normals is None else np.asarray(cloud.normals, np.float32)
    if cloud.labels is not None:
        cloud.labels = _whole(cloud.labels)
        if cloud.labels is None:
            logger.warning("a column in the place of labels holds other than whole numbers and is left out")
    cloud.meta["format"] = path.suffix.lower()
    if dropped := int((~finite).sum()):
        logger.warning(
            "%s: %d of %d points have no finite coordinates and are left out", path.name, dropped, len(finite)
        )
        cloud = cloud.take(finite)
        cloud.meta["dropped"] = dropped
    if num_points is not None and len(cloud) > num_points:
        cloud = cloud.take(np.random.default_rng(seed).choice(len(cloud), num_points, replace=False))
    return cloud


def rounding_offset(xyz: np.ndarray) -> list[float] | None:
    """What to subtract from finite points (N, 3) before they become float32, where that would lose their detail; else None."""
    low, high = xyz.min(0), xyz.max(0)
    lost = np.abs(xyz - xyz.astype(np.float32)).max()
    return low.tolist() if lost > _LOSS * (high - low).max() > 0 else None


def columns(points: Any) -> np.ndarray:
    """Numbers in memory, a tensor of any device among them, as an array of float64. Raises `InputError` for anything else."""
    try:
        if hasattr(points, "detach"):
            points = (points if points.is_complex() else points.double()).detach().cpu().numpy()
        if np.iscomplexobj(points):
            raise TypeError("its numbers are complex")
        return np.asarray(points, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"A cloud is a file, a PointCloud or an array (N, 3) of numbers, not {type(points).__name__} ({str(error)[:80]})."
        ) from error


def write_point_cloud(cloud: PointCloud | np.ndarray, path: str | os.PathLike[str]) -> Path:
    """Write .ply (binary; with colors, normals and labels), .npy, .npz (all), .xyz or .txt (coordinates), whole or not at all.

    Raises `InputError` for another suffix, or arrays of other shapes than those of `PointCloud`.
    """
    path = expanded(path)
    cloud = cloud if isinstance(cloud, PointCloud) else PointCloud(columns(cloud).astype(np.float32))
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise InputError(f"{path.name}: clouds are written as {', '.join(sorted(_WRITERS))}.")
    content = writer(_writable(cloud))
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return path


def _writable(cloud: PointCloud) -> PointCloud:
    """The cloud with the shapes and types that `PointCloud` names."""
    xyz = np.asarray(cloud.xyz)
    if xyz.ndim != 2 or xyz.shape[1] != 3:
        raise InputError(f"xyz must be (N, 3), not {xyz.shape}.")
    for name, shape in {"rgb": xyz.shape, "normals": xyz.shape, "labels": xyz.shape[:1]}.items():
        value = getattr(cloud, name)
        if value is not None and np.shape(value) != shape:
            raise InputError(f"{name} must be {shape}, one for each point, not {np.shape(value)}.")
    if cloud.labels is not None and _whole(cloud.labels) is None:
        raise InputError("labels must be whole numbers.")
    return PointCloud(
        xyz, None if cloud.rgb is None else _bytes(cloud.rgb), cloud.normals, cloud.labels, dict(cloud.meta)
    )


def _bytes(rgb: Any) -> np.ndarray:
    """Colors as uint8: fractions 0..1 and numbers of 16 bits are told by their type and size."""
    rgb = np.asarray(rgb)
    if rgb.dtype == np.uint8:
        return rgb
    high = rgb.max(initial=0)
    if rgb.dtype.kind == "f":
        rgb = np.nan_to_num(rgb) * (255.0 if np.nanmax(rgb, initial=0) <= 1 else 1.0)
    elif rgb.dtype.kind == "u" and high > 255:
        rgb = rgb // 256
    return np.rint(rgb).clip(0, 255).astype(np.uint8)


def _whole(labels: Any) -> np.ndarray | None:
    """Labels as int64; None where they are not whole numbers, such as intensities."""
    labels = np.asarray(labels)
    if labels.dtype.kind == "f" and not (np.isfinite(labels) & (labels == np.rint(labels))).all():
        return None
    return labels.astype(np.int64)


# --- formats --------------------------------------------------------------------------------------------------------------


def _ply(path: Path, count: int, seed: int, index: int) -> PointCloud:
    from plyfile import PlyData

    data = PlyData.read(path)
    vertex = data["vertex"]
    if "face" in data and len(data["face"]):
        return _mesh(path, count, seed, index)
    return from_columns({p.name: np.asarray(vertex[p.name]) for p in vertex.properties if not hasattr(p, "len_dtype")})


def from_columns(columns: dict[str, np.ndarray]) -> PointCloud:
    """A cloud from named columns x, y, z; red, green, blue; nx, ny, nz (or normal_x ...); label."""

    def block(*names: str) -> np.ndarray | None:
        return np.stack([columns[n] for n in names], 1) if all(n in columns for n in names) else None

    xyz, rgb = block("x", "y", "z"), block("red", "green", "blue")
    if xyz is None:
        raise InputError(f"There are no columns x, y, z among {sorted(columns)[:8]}.")
    normals = block("nx", "ny", "nz") if "nx" in columns else block("normal_x", "normal_y", "normal_z")
    labels = columns.get("label", columns.get("labels"))
    return PointCloud(xyz, rgb, normals, labels)


def _mesh(path: Path, count: int, seed: int, index: int) -> PointCloud:
    import trimesh

    kind = path.suffix.lower()[1:]
    source: Any = str(path)
    if kind == "off":  # some ModelNet files have the counts on the first line
        text = path.read_text(errors="replace")
        source = io.BytesIO(
            text.replace("OFF", "OFF\n", 1).encode() if text[:3] == "OFF" and text[3:4] not in "\r\n" else text.encode()
        )
    loaded: Any = trimesh.load(source, file_type=kind, process=False)
    if isinstance(loaded, trimesh.Scene):
        loaded = loaded.to_mesh() if any(hasattr(g, "faces") for g in loaded.geometry.values()) else _first(loaded)
    faces = getattr(loaded, "faces", None)
    if faces is None or not len(faces):
        return PointCloud(np.asarray(loaded.vertices))
    if not loaded.area > 0:
        raise InputError(f"{path.name} is a mesh without area.")
    points, face = trimesh.sample.sample_surface(loaded, count, seed=seed)
    return PointCloud(np.asarray(points), normals=np.asarray(loaded.face_normals[face], np.float32))


def _first(scene: Any) -> Any:
    if not scene.geometry:
        raise InputError("The file holds no geometry.")
    return next(iter(scene.geometry.values()))


def _text(path: Path, count: int, seed: int, index: int) -> PointCloud:
    lines = [
        line
        for line in path.read_text(errors="replace").replace(",", " ").replace(";", " ").splitlines()
        if line.strip()
    ]
    names: list[str] = []
    while (lines and len(lines[0].split()) < 3) or (lines and not _is_number(lines[0].split()[0])):
        names = [_SHORT.get(n, n) for n in lines[0].replace('"', " ").strip("#/ \t").lower().split()]
        lines = lines[1:]  # a count, or names of columns
    if not lines:
        raise InputError(f"{path.name} holds no rows of numbers.")
    table = np.loadtxt(lines, ndmin=2)
    if {"x", "y", "z"} <= set(names) and len(names) == table.shape[1]:
        return from_columns(dict(zip(names, table.T, strict=True)))
    cloud = PointCloud(table[:, :3])
    if table.shape[1] >= 6:
        extra = table[:, 3:6]
        if np.abs(extra).max() <= 1.0001:
            cloud.normals = extra.astype(np.float32)
        elif extra.min() >= 0 and extra.max() <= 255:
            cloud.rgb = extra.astype(np.uint8)
    if table.shape[1] in (4, 7):
        cloud.labels = table[:, -1]
    return cloud


_SHORT = {"r": "red", "g": "green", "b": "blue"}  # as CloudCompare names them


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numpy(path: Path, count: int, seed: int, index: int) -> PointCloud:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return _array(loaded, index)
    with loaded:
        arrays = {k: loaded[k] for k in loaded.files}
    return _named(arrays, index)


def _named(arrays: dict[str, Any], index: int) -> PointCloud:
    """A cloud from arrays (or h5 data sets) under the usual names, else from the first that looks like points."""
    shaped = [k for k, a in arrays.items() if a.ndim >= 2 and a.shape[-1] >= 3]
    key = next((k for k in ("xyz", "points", "data") if k in shaped), shaped[0] if shaped else None)
    if key is None:
        raise InputError(f"There are no points (N, 3) among {sorted(arrays)[:8]}.")
    whole = arrays[key].shape[:-1]  # (N,), or (n, N) where there are several clouds
    cloud = _array(arrays[key], index)
    for name in ("rgb", "normals", "labels"):
        if name in arrays and name != key and arrays[name].shape[: len(whole)] == whole:
            setattr(cloud, name, np.asarray(arrays[name][index] if len(whole) == 2 else arrays[name][()]))
    return cloud


def _array(points: Any, index: int) -> PointCloud:
    if points.ndim == 3:
        if not 0 <= index < len(points):
            raise InputError(f"The file holds {len(points)} clouds; there is no number {index}.")
        points = points[index]
    if points.ndim != 2 or points.shape[1] < 3:
        raise InputError(f"An array of shape {points.shape} is no cloud (N, 3).")
    points = np.asarray(points)
    return PointCloud(points[:, :3], normals=points[:, 3:6].astype(np.float32) if points.shape[1] == 6 else None)


def _h5(path: Path, count: int, seed: int, index: int) -> PointCloud:
    import h5py

    with h5py.File(path, "r") as file:
        return _named({k: v for k, v in file.items() if isinstance(v, h5py.Dataset) and v.ndim}, index)


def _las(path: Path, count: int, seed: int, index: int) -> PointCloud:
    import laspy

    las = laspy.read(path)
    offset = np.array([las.header.mins[i] for i in range(3)])
    rgb = None
    if {"red", "green", "blue"} <= set(las.point_format.dimension_names):
        rgb = np.stack([las.red, las.green, las.blue], 1)
    labels = np.asarray(las.classification, np.int64)
    return PointCloud(np.asarray(las.xyz) - offset, rgb, None, labels, {"offset": offset.tolist()})


def _pcd(path: Path, count: int, seed: int, index: int) -> PointCloud:
    return from_columns(read_pcd(path.read_bytes()))


_READERS: dict[str, Callable[[Path, int, int, int], PointCloud]] = {
    ".ply": _ply, ".pcd": _pcd, ".npy": _numpy, ".npz": _numpy, ".h5": _h5, ".hdf5": _h5, ".las": _las, ".laz": _las,
    **dict.fromkeys((".obj", ".stl", ".off", ".glb", ".gltf"), _mesh),
    **dict.fromkeys((".xyz", ".txt", ".pts", ".csv", ".asc"), _text),
}  # fmt: skip

SUFFIXES = tuple(_READERS)
"""What `read_point_cloud` reads."""


def _write_ply(cloud: PointCloud) -> bytes:
    from plyfile import PlyData, PlyElement

    columns = [(n, "<f4", cloud.xyz[:, i]) for i, n in enumerate("xyz")]
    if cloud.normals is not None:
        columns += [(f"n{n}", "<f4", cloud.normals[:, i]) for i, n in enumerate("xyz")]
    if cloud.rgb is not None:
        columns += [(n, "u1", cloud.rgb[:, i]) for i, n in enumerate(("red", "green", "blue"))]
    if cloud.labels is not None:
        if len(cloud) and np.abs(cloud.labels).max() >= 1 << 31:
            raise InputError("A .ply file holds labels of 32 bits; these are larger. Write .npz.")
        columns.append(("label", "<i4", cloud.labels))
    rows = np.empty(len(cloud), [(n, t) for n, t, _ in columns])
    for name, _, values in columns:
        rows[name] = values
    buffer = io.BytesIO()
    PlyData([PlyElement.describe(rows, "vertex")], byte_order="<").write(buffer)
    return buffer.getvalue()


def _write_numpy(cloud: PointCloud) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, cloud.xyz)
    return buffer.getvalue()


def _write_npz(cloud: PointCloud) -> bytes:
    buffer = io.BytesIO()
    arrays = {k: getattr(cloud, k) for k in ("xyz", "rgb", "normals", "labels")}
    np.savez_compressed(buffer, **{k: v for k, v in arrays.items() if v is not None})
    return buffer.getvalue()


def _write_text(cloud: PointCloud) -> bytes:
    buffer = io.BytesIO()
    np.savetxt(buffer, cloud.xyz, fmt="%.7g")
    return buffer.getvalue()


_WRITERS: dict[str, Callable[[PointCloud], bytes]] = {
    ".ply": _write_ply, ".npy": _write_numpy, ".npz": _write_npz, ".xyz": _write_text, ".txt": _write_text,
}  # fmt: skip
