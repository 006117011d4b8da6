"""The memory of Point-PEFT's prompts: global features of the training clouds, and what is most like a new one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkit.adapters.stack import eval_mode
from mmkit.errors import CheckpointError, InputError
from mmkit.storage import read_tensors, write_safetensors


@dataclass(frozen=True)
class Retrieved:
    """What a bank finds for queries: columns (B, k), weights (B, k) that sum to 1, and their features (B, k, D)."""

    index: Tensor
    weight: Tensor
    feature: Tensor


def retrieve(features: Tensor, query: Tensor, k: int, own: Tensor | None = None) -> Retrieved:
    """The k entries most like each query, by the cosine; weights are a softmax of it.

    Args:
        features: (D, n), columns of length 1. query: (B, D).
        own: (B,) the entry that each query is itself, left out; -1 for none.
    """
    likeness = F.normalize(query, dim=-1) @ features
    if own is not None:
        mine = own.to(query.device).unsqueeze(1) == torch.arange(features.shape[1], device=query.device)
        likeness = likeness.masked_fill(mine, -torch.inf)
    value, index = likeness.topk(k, -1)
    return Retrieved(index, value.softmax(-1), features.t()[index])


class FeatureMemoryBank:
    """Features of the training clouds.

    Args:
        features: (D, n).
        normalized: the columns have length 1 already, as in the authors' files, and are taken as they are.

    Raises `InputError` for other shapes, no entries or non-finite values.
    """

    def __init__(self, features: Tensor, normalized: bool = False):
        if features.dim() != 2 or 0 in features.shape or not torch.isfinite(features).all():
            raise InputError(f"A memory bank holds finite features (D, n); got {tuple(features.shape)}.")
        features = features.detach().float()
        self.features = features if normalized else F.normalize(features, dim=0)

    def __len__(self) -> int:
        return self.features.shape[1]

    @classmethod
    @torch.no_grad()
    def build(
        cls, model: Any, clouds: Iterable[Any], *, on_progress: Callable[[int], None] | None = None
    ) -> FeatureMemoryBank:
        """Features of all `clouds`, in their order, by the frozen encoder; use the training split only.

        Args:
            model: a `PointMAE` or `PointMAEForPretraining` without adapters that act.
            clouds: batches of points (B, N, 3), or tuples that start with such.
        """
        found: list[Tensor] = []
        with eval_mode(model):
            for batch in clouds:
                points = batch if isinstance(batch, Tensor) else batch[0]
                found.append(model.global_feature(points).float().cpu())
                if on_progress is not None:
                    on_progress(sum(map(len, found)))
        if not found:
            raise InputError("There are no clouds to build a memory bank from.")
        return cls(torch.cat(found).t())

    def query(self, query: Tensor, k: int, own: Tensor | None = None) -> Retrieved:
        """See `retrieve`. Raises `InputError` for queries of another width, or k above the number of entries."""
        if query.dim() != 2 or query.shape[1] != len(self.features):
            raise InputError(
                f"The bank holds features of width {len(self.features)}; the query is {tuple(query.shape)}."
            )
        if not 1 <= k <= len(self) - (own is not None):
            raise InputError(f"The bank has {len(self)} entries, too few to find {k}.")
        return retrieve(self.features, query, k, own)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.safetensors` file."""
        write_safetensors(path, {"features": self.features})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureMemoryBank:
        """Read what `save` wrote. Raises `CheckpointError`."""
        tensors = read_tensors(path, allow_pickle_format=False)
        if "features" not in tensors:
            raise CheckpointError(f"{path} holds {sorted(tensors)[:4]}, not the features of a memory bank.")
        return cls(tensors["features"], normalized=True)
