"""BitFit: train the existing biases only. arXiv 2106.10199 (ACL 2022).

Held as a difference to each bias, added to the module's output: the same gradients and the same function as training the bias
itself, while the base tensors stay untouched until `merge`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.adapters.api import register_adapter
from mmkit.adapters.config import AdapterConfig
from mmkit.adapters.sites import SiteAdapter
from mmkit.adapters.trial import channel_axis


@dataclass(frozen=True)
class BitFitConfig(AdapterConfig):
    """Settings of BitFit: only the common ones."""


class Shift(nn.Module):
    """`y + delta` along axis `axis` of y; zero at the start."""

    def __init__(self, dim: int, axis: int):
        super().__init__()
        self.axis = axis
        self.delta = nn.Parameter(torch.zeros(dim))

    def forward(self, y: Tensor, args: Any = ()) -> Tensor:
        """(..., dim) or (B, dim, ...) -> the same shape and dtype."""
        return y + along(self.delta.to(y.dtype), self.axis, y.dim())


def along(vector: Tensor, axis: int, dim: int) -> Tensor:
    """`vector` (C,) shaped to act along `axis` of a tensor with `dim` dimensions."""
    if axis in (-1, dim - 1):
        return vector
    shape = [1] * dim
    shape[axis] = -1
    return vector.view(shape)


@register_adapter("bitfit")
class BitFit(SiteAdapter):
    """Bias-only adapter; see the module docstring."""

    config_class = BitFitConfig

    def is_site(self, path: str, module: nn.Module) -> bool:
        return getattr(module, "bias", None) is not None and channel_axis(module) is not None

    def make_site(self, path: str, module: nn.Module) -> nn.Module:
        dim_axis = channel_axis(module)
        assert dim_axis is not None  # is_site
        return Shift(*dim_axis)

    def fold(self, site: nn.Module, module: nn.Module) -> dict[str, Tensor]:
        return {"bias": module.bias.detach().double() + site.delta.detach().double()}  # type: ignore[operator, union-attr]
