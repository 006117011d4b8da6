"""Choosing how an operator runs: one rule for every operator, and one visible line that says what was chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from mmkit.errors import BackendUnavailableError, InputError

logger = logging.getLogger("mmkit.ops")
_announced: set[tuple[str, str, str]] = set()


def choose_backend(
    op: str,
    requested: str,
    device: torch.device,
    preference: Mapping[str, tuple[str, ...]],
    problems: Mapping[str, Callable[[torch.device], str | None]],
) -> str:
    """The backend `op` will use for tensors on `device`.

    Args:
        op: the operator's name, for messages.
        requested: `"auto"` or a backend's name.
        device: where the tensors are.
        preference: device type -> backends in the order `"auto"` tries them.
        problems: backend -> a function that returns why it cannot serve `device` (with the pip command), or `None`.

    Raises:
        InputError: an unknown backend name.
        BackendUnavailableError: the requested backend cannot run here.
    """
    if requested != "auto":
        if requested not in problems:
            raise InputError(f"{op}: unknown backend {requested!r}; choose 'auto' or one of {sorted(problems)}.")
        problem = problems[requested](device)
        if problem:
            raise BackendUnavailableError(f"{op}: backend {requested!r} cannot run here: {problem}")
        return requested
    reasons: list[str] = []
    for name in preference.get(device.type, preference["cpu"]):
        problem = problems[name](device)
        if problem is None:
            _announce(op, name, device, reasons)
            return name
        reasons.append(f"{name}: {problem}")
    raise BackendUnavailableError(f"{op}: no backend can run on {device}. " + " ".join(reasons))


def _announce(op: str, backend: str, device: torch.device, reasons: list[str]) -> None:
    """Once per operator, device and backend: a warning when something faster is missing, else an info line."""
    key = (op, backend, device.type)
    if key in _announced:
        return
    _announced.add(key)
    if reasons:
        logger.warning("%s runs on %s with backend %r (slower; %s)", op, device.type, backend, "; ".join(reasons))
    else:
        logger.info("%s runs on %s with backend %r", op, device.type, backend)
