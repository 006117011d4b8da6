"""What one forward pass carries from module to module: gates, timestep, frames, patch grid, token layout.

The outermost module of an adapted model opens a `ForwardContext` and closes it when its call returns; adapters inside read it with
`current_context()`. Nothing is remembered on modules between calls, and calls in other threads see their own. A caller hands values
in with `forward_context(gates=..., num_frames=...)` around the call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.errors import InputError

_LOCAL = threading.local()
_last: list[ForwardContext | None] = [None]  # not of the thread: on a GPU the backward pass runs in another one

_TIMESTEP_NAMES = ("timestep", "timesteps", "t")


@dataclass
class ForwardContext:
    """One call of the outermost module.

    Attributes:
        gates: strength of each adapter by its name, a number or a tensor (B,) with one value per row of the batch; an adapter
            that is not named acts fully.
        timestep: what a diffusion model was given as such, or `None`.
        num_frames: frames per clip when rows are frames of videos, or `None`.
        rows: size of the batch B, or `None` when it cannot be seen from the arguments.
        grid: patch grid (rows, columns) of the picture that is passing through; set by whoever reads the patch embedding.
        extra_tokens: tokens that an adapter has put in front of the sequence, to be left out of anything that knows positions.
        store: anything else that adapters hand on during the call, by a key of their own; a caller may put things in for them.
    """

    gates: Mapping[str, float | Tensor] = field(default_factory=dict)
    timestep: Any = None
    num_frames: int | None = None
    rows: int | None = None
    grid: tuple[int, int] | None = None
    extra_tokens: int = 0
    store: dict[Any, Any] = field(default_factory=dict)
    call: Any = None  # the `Call` that opened it


def current_context() -> ForwardContext | None:
    """The context of the call that is running in this thread; `None` outside of one.

    Layers that gradient checkpointing computes once more run during the backward pass, when their call is over: they get the
    context of the last call that kept gradients.
    """
    context = getattr(_LOCAL, "context", None)
    if context is None and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return _last[0]
    return context


@contextlib.contextmanager
def forward_context(**values: Any) -> Iterator[ForwardContext]:
    """Give the calls inside the block their gates, timestep or num_frames (see `ForwardContext`).

    Example:
        >>> with forward_context(gates={"style": torch.tensor([0.0, 1.0])}) as context:
        ...     sorted(context.gates)
        ['style']

    Raises:
        InputError: an unknown name.
    """
    known = {f.name for f in dataclasses.fields(ForwardContext)} - {"call"}
    if unknown := set(values) - known:
        raise InputError(f"forward_context has no {sorted(unknown)}; it takes {sorted(known)}.")
    before = current_context()
    _LOCAL.context = dataclasses.replace(before or ForwardContext(), **{"store": {}, "call": None, **values})
    try:
        yield _LOCAL.context
    finally:
        _LOCAL.context = before


class Call:
    """Opens a context around a call of the outermost module and closes it again; plain, so that torch can compile it."""

    def __init__(self, root: nn.Module):
        signature = inspect.signature(type(root).forward)
        names = [n for n in signature.parameters if n != "self"]
        self.timestep_name = next((n for n in _TIMESTEP_NAMES if n in names), None)
        self.timestep_index = names.index(self.timestep_name) if self.timestep_name else -1

    def is_open(self) -> bool:
        """Whether this thread is inside a call of this module."""
        context = getattr(_LOCAL, "context", None)
        return context is not None and context.call is self

    def open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardContext | None:
        """Start a context; returns the one to go back to."""
        before = getattr(_LOCAL, "context", None)
        context = ForwardContext(call=self)
        if before is not None:
            context.gates, context.num_frames, context.timestep = before.gates, before.num_frames, before.timestep
            if before.call is None:  # a caller's `forward_context(store=...)`, not the call of a model around this one
                context.store = dict(before.store)
        if self.timestep_name is not None:
            if self.timestep_name in kwargs:
                context.timestep = kwargs[self.timestep_name]
            elif len(args) > self.timestep_index:
                context.timestep = args[self.timestep_index]
        context.rows = _rows(args, kwargs)
        _LOCAL.context = context
        if torch.is_grad_enabled():
            _last[0] = context
        return before

    def close(self, before: ForwardContext | None) -> None:
        """End the context that `open` started."""
        _LOCAL.context = before


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 1:
            return value.shape[0]
    return None


def gate_values(gate: float | Tensor, y: Tensor, rows: int | None, axis: int = 0) -> float | Tensor:
    """A gate in the shape that multiplies `y`.

    Args:
        gate: a number, or (B,) with one value per row of the batch.
        y: an output whose dimension `axis` counts rows; windows and frames may have multiplied them (B-major).
        rows: B of the call, checked against the gate when known.
        axis: where rows lie.

    Raises:
        InputError: the gate has another length than the batch, or `y` has rows that are no multiple of it.
    """
    if not isinstance(gate, Tensor) or gate.dim() == 0:
        return gate
    count = gate.shape[0]
    if gate.dim() != 1 or (rows is not None and count != rows):
        raise InputError(f"Gates must be a number or one value per row of the batch ({rows}), not {tuple(gate.shape)}.")
    if y.shape[axis] % count:
        raise InputError(
            f"Gates for {count} rows do not fit a layer whose output is {tuple(y.shape)}: its rows are no multiple of the "
            "batch. Use a single gate for this adapter."
        )
    gate = gate.to(y.device, y.dtype).repeat_interleave(y.shape[axis] // count)
    shape = [1] * y.dim()
    shape[axis] = -1
    return gate.view(shape)
