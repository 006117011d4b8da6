"""ZeroI2V: an image transformer recognises videos at no inference cost: heads look at neighbouring frames, linear adapters fold away.

Li et al., "ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video", arXiv 2310.01324 (ECCV 2024).
"""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.video.zeroi2v.adapter import (
        PLACES as PLACES,
        LinearAdapter as LinearAdapter,
        ZeroI2V as ZeroI2V,
        ZeroI2VConfig as ZeroI2VConfig,
        default_head_offsets as default_head_offsets,
        head_offsets_from_div as head_offsets_from_div,
        shift_heads as shift_heads,
    )
    from mmkit.video.zeroi2v.metrics import right_answers as right_answers
    from mmkit.video.zeroi2v.model import (
        VideoClassifier as VideoClassifier,
        zeroi2v_clip_b16_8f as zeroi2v_clip_b16_8f,
        zeroi2v_clip_b16_16f_ssv2 as zeroi2v_clip_b16_16f_ssv2,
        zeroi2v_clip_b16_32f as zeroi2v_clip_b16_32f,
        zeroi2v_clip_l14_8f as zeroi2v_clip_l14_8f,
        zeroi2v_clip_l14_32f as zeroi2v_clip_l14_32f,
        zeroi2v_clip_l14_32f_ssv2 as zeroi2v_clip_l14_32f_ssv2,
        zeroi2v_from_official as zeroi2v_from_official,
    )
    from mmkit.video.zeroi2v.official import clip_vit as clip_vit
    from mmkit.video.zeroi2v.pipeline import VideoClassificationPipeline as VideoClassificationPipeline
    from mmkit.video.zeroi2v.result import VideoClassification as VideoClassification, Window as Window
    from mmkit.video.zeroi2v.training import finetune as finetune

__getattr__, __dir__, __all__ = door(__name__)
