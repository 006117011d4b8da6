"""mmkit: adapt vision models (images, video, diffusion, 3D) with one adapter contract, on a CPU or a GPU, offline.

Names are resolved on first use, so `import mmkit` stays cheap: it loads nothing beyond the standard library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "Adapter": "mmkit.adapters",
    "AdapterConfig": "mmkit.adapters",
    "apply_adapter": "mmkit.adapters",
    "save_adapter": "mmkit.adapters",
    "load_adapter": "mmkit.adapters",
    "list_adapters": "mmkit.adapters",
    "register_adapter": "mmkit.adapters",
    "create_backbone": "mmkit.backbones",
    "save_backbone": "mmkit.backbones",
    "backbone_info": "mmkit.backbones",
    "list_models": "mmkit.backbones.model",
    "create_model": "mmkit.backbones.model",
    "load_weights": "mmkit.backbones",
    "list_weights": "mmkit.weights",
    "fit": "mmkit.training",
    "FitConfig": "mmkit.training",
    "pipeline": "mmkit.pipelines",
    "list_tasks": "mmkit.pipelines",
}
__all__ = ["__version__", *_LAZY]

if TYPE_CHECKING:
    from mmkit.adapters import (
        Adapter as Adapter,
    )
    from mmkit.adapters import (
        AdapterConfig as AdapterConfig,
    )
    from mmkit.adapters import (
        apply_adapter as apply_adapter,
    )
    from mmkit.adapters import (
        list_adapters as list_adapters,
    )
    from mmkit.adapters import (
        load_adapter as load_adapter,
    )
    from mmkit.adapters import (
        register_adapter as register_adapter,
    )
    from mmkit.adapters import (
        save_adapter as save_adapter,
    )
    from mmkit.backbones import backbone_info as backbone_info
    from mmkit.backbones import create_backbone as create_backbone
    from mmkit.backbones import load_weights as load_weights
    from mmkit.backbones import save_backbone as save_backbone
    from mmkit.backbones.model import create_model as create_model
    from mmkit.backbones.model import list_models as list_models
    from mmkit.pipelines import list_tasks as list_tasks
    from mmkit.pipelines import pipeline as pipeline
    from mmkit.training import FitConfig as FitConfig
    from mmkit.training import fit as fit
    from mmkit.weights import list_weights as list_weights


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mmkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
