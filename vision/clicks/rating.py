"""What a network says of its own mask, put right: its estimate of the IoU against the IoU that was measured on held-out objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mmkit.errors import InputError

CLICKS = 4
"""After so many clicks and more, one line serves."""


@dataclass(frozen=True)
class Rating:
    """A rising line per number of clicks that takes the network's estimate to the IoU to be expected, 0..1.

    Attributes:
        slope, offset: after the first click, the second, ..., the last ones also for all further clicks. No slope is negative.
    """

    slope: tuple[float, ...]
    offset: tuple[float, ...]

    @classmethod
    def fit(cls, estimates: Sequence[float], measured: Sequence[float], clicks: Sequence[int]) -> Self:
        """Least squares on masks of held-out objects; raises `InputError` when a number of clicks up to `CLICKS` has none."""
        lines = []
        for count in range(1, CLICKS + 1):
            rows = [i for i, k in enumerate(clicks) if min(k, CLICKS) == count]
            if not rows:
                raise InputError(f"No masks after {count} clicks to fit the rating to.")
            x, y = np.array([estimates[i] for i in rows]), np.array([measured[i] for i in rows])
            slope = max(0.0, float(((x - x.mean()) * (y - y.mean())).sum() / max(((x - x.mean()) ** 2).sum(), 1e-9)))
            lines.append((round(slope, 4), round(float(y.mean() - slope * x.mean()), 4)))
        return cls(*zip(*lines, strict=True))

    def __call__(self, estimates: Tensor, clicks: Tensor) -> Tensor:
        """Estimates `(Q, M)` after `clicks` `(Q,)` of at least 1 -> expected IoU `(Q, M)`."""
        lines = torch.tensor([self.slope, self.offset], device=estimates.device)[:, clicks.clamp(max=CLICKS) - 1, None]
        return (lines[0] * estimates + lines[1]).clamp(0, 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-friendly fields."""
        return {"slope": list(self.slope), "offset": list(self.offset)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild from `to_dict`."""
        return cls(tuple(values["slope"]), tuple(values["offset"]))


def calibration_error(expected: Sequence[float], measured: Sequence[float], bins: int = 5) -> float:
    """Mean distance between expected and measured IoU over bins of equally many masks, sorted by the expected one."""
    order = np.argsort(expected, kind="stable")
    parts = np.array_split(order, bins)
    gaps = [abs(np.mean([expected[i] - measured[i] for i in part])) * len(part) for part in parts if len(part)]
    return float(sum(gaps) / len(order))
