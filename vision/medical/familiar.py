"""Whether an input looks like the training data: a network answers about a photograph of a dog as surely as about cells.

The nearest training example tells, as in "Out-of-Distribution Detection with Deep Nearest Neighbors" (arXiv 2204.06507), but among
a dozen statistics of the pixels instead of a network's features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkit.errors import InputError

BANDS = 5
"""Octaves of detail that are measured, from single pixels upwards."""


def statistics(x: Tensor) -> np.ndarray:
    """Numbers that describe one input (C, ...) as the network gets it, see `normalize`: exposure does not matter any more.

    Dark and bright end, channel means, strength of color (RGB only), and the logarithm of the detail in each octave.
    """
    x = x.float().cpu()
    y = x.mean(0)
    sample = y.flatten()[:: max(1, y.numel() // 65536)]
    found = sample.quantile(torch.tensor([0.02, 0.98])).tolist()
    if len(x) > 1:  # one channel has mean 0
        found += x.flatten(1).mean(1).tolist()
    if len(x) == 3:
        color = x.amax(0) - x.amin(0)
        found += [color.mean().item(), color.std(correction=0).item()]
    pool, mode = (F.avg_pool2d, "bilinear") if y.dim() == 2 else (F.avg_pool3d, "trilinear")
    y = y[None, None]
    for _ in range(BANDS):
        detail = 0.0
        if min(y.shape[2:]) > 1:  # smaller ones have no such detail
            coarse = pool(y, 2)
            detail = (y - F.interpolate(coarse, y.shape[2:], mode=mode)).square().mean().item()
            y = coarse
        found.append(0.5 * math.log(detail + 1e-6))
    return np.array(found)


@dataclass(frozen=True)
class Familiarity:
    """The statistics of the training data, kept with the weights.

    Attributes:
        mean, std: of each statistic over the training data.
        examples: (N, K), of each training example, standardised with them.
        limit: a root mean square distance to the nearest example above this is unlike the training data.
    """

    mean: np.ndarray
    std: np.ndarray
    examples: np.ndarray
    limit: float

    @classmethod
    def measure(cls, inputs: Iterable[Tensor]) -> Self:
        """From the training inputs (C, ...), normalised, at least two.

        The limit is 1.5 times the distance within which 95 % of them have their nearest other one.
        """
        rows = np.stack([statistics(x) for x in inputs])
        if len(rows) < 2:
            raise InputError("At least two training examples are needed to say what is unlike them.")
        mean, std = rows.mean(0).round(4), (rows.std(0) + 1e-3).round(4)
        examples = ((rows - mean) / std).round(2)
        near = [
            np.delete(((examples - row) ** 2).mean(-1), i).min() for i, row in enumerate(examples)
        ]  # N x N x K is too much
        return cls(mean, std, examples, round(1.5 * float(np.quantile(np.sqrt(near), 0.95)), 4))

    def distance(self, x: Tensor) -> float:
        """How far the input (C, ...) is from the nearest training example, over `limit`: above 1 is unlike them all."""
        own = (statistics(x) - self.mean) / self.std
        return float(np.sqrt(((self.examples - own) ** 2).mean(-1)).min()) / self.limit

    def to_dict(self) -> dict[str, Any]:
        """JSON-friendly fields, a line of numbers per example."""
        lines = [" ".join(f"{v:g}" for v in row) for row in (self.mean, self.std, *self.examples)]
        return {"mean": lines[0], "std": lines[1], "examples": lines[2:], "limit": self.limit}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild from `to_dict`."""
        mean, std, *examples = (
            np.array(line.split(), float) for line in (values["mean"], values["std"], *values["examples"])
        )
        return cls(mean, std, np.stack(examples), float(values["limit"]))
