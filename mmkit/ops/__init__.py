"""Operators with several backends; each takes `backend="auto"` or a backend's name."""

from mmkit.ops.deformable_attention import (
    deformable_grid_attention as deformable_grid_attention,
    multi_scale_deformable_attention as multi_scale_deformable_attention,
)
from mmkit.ops.gaussian import rasterization as rasterization
from mmkit.ops.mamba import Mamba as Mamba
from mmkit.ops.points import (
    ball_query as ball_query,
    chamfer_distance as chamfer_distance,
    farthest_point_sample as farthest_point_sample,
    gather_points as gather_points,
    group_points as group_points,
    knn as knn,
    three_interpolate as three_interpolate,
)
from mmkit.ops.selective_scan import selective_scan as selective_scan
