"""Metrics of the validation data in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmkit.errors import InputError
from mmkit.training.config import FitConfig
from mmkit.training.failures import explaining
from mmkit.training.loading import Collate, EvalLoader
from mmkit.training.metrics import TargetError, accuracy, accuracy_sums, metrics_from_sums
from mmkit.training.randomness import mix_seed, seed_everything
from mmkit.training.setup import freeze_running_statistics

MetricsFn = Callable[[nn.Module, Any], dict[str, float]]


class Evaluator:
    """Runs `metrics_fn` (default: accuracy and loss) over `val` with the trained module in eval mode.

    Args:
        trainee: the prepared module; `inner` is the same without what accelerate put around it.
        sharded: under FSDP every process must run the whole loop.
        check: called before each batch; may raise.
    """

    def __init__(
        self,
        accelerator: Any,
        trainee: nn.Module,
        val: Any,
        metrics_fn: MetricsFn | None,
        config: FitConfig,
        *,
        collate_fn: Collate | None,
        sharded: bool,
        check: Callable[[], None],
    ) -> None:
        self.accelerator, self.trainee, self.metrics_fn, self.sharded = accelerator, trainee, metrics_fn, sharded
        world, rank = accelerator.num_processes, accelerator.process_index
        self.shared = metrics_fn is None and world > 1 and not sharded  # the default metric is a sum over parts
        self.loader = EvalLoader(
            val,
            config.batch_size,
            accelerator.device,
            num_workers=config.num_workers,
            collate_fn=collate_fn,
            shard=(rank, world) if self.shared else (0, 1),
            seed=config.seed,
            check=check,
        )

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        """The metrics after `step`; raises `InputError` when they are no dict of numbers or the labels do not fit the model."""
        self.trainee.eval()
        seed_everything(mix_seed(self.loader.seed, step), device=self.accelerator.device)  # for a metric that draws
        try:
            with explaining(lambda: (step, self.loader.batch), ours=self.metrics_fn is None):
                if self.shared:
                    sums = self.trainee(accuracy_sums, self.loader).to(self.accelerator.device, torch.float32)
                    return metrics_from_sums(self.accelerator.reduce(sums, "sum"))
                found = self.trainee(self.metrics_fn or accuracy, self.loader)
        except TargetError as error:
            raise error.named(self.loader.batches.data, self.loader.current) from None
        finally:
            self.trainee.train()
            freeze_running_statistics(self.trainee)
            if self.sharded:  # without a backward pass FSDP would leave its root whole
                for module in self.trainee.modules():
                    getattr(module, "reshard", lambda: None)()
        if not isinstance(found, dict):
            raise InputError(f"metrics_fn must return a dict of numbers, not {type(found).__name__}.")
        try:
            return {str(k): float(v) for k, v in found.items()}
        except (TypeError, ValueError) as error:
            raise InputError(f"metrics_fn must return a dict of numbers: {error}.") from error
