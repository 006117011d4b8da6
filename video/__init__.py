"""Video: reading, sampling and data sets, and ZeroI2V, which turns an image transformer into a video recogniser."""

from mmkit.video.classification import VideoClassification, VideoClassificationPipeline
from mmkit.video.datasets import VideoClassificationDataset, VideoSample, check_videos
from mmkit.video.encode import write_video
from mmkit.video.io import Clip, VideoDecodeError, VideoReader, backends, read_frames
from mmkit.video.models import VideoClassifier, clip_vit, zeroi2v_from_official
from mmkit.video.samplers import DenseSampler, SegmentSampler, UniformSampler
from mmkit.video.transforms import SSV2_FLIP_MAP, ClipTransform
from mmkit.video.zeroi2v import (
    LinearAdapter,
    ZeroI2V,
    ZeroI2VConfig,
    default_head_offsets,
    head_offsets_from_div,
    shift_heads,
)

__all__ = [
    "SSV2_FLIP_MAP",
    "Clip",
    "ClipTransform",
    "DenseSampler",
    "LinearAdapter",
    "SegmentSampler",
    "UniformSampler",
    "VideoClassification",
    "VideoClassificationDataset",
    "VideoClassificationPipeline",
    "VideoClassifier",
    "VideoDecodeError",
    "VideoReader",
    "VideoSample",
    "ZeroI2V",
    "ZeroI2VConfig",
    "backends",
    "check_videos",
    "clip_vit",
    "default_head_offsets",
    "head_offsets_from_div",
    "read_frames",
    "shift_heads",
    "write_video",
    "zeroi2v_from_official",
]
