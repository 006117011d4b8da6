"""Video: reading, sampling, writing and data sets, which every video method needs, and the rooms of the methods: `zeroi2v`.

Names are resolved on first use: reading a file does not load a model library.
"""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.video.datasets import (
        VideoClassificationDataset as VideoClassificationDataset,
        VideoSample as VideoSample,
        check_videos as check_videos,
    )
    from mmkit.video.encode import (
        browser_copy as browser_copy,
        plays_in_browser as plays_in_browser,
        write_video as write_video,
    )
    from mmkit.video.frames import Clip as Clip, VideoDecodeError as VideoDecodeError
    from mmkit.video.io import VideoReader as VideoReader, backends as backends, read_frames as read_frames
    from mmkit.video.samplers import (
        DenseSampler as DenseSampler,
        SegmentSampler as SegmentSampler,
        UniformSampler as UniformSampler,
    )
    from mmkit.video.transforms import SSV2_FLIP_MAP as SSV2_FLIP_MAP, ClipTransform as ClipTransform
    from mmkit.video.zeroi2v import (
        LinearAdapter as LinearAdapter,
        VideoClassification as VideoClassification,
        VideoClassificationPipeline as VideoClassificationPipeline,
        VideoClassifier as VideoClassifier,
        ZeroI2V as ZeroI2V,
        ZeroI2VConfig as ZeroI2VConfig,
        clip_vit as clip_vit,
        default_head_offsets as default_head_offsets,
        head_offsets_from_div as head_offsets_from_div,
        shift_heads as shift_heads,
        zeroi2v_from_official as zeroi2v_from_official,
    )

__getattr__, __dir__, __all__ = door(__name__)
