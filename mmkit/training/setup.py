"""The parts `fit` is put together from: device, parameter groups, optimiser, schedule, and putting things back."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmkit.devices import cpu_multiplies_bf16
from mmkit.errors import InputError, nearest
from mmkit.training.config import FitConfig
from mmkit.training.digest import acts_on
from mmkit.training.loading import Batches, is_map_style


class Trainee(nn.Module):
    """Model and adapter as one module: DDP and FSDP see all trained parameters; any function runs inside forward."""

    def __init__(self, model: nn.Module, adapter: Any) -> None:
        super().__init__()
        self.model = model
        if isinstance(adapter, nn.Module):
            self.adapter = adapter

    def forward(self, function: Callable[[nn.Module, Any], Any], argument: Any) -> Any:
        return function(self.model, argument)


class RunningStatistics:
    """The running statistics of `module`'s normalisation layers, which a step changes before its loss is known."""

    def __init__(self, module: nn.Module) -> None:
        owners = [m for m in module.modules() if m.training and getattr(m, "running_mean", None) is not None]
        self.buffers = [b for m in owners for b in m.buffers(recurse=False)]
        self.kept = [b.clone() for b in self.buffers]

    def remember(self) -> None:
        """Keep them as they are now."""
        if self.buffers:
            torch._foreach_copy_(self.kept, self.buffers)

    def restore(self) -> None:
        """Put them back as they were."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.kept)


def make_accelerator(config: FitConfig) -> Any:
    """accelerate's `Accelerator`; raises `InputError` when the precision or the way of launching cannot be used."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    if AcceleratorState._shared_state:  # an earlier run: accelerate keeps its settings for the life of the process
        before = AcceleratorState()
        same_device = (before.device.type == "cpu") >= (config.device == "cpu")
        if before.mixed_precision != config.mixed_precision or not same_device:
            AcceleratorState._reset_state(reset_partial_state=PartialState().num_processes == 1)
    try:
        accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=config.device == "cpu")
    except ValueError as error:
        raise InputError(f"mixed_precision={config.mixed_precision!r} cannot be used here: {error}") from error
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise InputError("fit needs version 2 of FSDP: `accelerate launch --use_fsdp --fsdp_version 2`.")
        # the short cut over the meta device goes by state_dict() keys, which an adapter writes without infix
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    if config.mixed_precision == "bf16" and accelerator.device.type == "cpu" and not cpu_multiplies_bf16():
        warnings.warn(
            "mixed_precision='bf16' on a CPU without bfloat16 instructions: steps take several times as long as with 'no'.",
            stacklevel=2,
        )
    known = (DistributedType.NO, DistributedType.FSDP, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in known:
        raise InputError(f"fit does not run under {accelerator.distributed_type.value}; use DDP or FSDP.")
    return accelerator


def share_weights(accelerator: Any, module: nn.Module) -> bool:
    """Give all processes the first one's weights before FSDP shards them (DDP does by itself); returns whether it will."""
    from accelerate.utils import DistributedType, broadcast

    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.copy_(broadcast(tensor.data.to(accelerator.device), from_process=0))
    return True


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of this step, before any group's own scale."""
    group = optimizer.param_groups[0]
    return group["lr"] / group.get("lr_scale", 1.0)


def make_optimizer(config: FitConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """torch's or timm's optimiser; raises `InputError` with the nearest names for an unknown one or an unknown setting."""
    known: dict[str, Callable[..., torch.optim.Optimizer]]
    known = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": partial(torch.optim.SGD, momentum=0.9)}
    if config.optimizer in known:
        optimizer = known[config.optimizer](groups, lr=config.lr)
    else:
        from timm.optim import create_optimizer_v2, list_optimizers

        names = [str(name) for name in list_optimizers()]
        if config.optimizer not in names:
            raise InputError(f"Unknown optimizer {config.optimizer!r}. {nearest(config.optimizer, names)}")
        optimizer = create_optimizer_v2(groups, opt=config.optimizer, lr=config.lr, weight_decay=0.0)
    settings = {key for group in groups for key in group} - {"params", "lr_scale", *optimizer.defaults}
    if settings:
        unknown = sorted(settings)[0]
        raise InputError(f"{config.optimizer} has no setting {unknown!r}. {nearest(unknown, optimizer.defaults)}")
    return optimizer


class Rise:
    """Learning rates that rise by the same factor each step, from `start` to what the groups have, over `total` steps."""

    def __init__(self, optimizer: torch.optim.Optimizer, start: float, end: float, total: int) -> None:
        self.optimizer, self.factor = optimizer, (end / start) ** (1 / max(total - 1, 1))
        self.starts = [start * group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        self.step_update(0)

    def step_update(self, step: int) -> None:
        """Set the rates of the 0-based `step`."""
        for group, start in zip(self.optimizer.param_groups, self.starts, strict=True):
            group["lr"] = start * self.factor**step


def make_scheduler(config: FitConfig, optimizer: torch.optim.Optimizer, total: int, steps_per_epoch: int) -> Any:
    """timm's cosine schedule per step; "constant" is the same with min_lr = lr. A pure function of the step."""
    from timm.scheduler import CosineLRScheduler

    if config.schedule == "exponential":
        return Rise(optimizer, config.min_lr, config.lr, total)
    warmup = min(config.warmup_steps + round(config.warmup_epochs * steps_per_epoch), total - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(total, 2),  # timm warns at 1, where the schedule is one value anyway
        lr_min=config.lr if config.schedule == "constant" else config.min_lr,
        warmup_t=warmup,
        warmup_lr_init=config.lr / (warmup + 1),
        t_in_epochs=False,
    )


def freeze_running_statistics(module: nn.Module) -> None:
    """Frozen normalisation layers keep their statistics: a frozen model must come back unchanged."""
    everything = all(p.requires_grad for p in module.parameters())
    for child in module.modules():
        if getattr(child, "running_mean", None) is not None and not everything:
            own = list(child.parameters(recurse=False))
            if not any(p.requires_grad for p in own):
                child.eval()


class StopSignals(contextlib.AbstractContextManager["StopSignals"]):
    """Notes Ctrl-C and SIGTERM, so that a run can end after its current step; a second Ctrl-C ends it at once.

    Signals go to the main thread: in any other one nothing is done (a studio cancels through `should_stop`).
    `number`: the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, old in self._before.items():
            signal.signal(number, old)

    def _note(self, number: int, frame: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


@contextlib.contextmanager
def kept_modes(*modules: Any) -> Iterator[None]:
    """Put train/eval modes and requires_grad back as the caller had them."""
    found = [m for m in modules if isinstance(m, nn.Module)]
    modes = [(child, child.training) for m in found for child in m.modules()]
    grads = [(p, p.requires_grad) for m in found for p in m.parameters()]
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
        for parameter, requires_grad in grads:
            parameter.requires_grad_(requires_grad)


def loss_and_numbers(output: Any) -> tuple[Tensor, dict[str, float]]:
    """The loss and the further numbers of what a loss function returned. Raises `InputError` for anything else."""
    loss, numbers = output if isinstance(output, tuple) and len(output) == 2 else (output, {})
    check_loss(loss)
    try:
        return loss, {str(name): float(value) for name, value in numbers.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"loss_fn must return a loss, or (loss, {{name: number}}): {error}.") from error


def check_loss(loss: Any) -> None:
    """Raise `InputError` unless `loss` is one differentiable number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
        shape = f"{tuple(loss.shape)} {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"loss_fn must return one number as a tensor, not {shape}.")
    if not loss.requires_grad:
        raise InputError(
            "The loss does not depend on any trained parameter: the adapter or head is not in the model's path."
        )


def check_trainable(model: Any, adapter: Any) -> None:
    """Raise `InputError` for a model, an adapter or surroundings in which nothing could be trained."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    if not torch.is_grad_enabled():
        raise InputError("fit needs gradients: call it outside torch.no_grad() and torch.inference_mode().")
    if any(p.is_inference() for p in model.parameters()):
        raise InputError(
            "The model was made in torch.inference_mode(), where tensors can never be trained: build it outside, or give "
            "copy.deepcopy(model), made outside."
        )
    if adapter is None:
        return
    if not hasattr(adapter, "trainable_parameters"):
        raise InputError(f"adapter must be what apply_adapter returned, not {type(adapter).__name__}.")
    for wrong, state, way in (
        (adapter.merged, "merged", "call its unmerge() first"),
        (not adapter.attached, "not attached to a model", "call its attach(model) first"),
        (not adapter.enabled, "disabled", "enable it first"),
        (adapter.scale == 0, "at scale 0", "set adapter.scale = 1 first"),
    ):
        if wrong:
            raise InputError(f"Adapter {adapter.name!r} is {state}, so that training would not reach it: {way}.")


def check_arguments(train: Any, val: Any, loss_fn: Any, config: Any) -> None:
    """Raise `InputError` for what `fit` cannot work with, before anything is touched."""
    if not isinstance(config, FitConfig):
        raise InputError(f"config must be a FitConfig, not {type(config).__name__}; write FitConfig(epochs=3).")
    loss_settings = {"mixup", "cutmix", "label_smoothing", "class_weights"} - {*acts_on(loss_fn)}
    if loss_fn is not None and any(getattr(config, name) for name in loss_settings):
        raise InputError(
            f"{', '.join(sorted(loss_settings))} belong to the default loss: leave loss_fn out, or do it there (timm.data.Mixup) and "
            "set them to 0; a class whose attribute `acts_on` names them acts on them itself."
        )
    for name, data in (("train", train), ("val", val)):
        if isinstance(data, (str, bytes, os.PathLike, dict, DataLoader)):
            advice = {
                str: "open it first, as mmkit.open_dataset does",
                DataLoader: "pass its .dataset: fit makes batches",
            }
            hint = next((text for kind, text in advice.items() if isinstance(data, kind)), "pass a list or a data set")
            raise InputError(f"{name} must be a data set of examples, not {type(data).__name__}: {hint}.")
        if data is None and name == "val":
            continue
        if is_map_style(data):
            if len(data) == 0:
                raise InputError(f"The {name} data set is empty.")
        elif name == "val" or not hasattr(data, "__iter__"):
            kind = "map-style data set with len() and indexing" if name == "val" else "map-style or iterable data set"
            raise InputError(f"{name} must be a list or a {kind}, not {type(data).__name__}.")
        elif config.max_steps is None and config.steps_per_epoch is None:
            raise InputError(
                f"train is iterable ({type(data).__name__}), so its length is not known: give max_steps, or "
                "steps_per_epoch with epochs."
            )
    if val is None and config.patience is not None:
        raise InputError("patience needs validation data: pass val.")


def has_non_finite(batches: Batches, epoch: int, index: int) -> bool:
    """Whether example `index` holds NaN or infinity, as far as it can be read at all."""

    def bad(value: Any) -> bool:
        if isinstance(value, Tensor):
            return value.is_floating_point() and not bool(torch.isfinite(value).all())
        if isinstance(value, dict):
            return any(map(bad, value.values()))
        if isinstance(value, (tuple, list)):
            return any(map(bad, value))
        return isinstance(value, float) and not math.isfinite(value)

    try:
        return bad(batches.examples(epoch, [index]))
    except InputError as error:
        warnings.warn(f"Read again: {error}", stacklevel=2)
        return False
