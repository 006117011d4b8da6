"""Where the classifiers of a model are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_NAMES = ("head", "fc", "classifier", "heads")


def find_heads(model: nn.Module) -> tuple[str, ...]:
    """Module paths of all classifiers of `model`: what it says itself (`get_classifier()`), else what the usual names hold."""
    if hasattr(model, "get_classifier"):
        said = list(_leaves(model.get_classifier()))
        return tuple(name for name, module in model.named_modules() if any(module is head for head in said))
    return next(((name,) for name in _NAMES if any(_leaves(getattr(model, name, None)))), ())


def _leaves(found: Any) -> Iterator[nn.Module]:
    """The modules with parameters in what may be one module, several in a tuple, list or container, or a placeholder.

    Containers are opened because they are never called themselves.
    """
    if isinstance(found, (tuple, list, nn.ModuleList)):
        for item in found:
            yield from _leaves(item)
    elif isinstance(found, nn.Module) and any(True for _ in found.parameters()):
        yield found


def watch_head(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The last layer with own parameters whose output has the shape of the model's, watched in one forward; empty if none."""
    seen: list[tuple[str, Any]] = []
    handles = [
        module.register_forward_hook(lambda _m, _a, output, name=name: seen.append((name, output)))
        for name, module in model.named_modules()
        if name and next(module.parameters(recurse=False), None) is not None
    ]
    training = model.training
    try:
        with torch.no_grad():
            result = model.eval()(*args, **kwargs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    shape = result.shape if isinstance(result, Tensor) else None
    return next(((name,) for name, out in reversed(seen) if isinstance(out, Tensor) and out.shape == shape), ())
