"""Video: reading, sampling and data sets, and ZeroI2V, which turns an image transformer into a video recogniser.

Names are resolved on first use: reading a file does not load a model library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "Clip": "mmkit.video.io",
    "ClipTransform": "mmkit.video.transforms",
    "DenseSampler": "mmkit.video.samplers",
    "LinearAdapter": "mmkit.video.zeroi2v.adapter",
    "SSV2_FLIP_MAP": "mmkit.video.transforms",
    "SegmentSampler": "mmkit.video.samplers",
    "UniformSampler": "mmkit.video.samplers",
    "VideoClassification": "mmkit.video.zeroi2v.pipeline",
    "VideoClassificationDataset": "mmkit.video.datasets",
    "VideoClassificationPipeline": "mmkit.video.zeroi2v.pipeline",
    "VideoClassifier": "mmkit.video.zeroi2v.model",
    "VideoDecodeError": "mmkit.video.io",
    "VideoReader": "mmkit.video.io",
    "VideoSample": "mmkit.video.datasets",
    "ZeroI2V": "mmkit.video.zeroi2v.adapter",
    "ZeroI2VConfig": "mmkit.video.zeroi2v.adapter",
    "backends": "mmkit.video.io",
    "check_videos": "mmkit.video.datasets",
    "clip_vit": "mmkit.video.zeroi2v.official",
    "default_head_offsets": "mmkit.video.zeroi2v.adapter",
    "head_offsets_from_div": "mmkit.video.zeroi2v.adapter",
    "read_frames": "mmkit.video.io",
    "shift_heads": "mmkit.video.zeroi2v.adapter",
    "write_video": "mmkit.video.encode",
    "zeroi2v_from_official": "mmkit.video.zeroi2v.model",
}
__all__ = sorted(_LAZY)

if TYPE_CHECKING:
    from mmkit.video.datasets import VideoClassificationDataset as VideoClassificationDataset
    from mmkit.video.datasets import VideoSample as VideoSample
    from mmkit.video.datasets import check_videos as check_videos
    from mmkit.video.encode import write_video as write_video
    from mmkit.video.io import Clip as Clip
    from mmkit.video.io import VideoDecodeError as VideoDecodeError
    from mmkit.video.io import VideoReader as VideoReader
    from mmkit.video.io import backends as backends
    from mmkit.video.io import read_frames as read_frames
    from mmkit.video.samplers import DenseSampler as DenseSampler
    from mmkit.video.samplers import SegmentSampler as SegmentSampler
    from mmkit.video.samplers import UniformSampler as UniformSampler
    from mmkit.video.transforms import SSV2_FLIP_MAP as SSV2_FLIP_MAP
    from mmkit.video.transforms import ClipTransform as ClipTransform
    from mmkit.video.zeroi2v.adapter import LinearAdapter as LinearAdapter
    from mmkit.video.zeroi2v.adapter import ZeroI2V as ZeroI2V
    from mmkit.video.zeroi2v.adapter import ZeroI2VConfig as ZeroI2VConfig
    from mmkit.video.zeroi2v.adapter import default_head_offsets as default_head_offsets
    from mmkit.video.zeroi2v.adapter import head_offsets_from_div as head_offsets_from_div
    from mmkit.video.zeroi2v.adapter import shift_heads as shift_heads
    from mmkit.video.zeroi2v.model import VideoClassifier as VideoClassifier
    from mmkit.video.zeroi2v.model import zeroi2v_from_official as zeroi2v_from_official
    from mmkit.video.zeroi2v.official import clip_vit as clip_vit
    from mmkit.video.zeroi2v.pipeline import VideoClassification as VideoClassification
    from mmkit.video.zeroi2v.pipeline import VideoClassificationPipeline as VideoClassificationPipeline


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mmkit.video' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
