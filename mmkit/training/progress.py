"""Where a run is: everything that changes from step to step besides the tensors of model and optimiser."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mmkit.errors import CheckpointError, InputError, nearest


@dataclass
class Progress:
    """Steps, evaluations and what came of them.

    `saved()` is JSON; the loss of every step and the best weights are kept as tensors beside it.
    """

    step: int = 0
    evaluated: int = 0
    stopped: str = ""
    bad_evaluations: int = 0
    best_value: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def saved(self) -> dict[str, Any]:
        """The fields that go into JSON."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("losses", "best")}

    @classmethod
    def read(cls, values: Any) -> Progress:
        """From `saved`; raises `CheckpointError` when names or types are not those of the fields."""
        kinds = {k: type(v) for k, v in cls().saved().items()}
        if not isinstance(values, dict) or values.keys() != kinds.keys():
            raise CheckpointError("its progress has other fields.")
        wrong = [k for k, v in values.items() if k != "best_value" and not isinstance(v, kinds[k])]
        if wrong:
            raise CheckpointError(f"its progress has unusable values in {', '.join(wrong)}.")
        return cls(**values)

    def take(self, other: Progress) -> None:
        """Become `other`."""
        vars(self).update(vars(other))

    def judge(self, monitor: str) -> bool:
        """Whether the newest metrics are the best so far; NaN never is. Raises `InputError` for an unknown `monitor`.

        Of equals, which few held-back examples make common, the one of lower "loss" is better: the first of them may have learnt next to
        nothing. For patience it counts as no better.
        """
        name = monitor.lstrip("-")
        if name not in self.metrics:
            raise InputError(f"monitor={monitor!r} is not a metric. {nearest(name, self.metrics)}")
        value = -self.metrics[name] if monitor.startswith("-") else self.metrics[name]
        equal = value == self.best_value
        lower = self.metrics.get("loss", math.inf) < self.best_metrics.get("loss", -math.inf)
        better = not math.isnan(value) and (self.best_value is None or value > self.best_value or (equal and lower))
        self.bad_evaluations = 0 if better and not equal else self.bad_evaluations + 1
        if better:
            self.best_value, self.best_metrics = value, dict(self.metrics)
        return better
