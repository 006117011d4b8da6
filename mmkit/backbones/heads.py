"""Where the classifiers of a model are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_NAMES = ("head", "fc", "classifier", "heads")


def find_heads(model: nn.Module) -> tuple[str, ...]:
    """Module paths of all classifiers of `model`: what it says itself, else what the usual names hold."""
    if hasattr(model, "get_classifier"):
        said = list(_said(model))
        return tuple(name for name, module in model.named_modules() if any(module is head for head in said))
    return next((path for name in _NAMES if (path := _with_parameters(model, name))), ())


def _with_parameters(model: nn.Module, name: str) -> tuple[str, ...]:
    module = getattr(model, name, None)
    return (name,) if isinstance(module, nn.Module) and any(True for _ in module.parameters()) else ()


def _said(model: nn.Module) -> Iterator[nn.Module]:
    """What `get_classifier()` returns: one module, several in a tuple, list or container, or an empty placeholder."""
    pending: list[Any] = [model.get_classifier()]
    while pending:
        module = pending.pop(0)
        if isinstance(module, (tuple, list, nn.ModuleList)):
            pending = [*module, *pending]
        elif isinstance(module, nn.Module) and any(True for _ in module.parameters()):
            yield module
