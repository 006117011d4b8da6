"""Image classification: fine-tuning on a folder of pictures with any adapter, and asking the result.

    result = finetune("photos/", adapter="ssf", output_dir="runs/mine")
    mmkit.pipeline("image-classification", "runs/mine")("photo.jpg").label

No paper of its own: the methods are those of `mmkit.list_adapters()`, each cited where it lives.
"""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.vision.classification.comparing import compare as compare
    from mmkit.vision.classification.demo import run_demo as run_demo
    from mmkit.vision.classification.exporting import Exported as Exported, export as export
    from mmkit.vision.classification.metrics import answers_on as answers_on, merge_error as merge_error
    from mmkit.vision.classification.pipeline import ImageClassificationPipeline as ImageClassificationPipeline
    from mmkit.vision.classification.preparing import (
        Prepared as Prepared,
        default_backbone as default_backbone,
        finetune_methods as finetune_methods,
        prepare as prepare,
    )
    from mmkit.vision.classification.probe import probe_answers as probe_answers
    from mmkit.vision.classification.report import report_table as report_table
    from mmkit.vision.classification.result import ImageClassification as ImageClassification
    from mmkit.vision.classification.saving import load_finetuned as load_finetuned
    from mmkit.vision.classification.training import (
        LEARNING_RATES as LEARNING_RATES,
        FinetuneResult as FinetuneResult,
        finetune as finetune,
        fit_config as fit_config,
        search_rate as search_rate,
        train_prepared as train_prepared,
    )

__getattr__, __dir__, __all__ = door(__name__)
