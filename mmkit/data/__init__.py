"""Data: reading pictures people have, labelled data sets, deterministic splits, procedural and sample data.

Names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "ArrayDataset": "mmkit.data.samples",
    "ImageDataset": "mmkit.data.folder",
    "ImageTransform": "mmkit.data.transforms",
    "ProceduralImages": "mmkit.data.drawn.pictures",
    "array_dataset": "mmkit.data.samples",
    "extract_zip": "mmkit.data.archive",
    "find_unreadable": "mmkit.data.folder",
    "load_digits": "mmkit.data.samples",
    "load_image": "mmkit.data.images",
    "open_dataset": "mmkit.data.folder",
    "split_dataset": "mmkit.data.folder",
    "stratified_split": "mmkit.data.folder",
}
__all__ = sorted(_LAZY)

if TYPE_CHECKING:
    from mmkit.data.archive import extract_zip as extract_zip
    from mmkit.data.drawn.pictures import ProceduralImages as ProceduralImages
    from mmkit.data.folder import ImageDataset as ImageDataset
    from mmkit.data.folder import find_unreadable as find_unreadable
    from mmkit.data.folder import open_dataset as open_dataset
    from mmkit.data.folder import split_dataset as split_dataset
    from mmkit.data.folder import stratified_split as stratified_split
    from mmkit.data.images import load_image as load_image
    from mmkit.data.samples import ArrayDataset as ArrayDataset
    from mmkit.data.samples import array_dataset as array_dataset
    from mmkit.data.samples import load_digits as load_digits
    from mmkit.data.transforms import ImageTransform as ImageTransform


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mmkit.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
