"""mmkit: adapt vision models with one adapter contract, on a CPU or a GPU, offline.

Names are resolved on first use, so `import mmkit` stays cheap: it loads nothing beyond the standard library.
"""

from typing import TYPE_CHECKING

from mmkit.lazy import door

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mmkit.adapters import (
        Adapter as Adapter,
        AdapterConfig as AdapterConfig,
        apply_adapter as apply_adapter,
        list_adapters as list_adapters,
        load_adapter as load_adapter,
        register_adapter as register_adapter,
        save_adapter as save_adapter,
    )
    from mmkit.backbones import (
        backbone_info as backbone_info,
        create_backbone as create_backbone,
        load_weights as load_weights,
        save_backbone as save_backbone,
    )
    from mmkit.backbones.model import create_model as create_model, list_models as list_models
    from mmkit.pipelines import list_tasks as list_tasks, pipeline as pipeline
    from mmkit.training import FitConfig as FitConfig, fit as fit
    from mmkit.vision.classification import finetune as finetune
    from mmkit.weights import list_weights as list_weights

__getattr__, __dir__, __all__ = door(__name__)
