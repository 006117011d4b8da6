"""`fit`: train a model, or an adapter on a frozen one, on one device or several, and continue where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.errors import CheckpointError, InputError, TrainingError, nearest
from mmkit.storage import runs as ckpt, write_json
from mmkit.training.config import FitConfig, FitResult, StepInfo
from mmkit.training.loading import (
    EvalLoader,
    SeededExamples,
    StepSampler,
    describe_examples,
    mix_seed,
    train_batches,
)
from mmkit.training.logs import RunLog
from mmkit.training.metrics import CrossEntropyLoss, accuracy, accuracy_sums, metrics_from_sums
from mmkit.training.setup import (
    StepUndo,
    Trainee,
    check_loss,
    current_lr,
    freeze_running_statistics,
    has_non_finite,
    kept_modes,
    kept_rng,
    make_accelerator,
    make_optimizer,
    make_scheduler,
    parameter_groups,
    seed_everything,
    share_weights,
)

LossFn = Callable[[nn.Module, Any], "Tensor | tuple[Tensor, dict[str, float]]"]
MetricsFn = Callable[[nn.Module, Any], dict[str, float]]

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
    on_step: Callable[[StepInfo], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> FitResult:
    """Train `model` in place (or `adapter` attached to it) and return what happened.

    The same call runs in one process, or in several under `torchrun` / `accelerate launch` (DDP, or FSDP version 2).

    Args:
        model: the module. Parameters with `requires_grad` are trained; it is moved to the training device.
        train, val: map-style data sets or lists of examples, by default `(image (C, H, W) float, label int)`.
        loss_fn: `(model, batch) -> loss`, or `(loss, {name: number})`, the mean over the batch's examples. Default:
            cross entropy. It may call any method of `model`.
        metrics_fn: `(model, loader) -> {name: number}` in eval mode without gradients; under several processes each one
            runs it over all of `val`. Default: accuracy and loss.
        config: see `FitConfig`.
        output_dir: folder for checkpoints, `log.csv`, `history.csv` and `metrics.json`; None writes nothing.
        adapter: an attached mmkit adapter: only its `trainable_parameters()` are trained.
        on_step: called after each step on the main process.
        should_stop: polled every step (and during evaluation in one process); True ends the run with its state saved.
        collate_fn: list of examples to batch; default: torch's.

    Raises:
        InputError: empty data, nothing to train, unusable examples or settings, or `output_dir` holds another run.
        CheckpointError: `resume` names a folder without a fitting checkpoint.
        TrainingError: the loss or gradient became NaN or infinite; it names the step and the batch's files, and the
            state before that step is saved.
    """
    config = config or FitConfig()
    for name, data in (("train", train), ("val", val)):
        if data is not None and (not hasattr(data, "__len__") or not hasattr(data, "__getitem__")):
            raise InputError(f"{name} must be a list or a map-style data set with len(), not {type(data).__name__}.")
        if data is not None and len(data) == 0:
            raise InputError(f"The {name} data set is empty.")
    if val is None and config.patience is not None:
        raise InputError("patience needs validation data: pass val.")
    while not _LOCK.acquire(timeout=0.2):
        if should_stop is not None and should_stop():
            return FitResult([], [], {}, {}, 0, "cancelled", None, 0.0, 0)
    try:
        hooks = (on_step or (lambda info: None), should_stop or (lambda: False))
        return _Run(model, train, val, loss_fn, metrics_fn, config, output_dir, adapter, hooks, collate_fn).run()
    finally:
        _LOCK.release()


class _Cancelled(Exception):
    """should_stop said yes in the middle of an evaluation."""


@dataclass
class _Progress:
    """Everything that changes from step to step besides tensors; saved as JSON."""

    step: int = 0
    evaluated: int = 0
    stopped: str = ""
    bad_evaluations: int = 0
    best_value: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


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
        hooks: tuple[Callable[[StepInfo], None], Callable[[], bool]],
        collate_fn: Callable[[list[Any]], Any] | None,
    ) -> None:
        self.model, self.train, self.val, self.config, self.adapter = model, train, val, config, adapter
        self.loss_fn = loss_fn or CrossEntropyLoss(config.label_smoothing)
        self.metrics_fn, self.collate_fn = metrics_fn, collate_fn
        self.on_step, self.should_stop = hooks
        self.folder = None if output_dir is None else Path(output_dir).expanduser()
        self.signalled = False
        self.state = _Progress()
        self.losses: list[float] = []
        self.best: dict[str, Tensor] = {}
        self.ema: dict[str, Tensor] = {}

    # -------------------------------------------------------------------------------------------------- preparation

    def run(self) -> FitResult:
        with kept_rng(), kept_modes(self.model, self.adapter), self._signals():
            self._prepare()
            self._restore()
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

    def _prepare(self) -> None:
        config = self.config
        self.accelerator = make_accelerator(config)
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.sampler = StepSampler(
            len(self.train),
            config.batch_size,
            grad_accum=config.grad_accum,
            world=self.world,
            rank=self.rank,
            seed=config.seed,
            drop_last=config.drop_last,
        )
        if self.sampler.steps_per_epoch == 0:
            raise InputError(
                f"{len(self.train)} examples do not fill one step of {self.sampler.step_size}; use drop_last=False."
            )
        self.total = config.max_steps or config.epochs * self.sampler.steps_per_epoch
        trainee = Trainee(self.model, self.adapter)
        groups, self.names = parameter_groups(trainee, self.model, self.adapter, config.weight_decay)
        self.trainable = sum(p.numel() for g in groups for p in g["params"])
        optimizer = make_optimizer(config, groups)
        self.scheduler = make_scheduler(config, optimizer, self.total, self.sampler.steps_per_epoch)
        shapes = sorted((k, tuple(p.shape)) for k, p in trainee.named_parameters() if p.requires_grad)
        seed_everything(mix_seed(config.seed, self.rank))
        trainee.train()
        freeze_running_statistics(trainee)
        self.sharded = share_weights(self.accelerator, trainee)
        self.trainee, self.optimizer = self.accelerator.prepare(trainee, optimizer)
        self.inner = self.accelerator.unwrap_model(self.trainee)
        self.fingerprint = {
            **config.identity(),
            "examples": len(self.train),
            "processes": self.world,
            "trained tensors": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
        }
        if config.ema_decay is not None:
            self.ema = {k: p.detach().clone() for k, p in self.inner.named_parameters() if p.requires_grad}

    def _open_log(self) -> RunLog | None:
        if self.folder is None or not self.accelerator.is_main_process:
            return None
        return RunLog(self.folder, self.state.step, self.config.tensorboard)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the current step; a second Ctrl-C ends it at once."""

        def handle(number: int, frame: Any) -> None:
            if self.signalled and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signalled = True

        if threading.current_thread() is not threading.main_thread():
            yield  # signals go to the main thread; a studio cancels through should_stop
            return
        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    # --------------------------------------------------------------------------------------------------------- steps

    def _loop(self, log: RunLog | None) -> None:
        from tqdm import tqdm

        state, config = self.state, self.config
        batches = train_batches(
            self.train,
            self.sampler,
            first=state.step,
            last=self.total,
            num_workers=config.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        show = config.progress and self.accelerator.is_main_process
        with tqdm(total=self.total, initial=state.step, desc="fit", disable=not show) as bar:
            if state.stopped in ("", "cancelled", "interrupted"):
                state.stopped = ""
                self._after_step(log, saved=True)  # an evaluation or stop that fell just before this start
            while not state.stopped:
                loss, extras, stop = self._step(batches)
                state.step += 1
                self.losses.append(loss)
                epoch = (state.step - 1) // self.sampler.steps_per_epoch + 1
                lr = current_lr(self.optimizer)
                self.scheduler.step_update(state.step)
                if log is not None:
                    log.add("log", {"step": state.step, "epoch": epoch, "loss": loss, "lr": lr, **extras})
                bar.update()
                shown = {"loss": loss, **{f"val {k}": v for k, v in state.metrics.items()}}
                bar.set_postfix({k: f"{v:.4f}" for k, v in shown.items()}, refresh=False)
                self._after_step(log, stop=stop)
                if self.accelerator.is_main_process:
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
        from accelerate.utils import send_to_device

        accelerator, undo = self.accelerator, StepUndo(self.inner)
        micro = self.sampler.micro_batches(self.state.step)
        total = torch.zeros((), device=accelerator.device)
        extras: dict[str, float] = {}
        for i, (_, weight) in enumerate(micro):
            batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
            with contextlib.nullcontext() if i == len(micro) - 1 else accelerator.no_sync(self.trainee):
                output = self.trainee(self.loss_fn, batch)
                loss, numbers = output if isinstance(output, tuple) else (output, {})
                check_loss(loss)
                accelerator.backward(loss * weight)
            total = total + loss.detach() * weight
            for key, value in numbers.items():
                extras[key] = extras.get(key, 0.0) + float(value) * weight
        flags = [float(self.signalled), float(bool(self.should_stop())), *(extras[k] for k in sorted(extras))]
        rest = torch.tensor(flags, dtype=torch.float32, device=total.device)
        mean, signalled, cancelled, *means = self._mean_over_processes(torch.cat([total.float()[None], rest]))
        extras = dict(zip(sorted(extras), means, strict=True))
        if not math.isfinite(mean):
            self._fail("loss", mean, undo)
        if self.config.clip_grad is not None:
            norm = accelerator.clip_grad_norm_(list(self.trainee.parameters()), self.config.clip_grad)
            if accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
                self._fail("gradient norm", float(norm), undo)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_ema()
        return mean, extras, "interrupted" if signalled else "cancelled" if cancelled else ""

    def _mean_over_processes(self, values: Tensor) -> list[float]:
        return (self.accelerator.reduce(values, "sum") / self.world).tolist() if self.world > 1 else values.tolist()

    def _update_ema(self) -> None:
        decay = self.config.ema_decay
        if decay is not None:
            with torch.no_grad():
                for key, parameter in self.inner.named_parameters():
                    if key in self.ema:
                        self.ema[key].mul_(decay).add_(parameter.detach(), alpha=1 - decay)

    def _fail(self, what: str, value: float, undo: StepUndo) -> None:
        """Save the state before the bad step and raise with the files of the batch."""
        undo.restore()
        step = self.state.step
        chosen = self.sampler.examples(step)
        examples, epoch = SeededExamples(self.train, self.config.seed), step // self.sampler.steps_per_epoch
        bad = [i for i in chosen if has_non_finite(examples, (epoch, i))]
        files = describe_examples(self.train, bad or chosen)
        shown = ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
        cause = f"These examples hold NaN or infinite values: {shown}." if bad else f"The step's examples: {shown}."
        saved = None
        if self.folder is not None:
            self._save(f"failed_at_{step + 1:08d}", rng=ckpt.rng_state(undo.rng))
            saved = self.folder / "checkpoints" / f"failed_at_{step + 1:08d}"
        hint = "" if bad else " Try a lower lr, a smaller clip_grad, or mixed_precision='no'."
        where = f" The state before this step is in {saved}." if saved else ""
        raise TrainingError(
            f"The {what} became {value} at step {step + 1}. {cause}{hint}{where}", step + 1, files, saved
        )

    # ---------------------------------------------------------------------------------------------------- evaluation

    def _evaluate(self, log: RunLog | None) -> None:
        state, per_epoch = self.state, self.sampler.steps_per_epoch
        first = (state.step - 1) // per_epoch * per_epoch
        recent = self.losses[first:]
        row: dict[str, float] = {
            "step": state.step,
            "epoch": state.step / per_epoch,
            "train_loss": sum(recent) / len(recent),
            "lr": current_lr(self.optimizer),
        }
        if self.val is not None:
            with self._evaluation_weights():
                state.metrics = self._metrics()
                self._judge()
            row.update({f"val_{k}" if k in row else k: v for k, v in state.metrics.items()})
        state.evaluated = state.step
        state.history.append(row)
        if log is not None:
            log.add("history", row)

    def _metrics(self) -> dict[str, float]:
        shared = self.metrics_fn is None and self.world > 1 and not self.sharded
        loader = EvalLoader(
            self.val,
            self.config.batch_size,
            self.accelerator.device,
            num_workers=self.config.num_workers,
            collate_fn=self.collate_fn,
            shard=(self.rank, self.world) if shared else (0, 1),
            seed=self.config.seed,
            check=self._check_cancelled,
        )
        self.trainee.eval()
        try:
            with torch.no_grad():
                if shared:
                    sums = self.trainee(accuracy_sums, loader).to(self.accelerator.device, torch.float32)
                    return metrics_from_sums(self.accelerator.reduce(sums, "sum"))
                found = self.trainee(self.metrics_fn or accuracy, loader)
        finally:
            self.trainee.train()
            freeze_running_statistics(self.inner)
            if self.sharded:  # without a backward pass FSDP would leave its root whole
                for module in self.trainee.modules():
                    if hasattr(module, "reshard"):
                        module.reshard()
        if not isinstance(found, dict):
            raise InputError(f"metrics_fn must return a dict of numbers, not {type(found).__name__}.")
        return {str(k): float(v) for k, v in found.items()}

    def _check_cancelled(self) -> None:
        if self.world == 1 and self.should_stop():
            raise _Cancelled

    def _judge(self) -> None:
        """Compare with the best evaluation so far and keep the weights if they are better."""
        state, name = self.state, self.config.monitor.lstrip("-")
        if name not in state.metrics:
            raise InputError(f"monitor={self.config.monitor!r} is not a metric. {nearest(name, state.metrics)}")
        value = -state.metrics[name] if self.config.monitor.startswith("-") else state.metrics[name]
        if state.best_value is None or value > state.best_value:
            state.best_value, state.best_metrics, state.bad_evaluations = value, dict(state.metrics), 0
            if self.config.restore_best:
                self.best = ckpt.module_tensors(self.inner)
        else:
            state.bad_evaluations += 1

    @contextlib.contextmanager
    def _evaluation_weights(self) -> Iterator[None]:
        """The moving average in place of the weights, if there is one."""
        self._swap_ema()
        try:
            yield
        finally:
            self._swap_ema()

    @torch.no_grad()
    def _swap_ema(self) -> None:
        for key, parameter in self.inner.named_parameters():
            if key in self.ema:
                kept = parameter.detach().clone()
                parameter.copy_(self.ema[key])
                self.ema[key] = kept

    # --------------------------------------------------------------------------------------------- saving, finishing

    def _save(self, name: str, rng: dict[str, Tensor] | None = None) -> None:
        if self.folder is None:
            return
        root = self.folder / "checkpoints"
        tensors, rest = ckpt.optimizer_tensors(self.names, self.optimizer.optimizer)
        files = {"weights": ckpt.module_tensors(self.inner), "optimizer": tensors}
        files["losses"] = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        if self.best:
            files["best"] = self.best
        if self.ema:
            files["ema"] = {k: ckpt.whole(v) for k, v in self.ema.items()}
        self.state.seconds = self._clock()
        scaler = self.accelerator.scaler
        state = {
            "run": self.fingerprint,
            "progress": dataclasses.asdict(self.state),
            "optimizer": rest,
            "scaler": scaler.state_dict() if scaler is not None else {},
        }
        writer = ckpt.CheckpointWriter(root / name, self.rank, self.accelerator.wait_for_everyone)
        writer.write(files, rng or ckpt.rng_state(), state)
        if self.accelerator.is_main_process:
            ckpt.prune_checkpoints(root, self.config.keep_checkpoints)

    def _restore(self) -> None:
        """Load the newest checkpoint when `resume` and the folder say so."""
        resume = self.config.resume
        if resume is False or (self.folder is None and resume in ("auto", True)):
            if self.folder is not None and self.accelerator.is_main_process:
                ckpt.remove_checkpoints(self.folder / "checkpoints")
            self.accelerator.wait_for_everyone()
            return
        named = resume not in ("auto", True)
        source = Path(resume).expanduser() if named else self.folder  # type: ignore[arg-type]
        assert source is not None
        found = ckpt.find_checkpoint(source)
        if found is None:
            if named:
                raise CheckpointError(f"resume: {source} holds no readable training checkpoint.")
            return
        path, saved, tensors = found
        changed = ckpt.differing(saved["run"], self.fingerprint)
        if changed:
            raise InputError(
                f"{path} belongs to a run with other settings ({'; '.join(changed[:5])}). Use the same settings to "
                "continue, resume=False to start over, or another output_dir."
            )
        ckpt.load_module_tensors(self.inner, tensors["weights"], str(path))
        ckpt.load_optimizer_tensors(self.names, self.optimizer.optimizer, tensors["optimizer"], saved["optimizer"])
        if self.accelerator.scaler is not None and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.state = _Progress(**saved["progress"])
        self.losses = tensors["losses"]["losses"].tolist()
        self.best = tensors.get("best", {})
        for key, parameter in self.inner.named_parameters():
            if key in self.ema:
                self.ema[key] = ckpt.shard_like(parameter.detach(), tensors["ema"][key])
        self.scheduler.step_update(self.state.step)
        if named and self.folder is not None and self.accelerator.is_main_process:
            ckpt.remove_checkpoints(self.folder / "checkpoints", after=self.state.step)
        self.accelerator.wait_for_everyone()
        ckpt.set_rng_state(tensors[f"rng_{self.rank}"])

    def _finish(self) -> FitResult:
        state = self.state
        if self.best and self.config.restore_best:
            ckpt.load_module_tensors(self.inner, self.best, "the best weights")
        elif self.ema:
            self._swap_ema()
        result = FitResult(
            history=state.history,
            losses=self.losses,
            metrics=state.metrics,
            best_metrics=state.best_metrics,
            steps=state.step,
            stopped=state.stopped,
            output_dir=self.folder,
            seconds=self._clock(),
            trainable_parameters=self.trainable,
        )
        if self.folder is not None and self.accelerator.is_main_process:
            names = ("metrics", "best_metrics", "steps", "stopped", "seconds", "trainable_parameters")
            summary = {k: getattr(result, k) for k in names}
            write_json(
                self.folder / "metrics.json", {**summary, "torch": torch.__version__, "settings": self.fingerprint}
            )
        self.accelerator.wait_for_everyone()
        return result
