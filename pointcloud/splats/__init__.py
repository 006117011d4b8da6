"""Splats: scenes of 3D Gaussians fitted to posed pictures, rendered from new views, read and written in the common formats.

Kerbl et al., "3D Gaussian Splatting for Real-Time Radiance Field Rendering", arXiv 2308.04079; Gaussians move, grow and are reused
as in "3D Gaussian Splatting as Markov Chain Monte Carlo", arXiv 2404.09591.
"""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.pointcloud.cameras import (
        Camera as Camera,
        PosedImages as PosedImages,
        look_at as look_at,
        orbit as orbit,
    )
    from mmkit.pointcloud.gaussians import GaussianModel as GaussianModel
    from mmkit.pointcloud.splat_files import (
        FORMATS as FORMATS,
        check_splat_target as check_splat_target,
        load_splats as load_splats,
        save_splats as save_splats,
        splat_info as splat_info,
    )
    from mmkit.pointcloud.splats.pipeline import NovelViewPipeline as NovelViewPipeline
    from mmkit.pointcloud.splats.readers import (
        drawn_scene as drawn_scene,
        load_colmap as load_colmap,
        load_posed_images as load_posed_images,
        load_trajectory as load_trajectory,
        load_transforms as load_transforms,
    )
    from mmkit.pointcloud.splats.result import ViewResult as ViewResult, turntable as turntable
    from mmkit.pointcloud.splats.training import (
        FitConfig as FitConfig,
        FitResult as FitResult,
        fit_images as fit_images,
    )

__getattr__, __dir__, __all__ = door(__name__)
