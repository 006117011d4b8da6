"""Clicks: click on an object, see its mask, click again; SqueezeSAM is one small network that gets the clicks as channels.

Varadarajan et al., "SqueezeSAM: User-Friendly Mobile Interactive Segmentation", arXiv 2312.06736. `ClickNet` is our own model, and the
bundled one. `InteractiveSegmenter` also drives HF SAM and SAM 2, or any function; clicks are simulated and counted as in RITM
(arXiv 2102.06583).
"""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.vision.clicks.clicknet import ClickNet as ClickNet, clicknet_mobilenetv2 as clicknet_mobilenetv2
    from mmkit.vision.clicks.datasets import (
        BACKGROUND as BACKGROUND,
        OBJECT as OBJECT,
        UNKNOWN as UNKNOWN,
        Bank as Bank,
        SceneSampler as SceneSampler,
        build_bank as build_bank,
    )
    from mmkit.vision.clicks.engines import (
        CallableEngine as CallableEngine,
        ClickNetEngine as ClickNetEngine,
        Engine as Engine,
        SamEngine as SamEngine,
        SqueezeSAMEngine as SqueezeSAMEngine,
    )
    from mmkit.vision.clicks.export import (
        export_clicknet as export_clicknet,
        export_onnx as export_onnx,
        export_program as export_program,
        load_int8 as load_int8,
        quantize_weights as quantize_weights,
        save_int8 as save_int8,
    )
    from mmkit.vision.clicks.looks import two_look_loss as two_look_loss
    from mmkit.vision.clicks.metrics import (
        Click as Click,
        iou as iou,
        miou_at_k as miou_at_k,
        next_click as next_click,
        noc as noc,
        simulate_clicks as simulate_clicks,
    )
    from mmkit.vision.clicks.model import (
        SqueezeSAM as SqueezeSAM,
        squeeze_sam_base as squeeze_sam_base,
        squeeze_sam_photo as squeeze_sam_photo,
        squeeze_sam_small as squeeze_sam_small,
        squeeze_sam_tiny as squeeze_sam_tiny,
    )
    from mmkit.vision.clicks.official import config_from_official as config_from_official
    from mmkit.vision.clicks.pipeline import (
        RANDOM_WALKER as RANDOM_WALKER,
        InteractiveSegmenter as InteractiveSegmenter,
    )
    from mmkit.vision.clicks.predictor import Predictor as Predictor
    from mmkit.vision.clicks.prompts import Prompt as Prompt, read_prompt as read_prompt
    from mmkit.vision.clicks.rating import Rating as Rating, calibration_error as calibration_error
    from mmkit.vision.clicks.result import Mask as Mask, mask_to_rle as mask_to_rle, rle_to_mask as rle_to_mask
    from mmkit.vision.clicks.saliency import (
        InitialPrompt as InitialPrompt,
        initial_prompt as initial_prompt,
        random_walker as random_walker,
        saliency_map as saliency_map,
    )
    from mmkit.vision.clicks.scenes import SceneMaker as SceneMaker
    from mmkit.vision.clicks.training import (
        close_small_holes as close_small_holes,
        distance_transform as distance_transform,
        iterative_loss as iterative_loss,
        mask_iou as mask_iou,
        merge_held_objects as merge_held_objects,
        sample_clicks as sample_clicks,
        shown_mask as shown_mask,
        whole_object_parents as whole_object_parents,
    )

__getattr__, __dir__, __all__ = door(__name__)
