"""Diffusion models: make pictures, fine-tune on a folder of pictures, judge what they draw.

pictures = mmkit.pipeline("text-to-image")(["a red circle", "two blue stars"], seed=3)
finetune("my_pictures/", adapter="difffit", output_dir="runs/mine")
"""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.diffusion.denoiser import Denoiser as Denoiser
    from mmkit.diffusion.domains import DOMAINS as DOMAINS, draw_domain as draw_domain
    from mmkit.diffusion.judge import SceneJudge as SceneJudge, judge_loss as judge_loss, scene_judge as scene_judge
    from mmkit.diffusion.objective import Objective as Objective
    from mmkit.diffusion.pictures import Captioned as Captioned, open_captions as open_captions
    from mmkit.diffusion.pipeline import TextToImagePipeline as TextToImagePipeline
    from mmkit.diffusion.resolution import raise_resolution as raise_resolution
    from mmkit.diffusion.result import TextToImage as TextToImage
    from mmkit.diffusion.scenes import (
        ScenePainter as ScenePainter,
        scene_painter as scene_painter,
        scenes_pipeline as scenes_pipeline,
    )
    from mmkit.diffusion.training import FinetuneResult as FinetuneResult, finetune as finetune

__getattr__, __dir__, __all__ = door(__name__)
