"""A learning rate to start with: a short run whose rate rises from far too small to far too large (Smith, arXiv 1506.01186)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmkit.errors import InputError, TrainingError
from mmkit.training.config import FitConfig, StepInfo
from mmkit.training.loop import fit

_SMOOTH = 0.9
_LOST = 4.0  # times the best loss so far: from here on nothing is learnt


@dataclass
class RateSearch:
    """What a search found.

    Attributes:
        suggestion: a tenth of the rate at which the smoothed loss was lowest: the loss still fell quickly there.
        rates, losses: of every step; `smooth` is the running mean of the losses, without its start's bias.
    """

    suggestion: float
    rates: list[float]
    losses: list[float]
    smooth: list[float]

    def lines(self, width: int = 40, rows: int = 12) -> str:
        """The curve as text: a bar per rate, the suggestion marked."""
        low, high = min(self.smooth), max(self.smooth)
        chosen = sorted({round(i * (len(self.rates) - 1) / max(rows - 1, 1)) for i in range(rows)})
        mark = min(chosen, key=lambda i: abs(math.log(self.rates[i] / self.suggestion)))
        out = []
        for i in chosen:
            bar = "#" * round(width * (self.smooth[i] - low) / max(high - low, 1e-12))
            out.append(f"{self.rates[i]:9.1e}  {self.smooth[i]:8.3f}  {bar}{'  <-- about here' if i == mark else ''}")
        return "\n".join(["     rate      loss", *out])


def find_lr(
    model: nn.Module,
    train: Any,
    *,
    config: FitConfig | None = None,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 60,
    **options: Any,
) -> RateSearch:
    """Train for `steps` steps, the rate rising from `lowest` to `highest`, and put everything back as it was.

    Args:
        model, train: as for `fit`.
        config: batch size, optimiser, loss settings and seed are taken from it; length, schedule and checkpoints are not.
        lowest, highest: learning rates; the search ends earlier when the loss is four times the best.
        steps: at least 10; more give a smoother curve.
        options: `adapter`, `loss_fn`, `collate_fn`, `parameter_groups` and `should_stop` of `fit`.

    Raises:
        InputError: limits that make no sense, or what `fit` refuses.
    """
    if not 0 < lowest < highest or steps < 10:
        raise InputError(
            f"find_lr needs 0 < lowest < highest and 10 steps or more, not {lowest}, {highest} and {steps}."
        )
    search = dataclasses.replace(
        config or FitConfig(), max_steps=steps, lr=highest, min_lr=lowest, schedule="exponential", warmup_steps=0,
        warmup_epochs=0.0, ema_decay=None, patience=None, resume=False, max_seconds=None, eval_every=10**9,
        restore_best=False, tensorboard=False,
    )  # fmt: skip
    seen: list[StepInfo] = []
    adapter, stop = options.get("adapter"), options.pop("should_stop", None) or (lambda: False)

    def lost() -> bool:
        smooth = _smoothed([info.loss for info in seen])
        return bool(stop()) or (len(smooth) > 10 and smooth[-1] > _LOST * min(smooth))

    before = _copy(model, adapter)
    try:
        fit(model, train, config=search, on_step=seen.append, should_stop=lost, **options)
    except TrainingError:  # the loss became infinite: far too large is where the search was to end
        if len(seen) < 3:
            raise
    finally:
        _restore(model, adapter, before)
    if len(seen) < 3:
        raise InputError("The search for a learning rate was stopped before it had begun.")
    rates, losses = [info.lr for info in seen], [info.loss for info in seen]
    smooth = _smoothed(losses)
    best = min(range(len(smooth)), key=smooth.__getitem__)
    return RateSearch(rates[best] / 10, rates, losses, smooth)


def _smoothed(losses: list[float]) -> list[float]:
    """Exponential running mean, its bias towards the start taken out."""
    mean, out = 0.0, []
    for i, loss in enumerate(losses, 1):
        mean = _SMOOTH * mean + (1 - _SMOOTH) * loss
        out.append(mean / (1 - _SMOOTH**i))
    return out


def _copy(model: nn.Module, adapter: Any) -> Mapping[str, Any]:
    modules = {"model": model} | ({"adapter": adapter} if isinstance(adapter, nn.Module) else {})
    return {
        f"{name}.{key}": (tensor, tensor.detach().clone())
        for name, module in modules.items()
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]
    } | {"info": getattr(model, "backbone_info", None)}


@torch.no_grad()
def _restore(model: nn.Module, adapter: Any, before: Mapping[str, Any]) -> None:
    """Put every parameter and buffer back; `fit` notes that what it trained is random no more, which is not so."""
    for name, kept in before.items():
        if name != "info":
            tensor, value = kept
            tensor.copy_(value)
    if before["info"] is not None:
        model.__dict__["backbone_info"] = before["info"]
