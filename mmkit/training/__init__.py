"""Training: one `fit` for one device or many, with exact resume."""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.storage.runs import load_trained as load_trained
    from mmkit.training.config import FitConfig as FitConfig, FitResult as FitResult, StepInfo as StepInfo
    from mmkit.training.loop import fit as fit
    from mmkit.training.metrics import accuracy as accuracy
    from mmkit.training.rate import RateSearch as RateSearch, find_lr as find_lr

__getattr__, __dir__, __all__ = door(__name__)
