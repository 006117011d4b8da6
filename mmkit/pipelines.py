"""Pipelines: what a person has goes in, a small result that can be saved and looked at comes out."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmkit.devices import resolve_device, resolve_dtype
from mmkit.errors import InputError
from mmkit.registry import TASKS
from mmkit.storage.files import expanded


def finite(answer: Tensor, what: str = "answer") -> Tensor:
    """A model's `answer` in float32. Raises `InputError` for NaN and infinite values, of which softmax would make scores."""
    answer = answer.float()
    if not answer.isfinite().all():
        raise InputError(
            f"The model's {what} holds NaN or infinite values: its weights are damaged, or float32 is needed."
        )
    return answer


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
        device: a torch device, or "auto": where a module of yours is; else CUDA when present, else the CPU.
        dtype: a torch dtype or its name, or "auto": that of the module or of the folder's file; bundled weights are float32.
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

    A caller's module is never changed: it is used as it is when it is in eval mode and on the wanted device and dtype, and
    copied otherwise.

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
        resolve_device(device), resolve_dtype(dtype)  # errors before anything is loaded
        if isinstance(model, nn.Module):
            tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
            self.device = tensor.device if device == "auto" else resolve_device(device)
            self.dtype = resolve_dtype(dtype, tensor.dtype)
            fits = (self.device, self.dtype) == (tensor.device, tensor.dtype)
            still = fits and not any(m.training for m in model.modules())
            self.model = model if still else copy.deepcopy(model).to(self.device, self.dtype).eval()
        else:
            if not isinstance(model, str | os.PathLike | None):
                raise InputError(
                    f"model is a module, a folder or a bundled name, not {type(model).__name__} ({model!r})."
                )
            self.device = resolve_device(device)
            module = self.load(self.default_weights if model is None else model)
            tensor = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
            self.dtype = resolve_dtype(dtype, tensor.dtype)
            self.model = module.to(self.device, self.dtype).eval()

    def load(self, model: str | os.PathLike[str]) -> nn.Module:
        """The module behind a bundled name or a folder."""
        raise InputError(f"{type(self).__name__} needs a module; {model!r} cannot be loaded.")

    def example(self) -> tuple[torch.Tensor, ...]:
        """Inputs such as this pipeline gives its model, one in the batch. Raises `InputError` for pipelines without a fixed one."""
        raise InputError(
            f"The model of {self.task!r} is not exported by itself: what it reads depends on what was given."
        )

    def metadata(self) -> dict[str, str]:
        """What a reader of an exported file needs to prepare inputs and to name answers; it is kept in the file."""
        return {}

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write the model for other programs, compared with it before it is called done: `.onnx`, or `.pt2` for `torch.export.load`.

        Preparing inputs and reading outputs stays with the caller. Raises `InputError` for another suffix, and for models that use
        kernels or decisions that such a file cannot hold; `BackendUnavailableError` without the packages for ONNX.
        """
        self.write_export(path)
        return expanded(path)

    def write_export(self, path: str | os.PathLike[str]) -> float:
        """`export`; returns the largest difference between the answers of the file and of the model, on random inputs."""
        from mmkit.storage.exports import write_onnx, write_program

        writers = {".onnx": write_onnx, ".pt2": write_program}
        if (writer := writers.get(Path(path).suffix)) is None:
            raise InputError(f"Models are exported to .onnx or .pt2, not {Path(path).name!r}.")
        example = tuple(t.to(self.device, self.dtype) for t in self.example())
        return writer(self.model, example, path, metadata=self.metadata())
