"""Reading what is segmented: NIfTI volumes with their spacing and orientation, and label maps. Nothing is resampled."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmkit.errors import InputError
from mmkit.storage.files import expanded

VOLUME_SUFFIXES = (".nii", ".nii.gz")
MAX_VOXELS = 256_000_000
"""Largest volume that is read: a small file can otherwise claim gigabytes of memory."""
_LARGEST = 1e12  # larger voxels are fill values or damage, and their squares overflow float32
_AFTERWARDS = 64_000_000  # bytes that may follow the voxels
_RAS = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass
class Volume:
    """A 3D image: `data` float32 (X, Y, Z), `spacing` in mm per axis, `affine` (4, 4) voxel to world (right, anterior, superior).

    `data` lies as in the file; `ras` and `from_ras` turn it and back.
    """

    data: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray


def ras(data: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """A view of `data` (X, Y, Z) whose axes point right, anterior and superior, as nearly as they can without resampling."""
    from nibabel.orientations import apply_orientation, io_orientation

    return apply_orientation(data, io_orientation(affine))


def from_ras(data: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The inverse of `ras`: back to how the file with this `affine` lies."""
    from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

    return apply_orientation(data, ornt_transform(_RAS, io_orientation(affine)))


def is_volume(source: Any) -> bool:
    """Whether `source` is a volume rather than a picture: a NIfTI path, a `Volume`, or an array (X, Y, Z) with Z > 4."""
    if isinstance(source, (str, os.PathLike)):
        return str(source).lower().endswith(VOLUME_SUFFIXES)
    return isinstance(source, Volume) or (isinstance(source, np.ndarray) and source.ndim >= 3 and source.shape[-1] > 4)


def load_volume(
    source: str | os.PathLike[str] | np.ndarray | Volume, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> Volume:
    """Read a volume.

    Args:
        source: a `.nii` or `.nii.gz` file, an array (X, Y, Z), or a `Volume`. A fourth axis of length one is dropped.
        spacing: mm per voxel of an array; files carry their own.

    Raises:
        InputError: unreadable or truncated, not 3D, several channels, too large, empty, voxels that are no finite numbers or
            beyond any scanner, or a matrix that does not say where the voxels lie.
    """
    if isinstance(source, Volume):
        name, data, affine = "the volume", source.data, source.affine
    elif isinstance(source, np.ndarray):
        name, data = "the array", source
        if len(spacing) != 3 or not all(0 < s < float("inf") for s in spacing):
            raise InputError(f"spacing must be three positive numbers, not {spacing!r}.")
        affine = np.diag([*spacing, 1.0])
    else:
        name = str(source)
        data, affine = _read_nifti(expanded(source))
    affine = np.asarray(affine, np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise InputError(
            f"{name} has a voxel-to-world matrix that is singular or not finite: {affine.tolist()}. Mend it."
        )
    data = _checked(data, name)
    if isinstance(source, Volume):
        return Volume(data, source.spacing, affine)
    axes = np.sqrt((affine[:3, :3] ** 2).sum(0))
    return Volume(data, (float(axes[0]), float(axes[1]), float(axes[2])), affine)


def _checked(data: np.ndarray, name: str) -> np.ndarray:
    """The voxels as float32 (X, Y, Z)."""
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.dtype.names:
        raise InputError(f"{name} holds {len(data.dtype.names)} color channels per voxel; pass one channel.")
    if data.ndim > 3:
        raise InputError(
            f"{name} holds {data.shape[3]} channels or time points (shape {data.shape}); pass one time point or channel."
        )
    if data.ndim != 3:
        raise InputError(f"{name} must have three axes (X, Y, Z), not shape {data.shape}.")
    if data.size == 0 or data.size > MAX_VOXELS:
        raise InputError(f"{name} has {data.size} voxels {data.shape}; between 1 and {MAX_VOXELS} are accepted.")
    if data.dtype.kind not in "uifb":
        raise InputError(f"{name} holds {data.dtype} values; voxels must be real numbers.")
    low, high = data.min(), data.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int((~np.isfinite(data)).sum())
        raise InputError(f"{name} has {bad} NaN or infinite voxels; replace them first (numpy.nan_to_num).")
    if max(abs(float(low)), abs(float(high))) > _LARGEST:
        raise InputError(
            f"{name} has voxels in {low:.4g}..{high:.4g}; beyond {_LARGEST:g} they are fill values or damaged. Replace them first."
        )
    return np.ascontiguousarray(data, dtype=np.float32)


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not os.path.isfile(path):
        raise InputError(f"{path} does not exist or is not a file.")
    packed = path.name.lower().endswith(".gz")
    try:
        with gzip.open(path) if packed else open(path, "rb") as stream:
            return _read_stream(stream, path)
    except InputError:
        raise
    except Exception as error:  # damaged headers make the reader fail in every way there is
        raise InputError(f"{path} cannot be read as a NIfTI volume, or is truncated: {error}") from error


def _read_stream(stream: Any, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and matrix; reads to the end, where a gzip stream has its checksum."""
    import nibabel

    long_header = int.from_bytes(stream.read(4), "little") in (540, 0x1C020000)  # NIfTI-2, in either byte order
    stream.seek(0)
    image = (nibabel.Nifti2Image if long_header else nibabel.Nifti1Image).from_stream(stream)
    if math.prod(image.shape) > MAX_VOXELS:
        raise InputError(f"{path} claims {image.shape} voxels; at most {MAX_VOXELS} are accepted.")
    data, left = np.asanyarray(image.dataobj), _AFTERWARDS
    while isinstance(stream, gzip.GzipFile) and (chunk := stream.read(1 << 20)):
        left -= len(chunk)
        if left < 0:
            raise InputError(f"{path} goes on long after its {image.shape} voxels; it is damaged.")
    return data, np.eye(4) if image.affine is None else image.affine


def normalize(x: Tensor) -> Tensor:
    """Zero mean and unit standard deviation over all pixels of one image (C, ...); a constant image becomes zeros."""
    mean, std = scale_of(x)
    return (x - mean) / std


def scale_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `normalize` takes off an image (C, ...) and divides it by: mean and standard deviation over all its pixels."""
    return x.mean(), x.std(correction=0).clamp(min=1e-6)
