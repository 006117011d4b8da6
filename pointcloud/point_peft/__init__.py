"""Point cloud transformers (Point-MAE, arXiv 2203.06604) and their adapters: Point-PEFT, PointGST, IDPT.

Tang et al., "Point-PEFT", arXiv 2310.03059; Liang et al., "PointGST", arXiv 2410.08114; Zha et al., "IDPT", arXiv 2304.07221.
"""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.pointcloud.point_peft.adapter import PointPEFT as PointPEFT, PointPEFTConfig as PointPEFTConfig
    from mmkit.pointcloud.point_peft.bank import FeatureMemoryBank as FeatureMemoryBank
    from mmkit.pointcloud.point_peft.finetuning import finetune as finetune
    from mmkit.pointcloud.point_peft.idpt import IDPT as IDPT, IDPTConfig as IDPTConfig
    from mmkit.pointcloud.point_peft.model import (
        PointMAE as PointMAE,
        PointMAEForPretraining as PointMAEForPretraining,
        PointMAESegmenter as PointMAESegmenter,
        point_bert as point_bert,
        point_mae as point_mae,
        point_mae_nano as point_mae_nano,
        point_mae_nano_parts as point_mae_nano_parts,
        point_mae_nano_pretraining as point_mae_nano_pretraining,
        point_mae_parts as point_mae_parts,
        point_mae_scan as point_mae_scan,
    )
    from mmkit.pointcloud.point_peft.official import load_official_adapter as load_official_adapter
    from mmkit.pointcloud.point_peft.pipeline import (
        PointCloudClassificationPipeline as PointCloudClassificationPipeline,
        PointCloudSegmentationPipeline as PointCloudSegmentationPipeline,
        load_cloud as load_cloud,
    )
    from mmkit.pointcloud.point_peft.pointgst import PointGST as PointGST, PointGSTConfig as PointGSTConfig
    from mmkit.pointcloud.point_peft.result import (
        CloudClassification as CloudClassification,
        CloudSegmentation as CloudSegmentation,
        palette as palette,
    )
    from mmkit.pointcloud.point_peft.training import (
        AugmentedLoss as AugmentedLoss,
        FewShot as FewShot,
        adapt_few_shot as adapt_few_shot,
        with_own_entry as with_own_entry,
    )

__getattr__, __dir__, __all__ = door(__name__)
