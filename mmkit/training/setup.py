"""The parts `fit` is put together from: device, parameter groups, optimiser, schedule, and putting things back."""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmkit.errors import InputError, nearest
from mmkit.storage import runs as ckpt
from mmkit.training.config import FitConfig


class Trainee(nn.Module):
    """Model and adapter as one module: DDP and FSDP see all trained parameters; any function runs inside forward."""

    def __init__(self, model: nn.Module, adapter: Any) -> None:
        super().__init__()
        self.model = model
        if isinstance(adapter, nn.Module):
            self.adapter = adapter

    def forward(self, function: Callable[[nn.Module, Any], Any], argument: Any) -> Any:
        return function(self.model, argument)


class StepUndo:
    """What a step changes before its loss is known: random state and running statistics."""

    def __init__(self, module: nn.Module) -> None:
        self.rng = ckpt.capture_rng()
        owners = [m for m in module.modules() if m.training and getattr(m, "running_mean", None) is not None]
        self.buffers = [(b, b.detach().clone()) for m in owners for b in m.buffers(recurse=False)]

    def restore(self) -> None:
        """Put the running statistics back."""
        for buffer, kept in self.buffers:
            buffer.copy_(kept)


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


def parameter_groups(
    trainee: nn.Module, model: nn.Module, adapter: Any, weight_decay: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Optimiser groups by learning rate and decay, and the parameter names in their order; freezes what is not trained."""
    if adapter is not None:
        wanted = {id(p) for _, p in adapter.trainable_parameters()}
        unseen = wanted - {id(p) for p in trainee.parameters()}
        if unseen:
            raise InputError(f"{len(unseen)} of the adapter's parameters are neither in the adapter nor in the model.")
        for parameter in trainee.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
    named = [(k, p) for k, p in trainee.named_parameters() if p.requires_grad]
    if not named:
        raise InputError("There is nothing to train: no parameter has requires_grad. Unfreeze some, or pass adapter.")
    skip = {f"model.{k}" for k in getattr(model, "no_weight_decay", set)()}
    own = {id(p) for p in getattr(adapter, "own_parameters", list)()}
    groups: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    for k, p in named:
        scale, decays = (adapter.lr_scale, adapter.decays) if id(p) in own else (1.0, True)
        groups.setdefault((scale, not (decays and p.ndim > 1 and k not in skip)), []).append((k, p))
    order = sorted(groups)
    return (
        [
            # `lr_scale` is timm's: its schedulers multiply by it
            {
                "params": [p for _, p in groups[scale, plain]],
                "weight_decay": 0.0 if plain else weight_decay,
                "lr_scale": scale,
            }
            for scale, plain in order
        ],
        [k for key in order for k, _ in groups[key]],
    )


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of this step, before any group's own scale."""
    group = optimizer.param_groups[0]
    return group["lr"] / group.get("lr_scale", 1.0)


def make_optimizer(config: FitConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """torch's or timm's optimiser; raises `InputError` with the nearest names."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    from timm.optim import create_optimizer_v2, list_optimizers

    known = [str(name) for name in list_optimizers()]
    if config.optimizer not in known:
        raise InputError(f"Unknown optimizer {config.optimizer!r}. {nearest(config.optimizer, known)}")
    return create_optimizer_v2(groups, opt=config.optimizer, lr=config.lr, weight_decay=0.0)


def make_scheduler(config: FitConfig, optimizer: torch.optim.Optimizer, total: int, steps_per_epoch: int) -> Any:
    """timm's cosine schedule per step; "constant" is the same with min_lr = lr. A pure function of the step."""
    from timm.scheduler import CosineLRScheduler

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


@contextlib.contextmanager
def kept_rng() -> Iterator[None]:
    """Leave the caller's random states as they were."""
    state = ckpt.rng_state()
    try:
        yield
    finally:
        ckpt.set_rng_state(state)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def check_loss(loss: Any) -> None:
    """Raise `InputError` unless `loss` is one differentiable number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"loss_fn must return one number as a tensor, not {shape}.")
    if not loss.requires_grad:
        raise InputError(
            "The loss does not depend on any trained parameter: the adapter or head is not in the model's path."
        )


def has_non_finite(data: Any, key: Any) -> bool:
    """Whether example `data[key]` holds NaN or infinity, as far as it can be read at all."""

    def bad(value: Any) -> bool:
        if isinstance(value, Tensor):
            return value.is_floating_point() and not bool(torch.isfinite(value).all())
        if isinstance(value, dict):
            return any(map(bad, value.values()))
        if isinstance(value, (tuple, list)):
            return any(map(bad, value))
        return isinstance(value, float) and not math.isfinite(value)

    try:
        return bad(data[key])
    except (InputError, OSError) as error:
        warnings.warn(f"Example {key} could not be read again: {error}", stacklevel=2)
        return False
