"""Settings and results of `fit`."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mmkit.errors import MAX_SEED, InputError

_FREE_FIELDS = {
    "num_workers",
    "checkpoint_every",
    "keep_checkpoints",
    "resume",
    "progress",
    "tensorboard",
    "device",
    "max_seconds",
}


@dataclass(frozen=True)
class FitConfig:
    """How `fit` trains.

    Attributes:
        epochs: passes over the training data; ignored when `max_steps` is given.
        max_steps: optimiser steps.
        max_seconds: stop after this much training time, counted over all resumes, with the state saved. The learning rate
            follows the steps: give as many as fit into the time.
        steps_per_epoch: steps that count as an epoch (evaluation, logs) of an iterable data set; None: the whole run.
        batch_size: examples per micro-batch and process; a step uses `batch_size * grad_accum * processes`.
        lr, min_lr: peak and final learning rate.
        schedule: "cosine" or "constant", after the warm-up (timm's scheduler, once per step); "exponential" rises from `min_lr`
            to `lr`, as a search for a rate does (`mmkit.training.find_lr`).
        warmup_steps, warmup_epochs: linear warm-up; the two add up.
        weight_decay: for tensors of two or more dimensions; biases, norms and other 1-D tensors are not decayed.
        optimizer: "adamw", "adam", "sgd" (momentum 0.9), or any name of `timm.optim.list_optimizers()`.
        mixed_precision: "no", "bf16" or "fp16" (GPU only).
        grad_accum: micro-batches per step.
        clip_grad: largest gradient norm, or None.
        label_smoothing: of the default loss.
        class_weights: "balanced" weighs the default loss by how rare a class is, on average 1 over the training data.
        sampling: "balanced" takes every class equally often in each epoch, of as many examples as there are; needs labels.
        mixup, cutmix: alpha of timm's mixup and CutMix, 0 for none (usual: 0.2 to 1). For the default loss; with both, each
            batch gets one of them at random. Metrics stay those of whole pictures and hard labels.
        mixup_prob: share of the batches that are mixed.
        drop_last: leave out the shorter last step of each epoch.
        patience: stop after this many evaluations without a better `monitor`; None never stops early.
        monitor: metric that says which weights are best; higher is better, with a "-" in front lower is better. Of equals, the one of
            lower "loss" is kept; it does not count for `patience`.
        restore_best: leave the best weights in the model at the end (when there is validation data).
        eval_every: epochs between evaluations; the last step is always evaluated.
        ema_decay: evaluate and return an exponential moving average of the trained parameters and buffers with this decay,
            reached slowly as in timm: after `t` steps it is at most `1 - t ** (-2 / 3)`.
        checkpoint_every: steps between checkpoints; None writes one per epoch. One is always written at the end.
        keep_checkpoints: how many of the newest to keep.
        resume: "auto" or True continue the run that `output_dir` holds, if any (another run is an error), False starts over, a
            path names the folder to continue from.
        seed: of shuffling, augmentation and dropout. The caller's own random state is left as it was.
        num_workers: processes that read data; results do not depend on it.
        tensorboard: also write TensorBoard files.
        progress: show a bar.
        device: "auto" or "cpu".
    """

    epochs: int = 10
    max_steps: int | None = None
    max_seconds: float | None = None
    steps_per_epoch: int | None = None
    batch_size: int = 32
    lr: float = 1e-3
    min_lr: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 0
    warmup_epochs: float = 0.0
    weight_decay: float = 0.01
    optimizer: str = "adamw"
    mixed_precision: str = "no"
    grad_accum: int = 1
    clip_grad: float | None = 1.0
    label_smoothing: float = 0.0
    class_weights: str | None = None
    sampling: str | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    drop_last: bool = False
    patience: int | None = None
    monitor: str = "accuracy"
    restore_best: bool = True
    eval_every: int = 1
    ema_decay: float | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    resume: bool | str | os.PathLike[str] = "auto"
    seed: int = 0
    num_workers: int = 0
    tensorboard: bool = False
    progress: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("epochs", "batch_size", "grad_accum", "eval_every", "keep_checkpoints"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("max_steps", "steps_per_epoch", "patience", "checkpoint_every"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1, or None")
        for name in ("min_lr", "weight_decay", "mixup", "cutmix", "warmup_steps", "warmup_epochs", "num_workers"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        self._require("max_seconds", self.max_seconds is None or self.max_seconds > 0, "above 0, or None")
        self._require("seed", abs(self.seed) <= MAX_SEED, f"within ±{MAX_SEED}")
        self._require("lr", 0 < self.lr < math.inf, "above 0")
        self._require("label_smoothing", 0 <= self.label_smoothing < 1, "in 0..1")
        self._require("mixup_prob", 0 < self.mixup_prob <= 1, "above 0 and up to 1")
        self._require("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "between 0 and 1, or None")
        self._require("clip_grad", self.clip_grad is None or self.clip_grad > 0, "above 0, or None")
        self._require(
            "schedule", self.schedule in ("cosine", "constant", "exponential"), "'cosine', 'constant' or 'exponential'"
        )
        rising = self.schedule != "exponential" or (
            0 < self.min_lr < self.lr and not self.warmup_steps + self.warmup_epochs
        )
        self._require("min_lr", rising, "above 0 and below lr for the exponential schedule, which has no warm-up")
        for name in ("class_weights", "sampling"):
            self._require(name, getattr(self, name) in (None, "balanced"), "'balanced' or None")
        self._require("mixed_precision", self.mixed_precision in ("no", "bf16", "fp16"), "'no', 'bf16' or 'fp16'")
        self._require("device", self.device in ("auto", "cpu"), "'auto' or 'cpu'")

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result; a run may only be continued with the same ones."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in _FREE_FIELDS}

    def _check_types(self) -> None:
        """Refuse values of another type; numbers of numpy become Python's, so that they can be written as JSON."""
        for name, hint in get_type_hints(type(self)).items():
            value, allowed = getattr(self, name), get_args(hint) or (hint,)
            if isinstance(value, numbers.Real) and not isinstance(value, bool) and {int, float} & set(allowed):
                plain = int(value) if isinstance(value, numbers.Integral) else float(value)
                whole = float not in allowed
                self._require(name, not whole or plain == plain // 1, "a whole number")
                object.__setattr__(self, name, int(plain) if whole else float(plain))
            elif not isinstance(value, tuple(get_origin(t) or t for t in allowed)) or (
                isinstance(value, bool) and bool not in allowed
            ):
                wanted = " or ".join(getattr(t, "__name__", str(t)) for t in allowed)
                self._require(name, False, f"{wanted} (a {type(value).__name__} was given)")

    def _require(self, name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise InputError(f"FitConfig.{name} must be {wanted}, not {getattr(self, name)!r}.")


@dataclass(frozen=True)
class StepInfo:
    """What `on_step` receives after each optimiser step: counts are 1-based, `metrics` are the latest evaluation's."""

    step: int
    total: int
    epoch: int
    loss: float
    lr: float
    metrics: dict[str, float]


@dataclass
class FitResult:
    """What a run produced.

    Attributes:
        history: one dict per evaluation (or epoch): step, epoch, train_loss, lr, and the metrics.
        losses: training loss of every step since the run began, also across resumes.
        metrics, best_metrics: of the last and of the best evaluation on the validation data; empty without such data. An
            evaluation whose `monitor` is NaN is never the best.
        steps: optimiser steps done in total.
        stopped: "finished", "early" (patience), "max_seconds", "cancelled" (should_stop) or "interrupted" (Ctrl-C, SIGTERM).
        output_dir: where logs and checkpoints lie, if anywhere.
        seconds: training time, over all resumes.
        trainable_parameters: how many numbers were trained.
        signal: the number of the signal that interrupted the run, else 0.
    """

    history: list[dict[str, float]]
    losses: list[float]
    metrics: dict[str, float]
    best_metrics: dict[str, float]
    steps: int
    stopped: str
    output_dir: Path | None
    seconds: float
    trainable_parameters: int
    signal: int = 0
