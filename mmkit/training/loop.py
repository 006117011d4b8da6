"""`fit`: train a model, or an adapter on a frozen one, on one device or several, and continue where it stopped."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.backbones import mark_trained
from mmkit.errors import InputError, TrainingError
from mmkit.storage import folder_lock, runs as ckpt, write_json
from mmkit.storage.files import absolute
from mmkit.storage.folders import check_no_saved
from mmkit.training.config import FitConfig, FitResult, StepInfo
from mmkit.training.digest import acts_on
from mmkit.training.ema import MovingAverage
from mmkit.training.evaluation import Evaluator, MetricsFn
from mmkit.training.failures import explaining
from mmkit.training.groups import ParameterGroups, describe_groups, parameter_groups
from mmkit.training.loading import Batches, Collate, Stream, describe_examples, is_map_style, train_batches
from mmkit.training.logs import RunLog
from mmkit.training.metrics import CrossEntropyLoss, TargetError, balanced_weights, labels_of
from mmkit.training.progress import Progress
from mmkit.training.randomness import kept_rng, mix_seed, seed_everything
from mmkit.training.resume import Identity, RunState
from mmkit.training.sampling import StepKeys, StepSampler
from mmkit.training.setup import (
    RunningStatistics,
    StopSignals,
    Trainee,
    check_arguments,
    check_trainable,
    current_lr,
    freeze_running_statistics,
    has_non_finite,
    kept_modes,
    loss_and_numbers,
    make_accelerator,
    make_optimizer,
    make_scheduler,
    share_weights,
)

LossFn = Callable[[nn.Module, Any], "Tensor | tuple[Tensor, dict[str, float]]"]

_PAUSES = ("interrupted", "cancelled", "max_seconds")  # why a run stops that a later call may continue
_LOCK = threading.RLock()  # accelerate's state and the random streams belong to the process: one run at a time


def fit(
    model: nn.Module,
    train: Any,
    val: Any = None,
    *,
    loss_fn: LossFn | None = None,
    metrics_fn: MetricsFn | None = None,
    config: FitConfig | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    adapter: Any = None,
    parameter_groups: ParameterGroups | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    collate_fn: Collate | None = None,
    identity: Mapping[str, Any] | None = None,
) -> FitResult:
    """Train `model` in place (or `adapter` attached to it) and return what happened.

    The same call runs in one process, or in several under `torchrun` / `accelerate launch` (DDP, or FSDP version 2).

    Data sets. Examples are by default `(image (C, H, W) float, label int)`. A map-style one (a list, or anything with
    `len()` and indexing) is shuffled each epoch. An iterable one (`__iter__` alone) needs `max_steps` or `steps_per_epoch`;
    it is used in its own order and started again when it ends. A data set that has `set_epoch(epoch)`, also inside
    another one, is told the epoch (an iterable: the pass) before it is read, in whichever process reads it. What an
    example draws from the global generators of Python, numpy and torch depends on (seed, epoch, index) alone.
    Limits of iterables: one process reads them however large `num_workers`; under several processes each reads all of it
    and keeps its share; a resumed run reads and drops what it has seen; that the data are the same cannot be checked.

    Args:
        model: the module. Parameters with `requires_grad` are trained; it is moved to the training device.
        train: a map-style or iterable data set.
        val: a map-style data set.
        loss_fn: `(model, batch) -> loss`, or `(loss, {name: number})`, the mean over the batch's examples. Default:
            cross entropy. It may call any method of `model`. An object whose class has `acts_on`, a tuple of names such as
            "label_smoothing", acts on these settings itself; a data set may have "sampling" there.
            The numbers become columns of `log.csv`; one named like a column that is there ("loss") is called "loss_fn_loss".
        metrics_fn: `(model, loader) -> {name: number}` in eval mode without gradients; under several processes each one
            runs it over all of `val`. Default: accuracy and loss.
        config: see `FitConfig`.
        output_dir: folder for checkpoints, `log.csv`, `history.csv` and `metrics.json`; None writes nothing.
        adapter: an attached mmkit adapter: only its `trainable_parameters()` are trained.
        parameter_groups: what is trained and how: dicts as torch's optimisers take them, or a function of `model` that
            returns such. "params" holds parameters; "lr" (or "lr_scale", a factor on `FitConfig.lr`) follows the schedule
            of all; a group without "weight_decay" follows `FitConfig.weight_decay`; other settings go to the optimiser.
            Parameters in no group are not trained.
        on_step: called after each step on the main process.
        should_stop: polled every step (and during evaluation in one process); True ends the run with its state saved.
        collate_fn: list of examples to batch; default: torch's. What it draws is seeded per batch.
        identity: further facts that decide the result and that `fit` cannot see, by a name the user knows, such as the
            file that the start came from.

    Only the same run is continued: `output_dir` must hold one of the same data (files and pictures by content, labels,
    order, class names, transforms), loss, metrics, adapter, frozen weights and settings; see `mmkit.training.identity`. The
    start of what is trained does not count, for the checkpoint replaces it. A finished run may be given more `epochs` (or
    `max_steps`): it goes on with the learning rate that the longer schedule has at that step, so with "cosine" the rate rises
    again, and the result is not that of one long run; with "constant" it is.

    Raises:
        InputError: empty data, nothing to train, unusable examples, labels or settings, a data set that fails (the example
            is named), or `output_dir` is in use by another process or holds a saved adapter or model.
        RunDiffersError: an `InputError`: `output_dir` holds another run; what differs is named.
        StorageError: a file of the run cannot be written.
        CheckpointError: `resume` names a folder without a readable checkpoint.
        TrainingError: the loss or gradient became NaN or infinite (it names the step and the batch's files, and the
            state before that step is saved), memory ran out, or a process that reads data was killed.
    """
    config = FitConfig() if config is None else config
    check_trainable(model, adapter)
    check_arguments(train, val, loss_fn, config)
    while not _LOCK.acquire(timeout=0.2):
        if should_stop is not None and should_stop():
            return FitResult([], [], {}, {}, 0, "cancelled", None, 0.0, 0)
    try:
        hooks = (on_step or (lambda info: None), should_stop or (lambda: False))
        return _Run(
            model, train, val, loss_fn, metrics_fn, config, output_dir, adapter, parameter_groups, hooks, collate_fn,
            identity,
        ).run()  # fmt: skip
    finally:
        _LOCK.release()


class _Cancelled(Exception):
    """should_stop said yes in the middle of an evaluation."""


class _Run:
    """One call of `fit`."""

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        val: Any,
        loss_fn: LossFn | None,
        metrics_fn: MetricsFn | None,
        config: FitConfig,
        output_dir: str | os.PathLike[str] | None,
        adapter: Any,
        parameter_groups: ParameterGroups | None,
        hooks: tuple[Callable[[StepInfo], None], Callable[[], bool]],
        collate_fn: Collate | None,
        identity: Mapping[str, Any] | None,
    ) -> None:
        self.model, self.val, self.config, self.adapter = model, val, config, adapter
        self.train: Any = train if is_map_style(train) else Stream(train, config.seed)
        mixing = (config.mixup, config.cutmix, config.mixup_prob)
        weighed = config.class_weights and "class_weights" not in acts_on(loss_fn)
        sampled = config.sampling and "sampling" not in acts_on(train)
        labels = labels_of(train) if weighed or sampled else []
        self.labels = labels if sampled else None
        weights = balanced_weights(labels) if weighed else None
        self.loss_fn = loss_fn or CrossEntropyLoss(config.label_smoothing, *mixing, weights=weights)
        self.metrics_fn, self.given_groups, self.collate_fn = metrics_fn, parameter_groups, collate_fn
        self.on_step, self.should_stop = hooks
        self.folder = None if output_dir is None else absolute(output_dir)
        self.functions = {"loss_fn": loss_fn, "metrics_fn": metrics_fn, "collate_fn": collate_fn}
        self.data, self.given_identity = train, identity
        self.batch: Any = None
        self.state = Progress()

    # -------------------------------------------------------------------------------------------------- preparation

    def run(self) -> FitResult:
        if self.folder is not None:
            check_no_saved(self.folder)
        with kept_rng(), kept_modes(self.model, self.adapter), StopSignals() as self.signals:
            self._plan()
            with folder_lock(self.folder) if self.folder and self.rank == 0 else contextlib.nullcontext():
                self._prepare()
                self.saved.restore()
                started = time.perf_counter() - self.state.seconds
                self._clock = lambda: time.perf_counter() - started
                log = self._open_log()
                try:
                    self._loop(log)
                finally:
                    if log is not None:
                        log.close()
                    self.optimizer.zero_grad(set_to_none=True)
                return self._finish()

    def _plan(self) -> None:
        """Which examples each step takes, and how many steps there are."""
        config = self.config
        self.accelerator = make_accelerator(config)
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        stream = isinstance(self.train, Stream)
        per_step = config.batch_size * config.grad_accum * self.world
        self.sampler = StepSampler(
            (config.steps_per_epoch or config.max_steps) * per_step if stream else len(self.train),
            config.batch_size,
            grad_accum=config.grad_accum,
            world=self.world,
            rank=self.rank,
            seed=config.seed,
            drop_last=config.drop_last,
            stream=stream,
            labels=self.labels,
        )
        if self.sampler.steps_per_epoch == 0:
            raise InputError(f"{len(self.train)} examples do not fill one step of {per_step}; use drop_last=False.")
        self.total = config.max_steps or config.epochs * self.sampler.steps_per_epoch

    def _prepare(self) -> None:
        config = self.config
        trainee = Trainee(self.model, self.adapter)
        groups, names = parameter_groups(
            trainee, self.model, self.adapter, config.weight_decay, self.given_groups, config.lr
        )
        self.trainable = sum(p.numel() for g in groups for p in g["params"])
        optimizer = make_optimizer(config, groups)
        self.scheduler = make_scheduler(config, optimizer, self.total, self.sampler.steps_per_epoch)
        identity = (
            self._identity(trainee, groups) if self.folder or config.resume not in (False, True, "auto") else None
        )
        seed_everything(mix_seed(config.seed, self.rank))
        trainee.train()
        freeze_running_statistics(trainee)
        self.sharded = share_weights(self.accelerator, trainee)
        self.trainee, self.optimizer = self.accelerator.prepare(trainee, optimizer)
        self.inner = self.accelerator.unwrap_model(self.trainee)
        self.parameters = list(self.trainee.parameters())
        self.statistics = RunningStatistics(self.inner)
        self.ema = None if config.ema_decay is None else MovingAverage(self.inner, config.ema_decay)
        self.saved = RunState(
            config,
            self.accelerator,
            identity,
            self.state,
            self.inner,
            names,
            self.optimizer.optimizer,
            self.scheduler,
            self.ema,
            self.total,
        )
        self.evaluator = self.val is not None and Evaluator(
            self.accelerator,
            self.trainee,
            self.val,
            self.metrics_fn,
            config,
            collate_fn=self.collate_fn,
            sharded=self.sharded,
            check=self._check_cancelled,
        )

    def _identity(self, trainee: nn.Module, groups: list[dict[str, Any]]) -> Identity:
        names = {id(p): k for k, p in trainee.named_parameters()}
        described = describe_groups(groups, names)
        settings = {**self.config.identity(), "processes": self.world, "parameter groups": described}
        return Identity(
            self.folder, self.data, self.val, self.functions, self.given_identity, trainee, self.adapter, settings
        )

    def _open_log(self) -> RunLog | None:
        if self.folder is None or self.rank != 0:
            return None
        return RunLog(self.folder, self.state.step, self.config.tensorboard)

    # --------------------------------------------------------------------------------------------------------- steps

    def _loop(self, log: RunLog | None) -> None:
        from tqdm import tqdm

        state, config = self.state, self.config
        batches = train_batches(
            Batches(self.train, config.seed, self.collate_fn),
            StepKeys(self.sampler, state.step, self.total),
            config.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        show = config.progress and self.rank == 0
        ours = isinstance(self.loss_fn, CrossEntropyLoss)
        try:
            with (
                tqdm(total=self.total, initial=state.step, desc="fit", disable=not show) as bar,
                explaining(lambda: (state.step + 1, self.batch), ours=ours),
            ):
                if state.stopped in ("", *_PAUSES):
                    state.stopped = ""
                    # an evaluation or stop that fell just before this start
                    self._after_step(log, stop="max_seconds" if self._out_of_time() else "", saved=True)
                while not state.stopped:
                    self._advance(batches, log, bar if show else None)
                if state.stopped == "max_seconds" and state.evaluated < state.step:
                    with contextlib.suppress(_Cancelled):
                        self._evaluate(None)  # for the result alone: a continued run evaluates where it always would
        finally:
            batches.close()

    def _advance(self, batches: Iterator[Any], log: RunLog | None, bar: Any) -> None:
        """One step and what follows it."""
        state = self.state
        loss, extras, stop = self._step(batches)
        self.batch = None
        state.step += 1
        self.state.losses.append(loss)
        epoch = (state.step - 1) // self.sampler.steps_per_epoch + 1
        lr = current_lr(self.optimizer)
        self.scheduler.step_update(state.step)
        if log is not None:
            row = {"step": state.step, "epoch": epoch, "loss": loss, "lr": lr}
            log.add("log", row | {f"loss_fn_{k}" if k in row else k: v for k, v in extras.items()})
        if bar is not None:
            bar.update()
            shown = {"loss": loss, **{f"val {k}": v for k, v in state.metrics.items()}}
            bar.set_postfix({k: f"{v:.4f}" for k, v in shown.items()}, refresh=False)
        self._after_step(log, stop=stop)
        if self.rank == 0:
            self.on_step(StepInfo(state.step, self.total, epoch, loss, lr, dict(state.metrics)))

    def _after_step(self, log: RunLog | None, *, stop: str = "", saved: bool = False) -> None:
        """Evaluate, decide whether to stop, and write a checkpoint, as the step count demands."""
        state, per_epoch = self.state, self.sampler.steps_per_epoch
        last = state.step >= self.total
        epoch_done = state.step > 0 and state.step % per_epoch == 0
        due = last or (epoch_done and state.step // per_epoch % self.config.eval_every == 0)
        if due and state.evaluated < state.step and not stop:
            try:
                self._evaluate(log)
            except _Cancelled:
                stop = "cancelled"
        if stop:
            state.stopped = stop
        elif self.config.patience is not None and state.bad_evaluations >= self.config.patience:
            state.stopped = "early"
        elif last:
            state.stopped = "finished"
        every = self.config.checkpoint_every
        if state.stopped or (not saved and (state.step % every == 0 if every else epoch_done)):
            self._save(ckpt.checkpoint_name(state.step))

    def _step(self, batches: Iterator[Any]) -> tuple[float, dict[str, float], str]:
        """One optimiser step: (mean loss over the step's examples and all processes, extras, why to stop or "")."""
        self.statistics.remember()
        micro = self.sampler.micro_batches(self.state.step)
        total: Any = 0.0
        extras: dict[str, float] = {}
        for i in range(len(micro)):
            loss, numbers = self._backward(batches, micro, i)
            total = total + loss
            for key, value in numbers.items():
                extras[key] = extras.get(key, 0.0) + value * micro[i][1]
        mean, extras, stop = self._agree(total, extras)
        if not math.isfinite(mean):
            self._fail("loss", mean)
        if self.config.clip_grad is not None:
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.clip_grad)
            if self.accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
                self._fail("gradient norm", float(norm))
        # accelerate's own step looks for optional packages each time; only a gradient scaler needs what it adds
        (self.optimizer.optimizer if self.accelerator.scaler is None else self.optimizer).step()
        self.optimizer.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.state.step + 1)
        return mean, extras, stop

    def _backward(
        self, batches: Iterator[Any], micro: list[tuple[Sequence[int], float]], i: int
    ) -> tuple[Tensor, dict[str, float]]:
        """Add the gradients of the step's micro-batch `i`; returns its share of the loss, and the extras."""
        from accelerate.utils import send_to_device

        accelerator, loss_fn = self.accelerator, self.loss_fn
        indices, weight = micro[i]
        self.batch = None
        self.batch = next(batches)
        seed_everything(mix_seed(self.config.seed, self.state.step, i, self.rank), device=accelerator.device)
        try:
            if isinstance(loss_fn, CrossEntropyLoss) and accelerator.device.type != "cpu":
                loss_fn.check(self.batch)
            batch = send_to_device(self.batch, accelerator.device, non_blocking=True)
            with contextlib.nullcontext() if i == len(micro) - 1 else accelerator.no_sync(self.trainee):
                output = self.trainee(loss_fn, batch)
                loss, numbers = loss_and_numbers(output)
                share = loss if weight == 1 else loss * weight
                (share if accelerator.scaler is None else accelerator.scaler.scale(share)).backward()
        except TargetError as error:
            raise error.named(self.train, indices) from None
        return share.detach(), numbers

    def _agree(self, loss: Tensor, extras: dict[str, float]) -> tuple[float, dict[str, float], str]:
        """The mean loss, the mean extras and why to stop: the same in all processes."""
        flags: list[float] = [bool(self.signals.number), bool(self.should_stop()), self._out_of_time()]
        if self.world == 1:
            mean, means = float(loss), [extras[k] for k in sorted(extras)]
        else:
            rest = torch.tensor([*flags, *(extras[k] for k in sorted(extras))], dtype=torch.float32, device=loss.device)
            values = self.accelerator.reduce(torch.cat([loss.float()[None], rest]), "sum") / self.world
            mean, *both = values.tolist()
            flags, means = both[: len(flags)], both[len(flags) :]
        stop = next((reason for reason, flag in zip(_PAUSES, flags, strict=True) if flag), "")
        return mean, dict(zip(sorted(extras), means, strict=True)), stop

    def _out_of_time(self) -> bool:
        return self.config.max_seconds is not None and self._clock() >= self.config.max_seconds

    def _fail(self, what: str, value: float) -> None:
        """Save the state before the bad step and raise with the files of the batch."""
        self.statistics.restore()
        step = self.state.step
        chosen = self.sampler.examples(step)
        epoch, again = step // self.sampler.steps_per_epoch, Batches(self.train, self.config.seed, list)
        bad = [i for i in chosen if not self.sampler.stream and has_non_finite(again, epoch, i)]
        files = describe_examples(self.train, bad or chosen)
        shown = ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
        cause = f"These examples hold NaN or infinite values: {shown}." if bad else f"The step's examples: {shown}."
        saved = self._save(f"failed_at_{step + 1:08d}")
        hint = "" if bad else " Try a lower lr, a smaller clip_grad, or mixed_precision='no'."
        where = f" The state before this step is in {saved}." if saved else ""
        raise TrainingError(
            f"The {what} became {value} at step {step + 1}. {cause}{hint}{where}", step + 1, files, saved
        )

    # ---------------------------------------------------------------------------------------------------- evaluation

    def _evaluate(self, log: RunLog | None) -> None:
        state, per_epoch = self.state, self.sampler.steps_per_epoch
        first = (state.step - 1) // per_epoch * per_epoch
        recent = self.state.losses[first:]
        row: dict[str, float] = {
            "step": state.step,
            "epoch": state.step / per_epoch,
            "train_loss": sum(recent) / len(recent),
            "lr": current_lr(self.optimizer),
        }
        if self.evaluator:
            with self.ema.applied() if self.ema is not None else contextlib.nullcontext():
                state.metrics = self.evaluator(state.step)
                if state.judge(self.config.monitor) and self.config.restore_best:
                    state.best = ckpt.module_tensors(self.inner)
            row.update({f"val_{k}" if k in row else k: v for k, v in state.metrics.items()})
        state.evaluated = state.step
        state.history.append(row)
        if log is not None:
            log.add("history", row)

    def _check_cancelled(self) -> None:
        if self.world == 1 and self.should_stop():
            raise _Cancelled

    # --------------------------------------------------------------------------------------------- saving, finishing

    def _save(self, name: str) -> Path | None:
        self.state.seconds = self._clock()
        return self.saved.save(name)

    def _finish(self) -> FitResult:
        state = self.state
        if state.best and self.config.restore_best:
            ckpt.load_module_tensors(self.inner, state.best, "the best weights")
        elif self.ema:
            self.ema.apply()
        mark_trained(self.model)
        result = FitResult(
            history=state.history,
            losses=state.losses,
            metrics=state.metrics,
            best_metrics=state.best_metrics,
            steps=state.step,
            stopped=state.stopped,
            output_dir=self.folder,
            seconds=self._clock(),
            trainable_parameters=self.trainable,
            signal=self.signals.number,
        )
        if self.folder is not None and self.rank == 0:
            summary = {
                "measured on": "the validation data" if self.val is not None else "the training data: losses only",
                "best": result.best_metrics,
                "last": result.metrics,
                **{k: getattr(result, k) for k in ("steps", "stopped", "seconds", "trainable_parameters")},
                "torch": torch.__version__,
                "run": self.saved.identity and self.saved.identity.facts,
            }
            write_json(self.folder / "metrics.json", summary)
        self.accelerator.wait_for_everyone()
        return result
