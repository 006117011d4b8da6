"""Reading what is segmented: NIfTI volumes with their spacing, and label maps. Nothing is resampled."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mmkit.errors import InputError

VOLUME_SUFFIXES = (".nii", ".nii.gz")


MAX_VOXELS = 256_000_000
"""Largest volume that is read: a small file can otherwise claim gigabytes of memory."""


@dataclass
class Volume:
    """A 3D image: `data` float32 (X, Y, Z), `spacing` in mm per axis, `affine` (4, 4) voxel to world."""

    data: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray


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
        InputError: unreadable or truncated, not 3D, too large, empty, or with NaN or infinite voxels.
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
        data, affine = _read_nifti(Path(source).expanduser())
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise InputError(
            f"{name} must have three axes (X, Y, Z), not shape {data.shape}; pass one time point or channel."
        )
    if data.size == 0 or data.size > MAX_VOXELS:
        raise InputError(f"{name} has {data.size} voxels {data.shape}; between 1 and {MAX_VOXELS} are accepted.")
    if data.dtype.kind not in "uifb":
        raise InputError(f"{name} holds {data.dtype} values; voxels must be real numbers.")
    data = np.ascontiguousarray(data, dtype=np.float32)
    if not np.isfinite(data).all():
        bad = int((~np.isfinite(data)).sum())
        raise InputError(f"{name} has {bad} NaN or infinite voxels; replace them first (numpy.nan_to_num).")
    if isinstance(source, Volume):
        return Volume(data, source.spacing, affine)
    axes = np.sqrt((affine[:3, :3] ** 2).sum(0))
    return Volume(data, (float(axes[0]), float(axes[1]), float(axes[2])), affine)


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import nibabel

    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file.")
    try:
        file = nibabel.load(path)
        if np.prod(file.shape) > MAX_VOXELS:  # type: ignore[attr-defined]
            raise InputError(f"{path} claims {file.shape} voxels; at most {MAX_VOXELS} are accepted.")  # type: ignore[attr-defined]
        affine = file.affine  # type: ignore[attr-defined]
        return np.asanyarray(file.dataobj), np.eye(4) if affine is None else affine  # type: ignore[attr-defined]
    except (
        nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError, OSError, EOFError, ValueError,
        OverflowError, zlib.error,
    ) as error:  # fmt: skip
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as a NIfTI volume, or is truncated: {error}") from error


def normalize(x: Tensor) -> Tensor:
    """Zero mean and unit standard deviation over all pixels of one image (C, ...); a constant image becomes zeros."""
    return (x - x.mean()) / x.std(correction=0).clamp(min=1e-6)


def load_labels(source: str | os.PathLike[str] | np.ndarray, num_classes: int) -> np.ndarray:
    """A label map as uint8 (H, W) or (X, Y, Z): a NIfTI file, a PNG of class or object numbers, or an array.

    With two classes every value above zero counts as foreground, so that object numbers can be used. Raises `InputError` for
    unreadable files and for values that are no class.
    """
    if isinstance(source, np.ndarray):
        labels = source
    elif is_volume(source):
        labels = load_volume(source).data
    else:
        try:
            with Image.open(Path(source).expanduser()) as picture:
                labels = np.asarray(picture)
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"{source} cannot be read as a label picture: {error}") from error
        labels = labels[..., 0] if labels.ndim == 3 else labels
    if num_classes == 2:
        return (labels > 0).astype(np.uint8)
    if labels.min() < 0 or labels.max() >= num_classes or (labels != np.round(labels)).any():
        raise InputError(
            f"Labels must be whole numbers 0..{num_classes - 1}, found {labels.min():g}..{labels.max():g}."
        )
    return labels.astype(np.uint8)
