"""Training: one `fit` for one device or many, with exact resume. Names are resolved on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "FitConfig": "mmkit.training.config",
    "FitResult": "mmkit.training.config",
    "StepInfo": "mmkit.training.config",
    "fit": "mmkit.training.loop",
    "load_trained": "mmkit.storage.runs",
    "accuracy": "mmkit.training.metrics",
    "confusion_matrix": "mmkit.training.metrics",
    "predict_logits": "mmkit.training.metrics",
}
__all__ = sorted(_LAZY)

if TYPE_CHECKING:
    from mmkit.storage.runs import load_trained as load_trained
    from mmkit.training.config import FitConfig as FitConfig
    from mmkit.training.config import FitResult as FitResult
    from mmkit.training.config import StepInfo as StepInfo
    from mmkit.training.loop import fit as fit
    from mmkit.training.metrics import accuracy as accuracy
    from mmkit.training.metrics import confusion_matrix as confusion_matrix
    from mmkit.training.metrics import predict_logits as predict_logits


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mmkit.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
