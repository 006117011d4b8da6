"""Data: reading pictures people have, labelled data sets, deterministic splits, procedural and sample data."""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.data.archive import extract_zip as extract_zip
    from mmkit.data.drawn.pictures import ProceduralImages as ProceduralImages
    from mmkit.data.folder import (
        ImageDataset as ImageDataset,
        find_unreadable as find_unreadable,
        fold_dataset as fold_dataset,
        list_pictures as list_pictures,
        open_dataset as open_dataset,
        split_dataset as split_dataset,
        stratified_split as stratified_split,
    )
    from mmkit.data.images import load_image as load_image
    from mmkit.data.samples import (
        ArrayDataset as ArrayDataset,
        array_dataset as array_dataset,
        load_digits as load_digits,
    )
    from mmkit.data.transforms import ImageTransform as ImageTransform

__getattr__, __dir__, __all__ = door(__name__)
