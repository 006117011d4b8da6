"""Linear probe: train a copy of the head on frozen features, the baseline every adapter is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mmkit.adapters.api import register_adapter
from mmkit.adapters.config import AdapterConfig, Edit
from mmkit.adapters.core import Adapter


@dataclass(frozen=True)
class LinearProbeConfig(AdapterConfig):
    """Settings of the linear probe.

    Attributes:
        modules_to_save: what is trained; the model's classifier by default. `targets` is not used.
    """

    modules_to_save: tuple[str, ...] = ("head",)


@register_adapter("linear_probe")
class LinearProbe(Adapter):
    """Only `modules_to_save` are trained; see the module docstring."""

    config_class = LinearProbeConfig

    def merge_edits(self, model: nn.Module) -> list[Edit]:
        return []  # the saved modules are merged by the base class
