"""Medical segmentation: pictures and volumes in, masks with measures out; LightM-UNet is a light U-Net of state-space blocks.

Liao et al., "LightM-UNet: Mamba Assists in Lightweight UNet for Medical Image Segmentation", arXiv 2403.05246. Patches, loss and
windows follow nnU-Net (arXiv 1809.10486). Nothing here is a medical device.
"""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.vision.medical.cases import Case as Case, Cases as Cases
    from mmkit.vision.medical.datasets import (
        drawn_cases as drawn_cases,
        hippocampus_cases as hippocampus_cases,
        nuclei_cases as nuclei_cases,
        nuclei_instances as nuclei_instances,
        nuclei_kinds as nuclei_kinds,
    )
    from mmkit.vision.medical.familiar import Familiarity as Familiarity
    from mmkit.vision.medical.finetuning import Segmented as Segmented, finetune as finetune
    from mmkit.vision.medical.instances import split_touching as split_touching
    from mmkit.vision.medical.labels import IGNORED as IGNORED, load_labels as load_labels
    from mmkit.vision.medical.metrics import (
        average_precision as average_precision,
        dice as dice,
        dice_per_class as dice_per_class,
    )
    from mmkit.vision.medical.model import (
        LightMUNet as LightMUNet,
        lightm_unet_2d as lightm_unet_2d,
        lightm_unet_2d_tiny as lightm_unet_2d_tiny,
        lightm_unet_3d as lightm_unet_3d,
        lightm_unet_3d_tiny as lightm_unet_3d_tiny,
    )
    from mmkit.vision.medical.official import config_from_official as config_from_official
    from mmkit.vision.medical.pairs import Pairs as Pairs, find_pairs as find_pairs
    from mmkit.vision.medical.pipeline import MedicalSegmentationPipeline as MedicalSegmentationPipeline
    from mmkit.vision.medical.result import (
        COLORS as COLORS,
        SegmentationResult as SegmentationResult,
        color_of as color_of,
    )
    from mmkit.vision.medical.training import (
        Microscopy as Microscopy,
        Patches as Patches,
        SegmentationLoss as SegmentationLoss,
        dice_ce_loss as dice_ce_loss,
        segmentation_loss as segmentation_loss,
    )
    from mmkit.vision.medical.unet import UNet as UNet, unet_2d_small as unet_2d_small, unet_2d_tiny as unet_2d_tiny
    from mmkit.vision.medical.volumes import (
        Volume as Volume,
        is_volume as is_volume,
        load_volume as load_volume,
        normalize as normalize,
        ras as ras,
    )
    from mmkit.vision.medical.windows import sliding_window as sliding_window

__getattr__, __dir__, __all__ = door(__name__)
