"""SLAM with labels: a camera's path and a map of Gaussians from RGB-D pictures, with a few numbers per Gaussian for any number of classes.

Li et al., "Hier-SLAM: Scaling-up Semantics in SLAM with a Hierarchically Categorical Gaussian Splatting", arXiv 2409.12518 (first called
Hi-SLAM; not the monocular systems HI-SLAM and HI-SLAM2), and Hier-SLAM++, arXiv 2502.14931; tracking and mapping as in SplaTAM, arXiv
2312.02126. Written from the papers' formulas.
"""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.pointcloud.slam.config import PRESETS as PRESETS, HierSLAMConfig as HierSLAMConfig
    from mmkit.pointcloud.slam.datasets import (
        ReplicaDataset as ReplicaDataset,
        RGBDFolder as RGBDFolder,
        RGBDSequence as RGBDSequence,
        ScanNetDataset as ScanNetDataset,
        SevenScenesDataset as SevenScenesDataset,
        TUMDataset as TUMDataset,
        open_sequence as open_sequence,
    )
    from mmkit.pointcloud.slam.evaluation import evaluate as evaluate, trajectory_figures as trajectory_figures
    from mmkit.pointcloud.slam.frames import RGBDFrame as RGBDFrame
    from mmkit.pointcloud.slam.gicp import gicp_available as gicp_available
    from mmkit.pointcloud.slam.growing import (
        balanced_proposer as balanced_proposer,
        build_tree as build_tree,
        cluster_tree as cluster_tree,
    )
    from mmkit.pointcloud.slam.metrics import (
        ate_official as ate_official,
        ate_rmse as ate_rmse,
        depth_l1 as depth_l1,
        miou as miou,
        rpe as rpe,
    )
    from mmkit.pointcloud.slam.model import SemanticGaussians as SemanticGaussians
    from mmkit.pointcloud.slam.official import load_official as load_official, save_official as save_official
    from mmkit.pointcloud.slam.pipeline import SemanticSLAMPipeline as SemanticSLAMPipeline
    from mmkit.pointcloud.slam.result import (
        SlamResult as SlamResult,
        label_image as label_image,
        palette as palette,
        trajectory_image as trajectory_image,
    )
    from mmkit.pointcloud.slam.semantics import (
        HierarchicalSemanticLoss as HierarchicalSemanticLoss,
        SemanticHead as SemanticHead,
    )
    from mmkit.pointcloud.slam.state import View as View
    from mmkit.pointcloud.slam.synthetic import SyntheticRoom as SyntheticRoom
    from mmkit.pointcloud.slam.system import HierSLAM as HierSLAM, HiSLAM as HiSLAM, Step as Step
    from mmkit.pointcloud.slam.tree import SemanticTree as SemanticTree
    from mmkit.pointcloud.slam.video import RGBDVideo as RGBDVideo

__getattr__, __dir__, __all__ = door(__name__)
