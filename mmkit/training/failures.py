"""Errors of torch that say what happened but not what to do, as those of mmkit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mmkit.errors import InputError, MMKitError, TrainingError

_MODEL_ERRORS = (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def explaining(now: Callable[[], tuple[int, Any]], *, ours: bool) -> Iterator[None]:
    """Raise what `explained` makes of an error of the block, where `now()` gives the 1-based step and the batch.

    Errors of mmkit and those it cannot explain pass.
    """
    try:
        yield
    except MMKitError:
        raise
    except Exception as error:
        better = explained(error, *now(), ours=ours)
        if better is None:
            raise
        raise better from error


def explained(error: Exception, step: int, batch: Any, *, ours: bool) -> MMKitError | None:
    """What `fit` raises in place of `error` at the 1-based `step`, or None when it is the caller's own to read.

    Args:
        batch: what the model was given, if it was asked.
        ours: whether loss and metrics are mmkit's, so that only the model and the batch can be at odds.
    """
    text = str(error)
    if _is_out_of_memory(error):
        return TrainingError(
            f"Out of memory at step {step}: {text.splitlines()[0] if text else type(error).__name__}. Lower batch_size and "
            "raise grad_accum by the same factor (the result stays the same), use mixed_precision='bf16', smaller images, "
            "or an adapter.",
            step,
        )
    if text.startswith("DataLoader worker"):
        return TrainingError(
            f"A process that reads data died at step {step} ({text.splitlines()[0]}). Usually the system ran out of memory: "
            "lower num_workers or batch_size. num_workers=0 reads in this process and shows any other cause.",
            step,
        )
    if "more than 1 value per channel" in text:
        return InputError(
            f"BatchNorm cannot train on a micro-batch of one example (step {step}). Use drop_last=True, or a batch_size of "
            "two or more that does not leave one example over."
        )
    if ours and batch is not None and isinstance(error, _MODEL_ERRORS):
        return InputError(
            f"The model cannot be trained on a batch of {describe(batch)} (step {step}): {text.rstrip('.')}. Give float "
            "images of the shape and type the model was built for."
        )
    return None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def describe(value: Any) -> str:
    """Shapes and types of a batch, such as `[(8, 3, 32, 32) float32, (8,) int64]`."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        more = ", ..." if len(value) > 4 else ""
        return "[" + ", ".join(describe(v) for v in value[:4]) + more + "]"
    return type(value).__name__
