"""DiffFit: adapt a diffusion model by biases, norms and scale factors alone, in files of kilobytes.

Xie et al., "DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient Fine-Tuning", arXiv 2304.06648
(ICCV 2023). For the transformers and UNets of diffusers and for facebookresearch/DiT: `apply_adapter(model, "difffit")`.
"""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.diffusion.blocks import supported as supported
    from mmkit.diffusion.difffit.adapter import (
        DiffFit as DiffFit,
        DiffFitConfig as DiffFitConfig,
        trained_counts as trained_counts,
    )
    from mmkit.diffusion.difffit.official import (
        load_mkshing as load_mkshing,
        load_official_checkpoint as load_official_checkpoint,
        match_official_numerics as match_official_numerics,
    )
    from mmkit.diffusion.difffit.places import swap_class_table as swap_class_table

__getattr__, __dir__, __all__ = door(__name__)
