"""Pipelines: what a person has goes in, a small result that can be saved and looked at comes out."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from torch import nn

from mmkit.devices import resolve_device, resolve_dtype
from mmkit.errors import InputError
from mmkit.registry import TASKS


def list_tasks(pattern: str = "") -> list[str]:
    """Names of the tasks `pipeline` knows; `pattern` is a substring or wildcard."""
    return TASKS.names(pattern)


def pipeline(
    task: str,
    model: nn.Module | str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    **options: Any,
) -> Any:
    """Build the pipeline of `task`.

    Args:
        task: a name of `list_tasks()`.
        model: a module, a folder or bundled name; `None` takes the small bundled default.
        device: "auto" (CUDA when present, else CPU) or a torch device.
        dtype: "auto" (float32) or a torch dtype or its name.
        options: the pipeline's own options.

    Raises:
        InputError: unknown task, device or dtype.

    Example:
        >>> import mmkit
        >>> mmkit.pipeline("image-classification").task
        'image-classification'
    """
    return TASKS.get(task)(model, device=device, dtype=dtype, **options)


class Pipeline:
    """Base of all pipelines: resolves model, device and dtype once.

    Subclasses set `task` and `default_weights`, override `load(model)` when a string can mean more than bundled weights or a
    folder, and implement `__call__`.
    """

    task: ClassVar[str]
    default_weights: ClassVar[str]

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
    ):
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype)
        module = model if isinstance(model, nn.Module) else self.load(self.default_weights if model is None else model)
        self.model = module.to(self.device, self.dtype).eval()

    def load(self, model: str | os.PathLike[str]) -> nn.Module:
        """The module behind a bundled name or a folder."""
        raise InputError(f"{type(self).__name__} needs a module; {model!r} cannot be loaded.")
