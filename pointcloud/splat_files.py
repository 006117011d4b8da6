"""Splat files in and out: one table of formats, bounded reading, nothing half-written.

| suffix | exact | what is lost |
|---|---|---|
| `.ply` | yes | nothing |
| `.glb` (KHR_gaussian_splatting) | to rounding | scales and opacities go through exp and sigmoid |
| `.spz` (version 3) | no | 24-bit positions, 8-bit colours, scales and opacities, 10-bit rotations |
| `.sog` (version 2) | no | 16-bit positions (in logarithms), codebooks of 256 values, 8-bit rotations, a palette of harmonics |
| `.splat` | no | 8-bit colours, opacities and rotations; all harmonics but the first |
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmkit.errors import InputError, nearest
from mmkit.ops.gaussian.harmonics import C0
from mmkit.pointcloud.gaussians import GaussianModel
from mmkit.pointcloud.splat_arrays import as_arrays, as_model, check_count, deviations, logit, sigmoid, to_bytes
from mmkit.storage import atomic_write
from mmkit.storage.files import check_writable, expanded

MAX_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Format:
    """A way to write a scene: functions between a model and the content of a file."""

    name: str
    lossy: bool
    write: Callable[[GaussianModel], bytes]
    read: Callable[[bytes], GaussianModel]


def _formats() -> dict[str, Format]:
    from mmkit.pointcloud import splat_gltf, splat_sog, splat_spz

    return {
        ".ply": Format("PLY", False, write_ply, read_ply),
        ".splat": Format(".splat", True, write_splat, read_splat),
        ".spz": Format("SPZ", True, splat_spz.write, splat_spz.read),
        ".sog": Format("SOG", True, splat_sog.write, splat_sog.read),
        ".glb": Format("glTF KHR_gaussian_splatting", False, splat_gltf.write, splat_gltf.read),
    }


FORMATS = (".ply", ".splat", ".spz", ".sog", ".glb")
"""Suffixes of the formats."""


def _format(path: Path) -> Format:
    table = _formats()
    if path.suffix.lower() not in table:
        raise InputError(f"{path.name}: no splat format has this suffix. {nearest(path.suffix.lower(), table)}")
    return table[path.suffix.lower()]


def check_splat_target(path: str | os.PathLike[str]) -> None:
    """Raise what `save_splats` would, as far as the path decides it: asked before work that would be lost otherwise."""
    _format(expanded(path))
    check_writable(path)


def load_splats(path: str | os.PathLike[str]) -> GaussianModel:
    """Read a scene; the suffix says how.

    Raises:
        InputError: missing, of an unknown suffix, damaged, truncated, or claiming more Gaussians than 20 million.
    """
    path = expanded(path)
    chosen = _format(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file.")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} has {path.stat().st_size / 1e9:.1f} GB; the limit is {MAX_BYTES / 1e9:.0f} GB.")
    try:
        model = chosen.read(path.read_bytes())
    except InputError as error:
        raise InputError(
            f"{path} is not a readable {chosen.name} file: {error} Export or download it again."
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    return model


def save_splats(model: GaussianModel, path: str | os.PathLike[str], *, labels: np.ndarray | None = None) -> Path:
    """Write a scene; the suffix says how. The file appears whole or not at all.

    Args:
        labels: (N,) whole numbers that a .ply carries as a further property, `int label`.

    Raises:
        InputError: an unknown suffix, values that are not finite, or labels for another format.
    """
    path = expanded(path)
    chosen = _format(path)
    bad = [name for name, tensor in model.tensors().items() if not tensor.isfinite().all()]
    if bad:
        raise InputError(
            f"{', '.join(bad)} hold values that are not finite; remove those Gaussians with `select` first."
        )
    if labels is not None and chosen.write is not write_ply:
        raise InputError(f"Labels are written to .ply files only, not to {path.suffix}.")
    content = chosen.write(model) if labels is None else write_ply(model, labels)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return path


def splat_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file holds: format, Gaussians, degree, mode, bounds and bytes."""
    path = expanded(path)
    model = load_splats(path)
    means = model.means.detach()
    finite = means.isfinite().all() and len(model) > 0
    return {
        "format": _format(path).name, "lossy": _format(path).lossy, "gaussians": len(model), "sh_degree": model.sh_degree,
        "rasterize_mode": model.rasterize_mode, "bytes": path.stat().st_size,
        "bytes_per_gaussian": round(path.stat().st_size / max(len(model), 1), 1),
        "minimum": means.amin(0).tolist() if finite else None, "maximum": means.amax(0).tolist() if finite else None,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ PLY

_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_GEOMETRY = ("x", "y", "z"), tuple(f"scale_{i}" for i in range(3)), tuple(f"rot_{i}" for i in range(4))


def write_ply(model: GaussianModel, labels: np.ndarray | None = None) -> bytes:
    """The layout of the 3D Gaussian splatting paper: binary little-endian floats, harmonics channel by channel; then labels, if any."""
    arrays = {k: v.float().numpy() for k, v in model.tensors().items()}
    n, rest = arrays["shN"].shape[:2]
    names = [
        *"xyz",
        "nx",
        "ny",
        "nz",
        *(f"f_dc_{i}" for i in range(3)),
        *(f"f_rest_{i}" for i in range(3 * rest)),
        "opacity",
    ]
    names += [*_GEOMETRY[1], *_GEOMETRY[2]]
    columns = [
        arrays["means"], np.zeros((n, 3), np.float32), arrays["sh0"][:, 0], arrays["shN"].transpose(0, 2, 1).reshape(n, 3 * rest),
        arrays["opacities"][:, None], arrays["scales"], arrays["quats"],
    ]  # fmt: skip
    header = ["ply", "format binary_little_endian 1.0"]
    if model.rasterize_mode != "classic":
        header.append(f"comment rasterize_mode {model.rasterize_mode}")
    header += [f"element vertex {n}", *(f"property float {name}" for name in names)]
    floats = np.concatenate(columns, 1).astype("<f4")
    if labels is None:
        return "\n".join([*header, "end_header", ""]).encode() + floats.tobytes()
    if np.shape(labels) != (n,):
        raise InputError(f"labels must be ({n},), one a Gaussian; got {np.shape(labels)}.")
    with np.errstate(invalid="ignore"):
        whole = np.asarray(labels).astype("<i4")
    if not np.array_equal(whole, labels):
        raise InputError("labels must be whole numbers of 32 bits.")
    rows = np.empty(n, [("floats", "<f4", floats.shape[1]), ("label", "<i4")])
    rows["floats"], rows["label"] = floats, whole
    return "\n".join([*header, "property int label", "end_header", ""]).encode() + rows.tobytes()


def _ply_header(data: bytes) -> tuple[int, np.dtype[Any], int, str]:
    """Vertices, the type of one, where they start, and the mode."""
    end = data.find(b"end_header", 0, 65536)
    start = data.find(b"\n", end) + 1
    if not data.startswith(b"ply") or end < 0 or start == 0:
        raise InputError("it does not begin with a PLY header of at most 64 kB.")
    count, element, mode = -1, "", "classic"
    fields: list[Any] = []
    for line in data[:end].decode("ascii", "replace").splitlines()[1:]:
        words = line.split()
        if words[:1] == ["format"] and words[1:2] != ["binary_little_endian"]:
            raise InputError(f"its format is {' '.join(words[1:])}; splats are read from binary_little_endian.")
        if words[:2] == ["comment", "rasterize_mode"] and words[2:] == ["antialiased"]:
            mode = "antialiased"
        if words[:1] == ["element"]:
            if element == "" and words[1:2] != ["vertex"]:
                raise InputError("its first element is not 'vertex'; files with chunks (compressed PLY) are not read.")
            element = words[1] if len(words) == 3 and words[2].isdecimal() else "?"
            count = int(words[2][:12]) if element == "vertex" else count
        if words[:1] == ["property"] and element == "vertex":
            if len(words) != 3 or words[1] not in _TYPES or words[2] in dict(fields):
                raise InputError(f"'{line.strip()[:60]}' is not a property it could have.")
            fields.append((words[2], "<" + _TYPES[words[1]]))
    if count < 0:
        raise InputError("it has no vertices.")
    return count, np.dtype(fields), start, mode


def read_ply(data: bytes) -> GaussianModel:
    """The layout of the paper; columns may stand in any order, and others are passed over."""
    count, kind, start, mode = _ply_header(data)
    names = kind.names or ()
    needed = [name for group in _GEOMETRY for name in group] + ["opacity", "f_dc_0", "f_dc_1", "f_dc_2"]
    missing = [name for name in needed if name not in names]
    if missing:
        raise InputError(f"it has no {', '.join(missing[:6])}: a point cloud or mesh, not splats.")
    check_count(count, len(data) - start, kind.itemsize)
    rows = np.frombuffer(data, kind, count, start)

    def columns(group: tuple[str, ...] | list[str]) -> np.ndarray:
        return (
            np.stack([rows[name].astype(np.float32) for name in group], 1)
            if group
            else np.zeros((count, 0), np.float32)
        )

    rest = [f"f_rest_{i}" for i in range(sum(name.startswith("f_rest_") for name in names))]
    if len(rest) not in (0, 9, 24, 45) or any(name not in names for name in rest):
        raise InputError(f"it has {len(rest)} higher harmonics; 0, 9, 24 or 45 (f_rest_0 on) are possible.")
    return as_model(
        mode, means=columns(_GEOMETRY[0]), scales=columns(_GEOMETRY[1]), quats=columns(_GEOMETRY[2]),
        opacities=rows["opacity"].astype(np.float32), sh0=columns([f"f_dc_{i}" for i in range(3)])[:, None],
        shN=columns(rest).reshape(count, 3, len(rest) // 3).transpose(0, 2, 1),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- .splat

_SPLAT = np.dtype([("means", "<f4", 3), ("scales", "<f4", 3), ("color", "u1", 4), ("quats", "u1", 4)])


def write_splat(model: GaussianModel) -> bytes:
    """32 bytes each, largest and most opaque first, so that viewers can show a part of the file."""
    arrays = as_arrays(model)
    rows = np.empty(len(model), _SPLAT)
    rows["means"], rows["scales"] = arrays["means"], deviations(arrays["scales"])
    rows["color"][:, :3] = to_bytes(255 * (0.5 + C0 * arrays["sh0"][:, 0]))
    rows["color"][:, 3] = to_bytes(255 * sigmoid(arrays["opacities"]))
    rows["quats"] = to_bytes(128 * arrays["quats"] + 128)
    weight = arrays["scales"].sum(1) + np.log(sigmoid(arrays["opacities"]))
    return rows[np.argsort(-weight, kind="stable")].tobytes()


def read_splat(data: bytes) -> GaussianModel:
    """Rows of position, scale, colour with opacity, and rotation."""
    if len(data) % _SPLAT.itemsize:
        raise InputError(f"its {len(data)} bytes are not a multiple of {_SPLAT.itemsize}.")
    check_count(len(data) // _SPLAT.itemsize, len(data), _SPLAT.itemsize)
    rows = np.frombuffer(data, _SPLAT)
    color = rows["color"].astype(np.float64) / 255
    return as_model(
        means=rows["means"], scales=np.log(np.maximum(rows["scales"], 1e-30)), quats=(rows["quats"].astype(np.float32) - 128) / 128,
        opacities=logit(color[:, 3], 1 / 510), sh0=((color[:, :3] - 0.5) / C0)[:, None],
    )  # fmt: skip
