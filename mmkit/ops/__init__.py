"""Operators with several backends; each takes `backend="auto"` or a backend's name."""

from mmkit.ops.mamba import Mamba as Mamba
from mmkit.ops.selective_scan import selective_scan as selective_scan
