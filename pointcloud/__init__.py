"""Point clouds: files, data sets and augmentations; beside them a room per method, whose names stand in its door: `point_peft`."""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.pointcloud.datasets import (
        CloudDataset as CloudDataset,
        modelnet40 as modelnet40,
        scanobjectnn as scanobjectnn,
        shapenetpart as shapenetpart,
    )
    from mmkit.pointcloud.io import (
        SUFFIXES as SUFFIXES,
        PointCloud as PointCloud,
        read_point_cloud as read_point_cloud,
        write_point_cloud as write_point_cloud,
    )
    from mmkit.pointcloud.transforms import (
        Augment as Augment,
        choose_points as choose_points,
        unit_sphere as unit_sphere,
    )

__getattr__, __dir__, __all__ = door(__name__)
