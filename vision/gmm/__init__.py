"""Gaussian mixture masks: attention logits are multiplied by a learned function of the distance of two patches.

Li and Zhang, "Toward a Deeper Understanding: RetNet Viewed through Convolution", arXiv 2309.05375. Five small backbones to train from
scratch on small data sets, and `gmm`, the same masks as an adapter for pretrained timm ViTs.
"""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.vision.gmm.adapter import GMMAdapter as GMMAdapter, GMMConfig as GMMConfig
    from mmkit.vision.gmm.attention import masked_attention as masked_attention
    from mmkit.vision.gmm.masks import (
        ElementwiseLearnableMask as ElementwiseLearnableMask,
        GaussianMixtureMask as GaussianMixtureMask,
        LogitMask as LogitMask,
        create_mask as create_mask,
        distance_table as distance_table,
    )
    from mmkit.vision.gmm.models.cait import GMMCaiT as GMMCaiT, gmm_cait as gmm_cait, gmm_cait_tiny as gmm_cait_tiny
    from mmkit.vision.gmm.models.pit import GMMPiT as GMMPiT, gmm_pit as gmm_pit
    from mmkit.vision.gmm.models.swin import GMMSwin as GMMSwin, gmm_swin as gmm_swin
    from mmkit.vision.gmm.models.t2t import GMMT2T as GMMT2T, gmm_t2t as gmm_t2t
    from mmkit.vision.gmm.models.vit import (
        GMMViT as GMMViT,
        gmm_vit as gmm_vit,
        gmm_vit_base as gmm_vit_base,
        gmm_vit_d6 as gmm_vit_d6,
        gmm_vit_d15 as gmm_vit_d15,
        gmm_vit_d30 as gmm_vit_d30,
        gmm_vit_heat as gmm_vit_heat,
    )
    from mmkit.vision.gmm.pipeline import SCOPES as SCOPES, MaskExplorer as MaskExplorer
    from mmkit.vision.gmm.result import MaskView as MaskView, frame_patch as frame_patch

__getattr__, __dir__, __all__ = door(__name__)
