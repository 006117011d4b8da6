"""The data sets the field compares on, read from their published files: ModelNet40, ScanObjectNN, ShapeNetPart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from mmkit.errors import InputError
from mmkit.pointcloud.io import columns, read_point_cloud
from mmkit.pointcloud.transforms import unit_sphere
from mmkit.storage import read_json
from mmkit.storage.files import expanded

SCANOBJECTNN = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow", "sink", "sofa", "toilet",
)  # fmt: skip
"""Classes of ScanObjectNN in the order of its labels."""

_VARIANTS = {
    "obj_bg": ("main_split", "objectdataset.h5"),
    "obj_only": ("main_split_nobg", "objectdataset.h5"),
    "pb_t50_rs": ("main_split", "objectdataset_augmentedrot_scale75.h5"),
}


class CloudDataset(Dataset[Any]):
    """A map-style data set of (points (N, 3) float32, label), or (points, label, parts (N,)) where parts are known.

    Attributes:
        class_names: labels count in this order. labels: of all samples.
    """

    def __init__(
        self,
        clouds: Sequence[Any] | np.ndarray,
        labels: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        num_points: int,
        parts: bool = False,
        unit: bool = True,
    ):
        if not len(clouds):
            raise InputError("The data set is empty.")
        self.clouds, self.labels, self.class_names = clouds, [int(v) for v in labels], tuple(class_names)
        self.num_points, self.parts, self.unit = num_points, parts, unit

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        cloud = self.clouds[index]
        if isinstance(cloud, Path):
            table = read_point_cloud(cloud)
            points, parts = table.xyz, table.labels
        else:
            points, parts = columns(cloud)[:, :3].astype(np.float32), None
        points, parts = points[: self.num_points], None if parts is None else parts[: self.num_points]
        if self.unit:
            points = unit_sphere(points)
        return (points, self.labels[index], parts) if self.parts else (points, self.labels[index])


def modelnet40(root: str | os.PathLike[str], split: str = "train", num_points: int = 1024) -> CloudDataset:
    """ModelNet40, from `ply_data_<split>*.h5` files or from the resampled text files with `modelnet40_<split>.txt`.

    Raises `InputError` when `root` holds neither.
    """
    root = _folder(root)
    files = sorted(root.glob(f"ply_data_{split}*.h5"))
    if files:
        names = _lines(root / "shape_names.txt")
        clouds, labels = _h5_arrays(files)
        return CloudDataset(clouds, labels, names, num_points)
    listing = root / f"modelnet40_{split}.txt"
    if not listing.is_file():
        raise InputError(f"{root} holds neither ply_data_{split}*.h5 nor {listing.name}: unpack ModelNet40 there.")
    names, ids = _lines(root / "modelnet40_shape_names.txt"), _lines(listing)
    shapes = [i.rpartition("_")[0] for i in ids]
    if unknown := sorted(set(shapes) - set(names)):
        raise InputError(f"{listing.name} names classes that modelnet40_shape_names.txt does not: {unknown[:4]}.")
    paths = [root / s / f"{i}.txt" for s, i in zip(shapes, ids, strict=True)]
    return CloudDataset(paths, [names.index(s) for s in shapes], names, num_points)


def scanobjectnn(
    root: str | os.PathLike[str], split: str = "train", variant: str = "pb_t50_rs", num_points: int = 2048
) -> CloudDataset:
    """ScanObjectNN's h5 files; coordinates as stored.

    Args:
        variant: "pb_t50_rs" (the hardest, perturbed), "obj_bg" or "obj_only".

    Raises `InputError` for another variant or missing files.
    """
    if variant not in _VARIANTS:
        raise InputError(f"variant is one of {sorted(_VARIANTS)}, not {variant!r}.")
    folder, name = _VARIANTS[variant]
    file = _folder(root) / folder / f"{'training' if split == 'train' else split}_{name}"
    clouds, labels = _h5_arrays([file])
    return CloudDataset(clouds, labels, SCANOBJECTNN, num_points, unit=False)


def shapenetpart(root: str | os.PathLike[str], split: str = "train", num_points: int = 2048) -> CloudDataset:
    """ShapeNetPart's text files (x y z nx ny nz part) with `train_test_split/shuffled_<split>_file_list.json`.

    Samples are (points, label, parts). Raises `InputError` when the files are not there.
    """
    root = _folder(root)
    categories = dict(line.split() for line in _lines(root / "synsetoffset2category.txt"))
    names, folders = list(categories), list(categories.values())
    listing = root / "train_test_split" / f"shuffled_{split}_file_list.json"
    if not listing.is_file():
        raise InputError(f"{listing} is missing: unpack ShapeNetPart in {root}.")
    entries = [Path(str(e)).parts[-2:] for e in read_json(listing)]
    paths = [root / folder / f"{name}.txt" for folder, name in entries]
    return CloudDataset(paths, [folders.index(f) for f, _ in entries], names, num_points, parts=True)


def _h5_arrays(files: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    import h5py

    clouds, labels = [], []
    for path in files:
        if not path.is_file():
            raise InputError(f"{path} is missing.")
        try:
            with h5py.File(path, "r") as file:
                clouds.append(file["data"][()].astype(np.float32))
                labels.append(file["label"][()].reshape(-1).astype(np.int64))
        except (OSError, KeyError) as error:
            raise InputError(
                f"{path.name} cannot be read: it must be an h5 file with 'data' and 'label' ({error})."
            ) from error
    return np.concatenate(clouds), np.concatenate(labels)


def _folder(root: str | os.PathLike[str]) -> Path:
    root = expanded(root)
    if not root.is_dir():
        raise InputError(f"{root} is not a folder.")
    return root


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"{path} is missing.")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
