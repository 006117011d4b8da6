"""PIIP, parameter-inverted image pyramids: high resolution through small models, low resolution through large ones, in exchange.

Zhu et al., "Parameter-Inverted Image Pyramid Networks", arXiv 2406.04330; for detection and multimodal use arXiv 2501.07783.
Any backbones with a grid can be branches; nothing has to be compiled.
"""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.vision.piip.branches import (
        FAMILIES as FAMILIES,
        Family as Family,
        Tokens as Tokens,
        build_branch as build_branch,
    )
    from mmkit.vision.piip.config import BranchConfig as BranchConfig, PIIPConfig as PIIPConfig
    from mmkit.vision.piip.cost import (
        Cost as Cost,
        branch_flops as branch_flops,
        compare as compare,
        meta_model as meta_model,
        piip_flops as piip_flops,
    )
    from mmkit.vision.piip.interaction import (
        BidirectionalInteraction as BidirectionalInteraction,
        DeformableAttention as DeformableAttention,
        Injector as Injector,
    )
    from mmkit.vision.piip.model import PIIP as PIIP
    from mmkit.vision.piip.official import config_from_official as config_from_official
    from mmkit.vision.piip.pipeline import (
        DenseFeaturesPipeline as DenseFeaturesPipeline,
        PyramidExplorer as PyramidExplorer,
        SemanticSegmentationPipeline as SemanticSegmentationPipeline,
    )
    from mmkit.vision.piip.published import (
        piip_h6b as piip_h6b,
        piip_lh6b as piip_lh6b,
        piip_sbl as piip_sbl,
        piip_tsb as piip_tsb,
        piip_tsbl as piip_tsbl,
        published_pyramid as published_pyramid,
    )
    from mmkit.vision.piip.pyramid import PIIPFeaturePyramid as PIIPFeaturePyramid, PIIPSegmenter as PIIPSegmenter
    from mmkit.vision.piip.result import (
        DenseFeatures as DenseFeatures,
        PyramidView as PyramidView,
        Reads as Reads,
        SegmentedPicture as SegmentedPicture,
        pca_picture as pca_picture,
    )

__getattr__, __dir__, __all__ = door(__name__)
