"""Models for other programs: ONNX files and exported programs, each compared with the model before it is called done."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.errors import BackendUnavailableError, InputError
from mmkit.storage.files import atomic_write, check_writable, expanded

TOLERANCE = 1e-4
"""Largest difference to the model, relative to its largest answer (at least 1)."""

Answers = list[tuple[list[Tensor], list[Tensor]]]
"""Inputs, and what a model answers to them."""


def write_onnx(
    model: nn.Module,
    example: Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    inputs: Sequence[str] = ("input",),
    outputs: Sequence[str] = ("output",),
    metadata: Mapping[str, str] | None = None,
    answers: Answers | None = None,
    dynamic_batch: bool = True,
    dynamic_axes: Sequence[Sequence[int]] | None = None,
) -> float:
    """Write `model` as an ONNX file that onnxruntime answers with as the model does; tried on other numbers and another batch.

    Args:
        model: whose forward takes tensors and returns a tensor or a tuple of them; it is exported in eval mode.
        example: inputs, each with the batch first.
        inputs, outputs: their names in the file.
        metadata: kept in the file.
        answers: to compare with instead of the model's own (`answers_of`), such as those before an adapter was folded.
        dynamic_batch: let the file take any batch.
        dynamic_axes: of each input the axes that may have other lengths, where it is not the batch alone; goes with `answers`.

    Returns:
        The largest difference.

    Raises:
        BackendUnavailableError: onnx, onnxscript or onnxruntime are missing.
        InputError: the model cannot be exported, or the file answers differently; nothing is written.
    """
    path = _named(path, ".onnx")
    names = ("onnx", "onnxscript", "onnxruntime")
    if missing := [n for n in names if sys.modules.get(n, n) is None or importlib.util.find_spec(n) is None]:
        raise BackendUnavailableError(f"ONNX export needs {', '.join(missing)}: pip install {' '.join(missing)}")
    import onnx
    import onnxruntime

    answers = answers or answers_of(model, example, dynamic_batch=dynamic_batch)
    program = exported(model, example, dynamic_batch=dynamic_batch, dynamic_axes=dynamic_axes)
    with atomic_write(path) as draft:
        try:
            with _quiet():
                torch.onnx.export(
                    program, (), str(draft), input_names=list(inputs), output_names=list(outputs), external_data=False,
                    dynamo=True, verbose=False,
                )  # fmt: skip
            written = onnx.load(str(draft))
            for key, value in (metadata or {}).items():
                written.metadata_props.add(key=key, value=value)
            onnx.save(written, str(draft))
            session = onnxruntime.InferenceSession(str(draft), providers=["CPUExecutionProvider"])
        except Exception as error:  # of every operator in its own words
            raise InputError(f"{type(model).__name__} has operations ONNX cannot say: {_short(error)}") from error
        fed = [i.name for i in session.get_inputs()]
        return compare(
            answers,
            lambda *given: session.run(None, {n: t.numpy() for n, t in zip(fed, given, strict=True)}),
            "The ONNX file",
        )


def write_program(
    model: nn.Module,
    example: Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    answers: Answers | None = None,
    dynamic_batch: bool = True,
) -> float:
    """Write `model` as a `torch.export` program (`.pt2`), for `torch.export.load(path).module()`; see `write_onnx`."""
    path = _named(path, ".pt2")
    answers = answers or answers_of(model, example, dynamic_batch=dynamic_batch)
    program = exported(model, example, dynamic_batch=dynamic_batch)
    with atomic_write(path) as draft, _quiet():
        with draft.open("wb") as file:
            torch.export.save(program, file, extra_files=dict(metadata or {}))
        with draft.open("rb") as file:
            again: Any = torch.export.load(file).module()
        return compare(answers, again, "The exported program")


def _named(path: str | os.PathLike[str], suffix: str) -> Path:
    """The path, if it ends so: another file, such as the weights it is made from, is not written over."""
    path = expanded(path)
    if path.suffix != suffix:
        raise InputError(f"{path.name!r} must end in {suffix}: {path.stem or 'model'}{suffix}.")
    return check_writable(path)


def exported(
    model: nn.Module,
    example: Sequence[Tensor],
    *,
    dynamic_batch: bool = True,
    dynamic_axes: Sequence[Sequence[int]] | None = None,
) -> torch.export.ExportedProgram:
    """`torch.export` of `model` in eval mode. Raises `InputError` where its code depends on values."""
    given = tuple(_sample(t, 2, 0) for t in example) if dynamic_batch else tuple(example)
    axes = dynamic_axes or [(0,) if dynamic_batch else ()] * len(given)
    shapes = tuple(dict.fromkeys(found, torch.export.Dim.DYNAMIC) for found in axes)
    try:
        with _still(model), torch.no_grad(), _quiet():
            return torch.export.export(model, given, dynamic_shapes=shapes)
    except Exception as error:
        raise InputError(f"{type(model).__name__} cannot be exported: {_short(error)}") from error


@contextlib.contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Inside the block all of `model` is in eval mode; afterwards every module as it was."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def answers_of(model: nn.Module, example: Sequence[Tensor], *, dynamic_batch: bool = True) -> Answers:
    """What `model` answers to inputs like the example, of the same batch and of three."""
    found: Answers = []
    with _still(model), torch.no_grad():
        for batch in sorted({len(example[0]), 3 if dynamic_batch else len(example[0])}):
            given = [_sample(t, batch, seed) for seed, t in enumerate(example)]
            found.append((given, _flat(model(*given))))
    return found


def compare(answers: Answers, other: Callable[..., Any], what: str) -> float:
    """The largest difference between `answers` and those of `other`, which `what` names. Raises `InputError` when it is no rounding."""
    largest = 0.0
    for given, wanted in answers:
        try:
            with torch.no_grad():
                found = [torch.as_tensor(f) for f in _flat(other(*given))]
        except Exception as error:  # a file that was made for one batch says so in many ways
            raise InputError(
                f"{what} fails on a batch of {len(given[0])}: {_short(error)}; nothing was written."
            ) from error
        if [f.shape for f in found] != [w.shape for w in wanted]:
            raise InputError(
                f"{what} answers {[tuple(f.shape) for f in found]} where the model answers {[tuple(w.shape) for w in wanted]}; "
                "nothing was written."
            )
        for theirs, mine in zip(found, wanted, strict=True):
            away = float((mine - theirs).abs().max())
            if not away <= TOLERANCE * max(1.0, float(mine.abs().max())):
                raise InputError(
                    f"{what} differs from the model by {away:.1e}, which is no rounding; nothing was written."
                )
            largest = max(largest, away)
    return largest


def _sample(example: Tensor, batch: int, seed: int) -> Tensor:
    """Other numbers of the same kind; whole numbers are those of the example, repeated."""
    if example.is_floating_point():
        made = torch.randn(batch, *example.shape[1:], generator=torch.Generator().manual_seed(seed))
        return made.to(example.dtype)
    return example[:1].expand(batch, *example.shape[1:]).contiguous()


def _flat(answer: Any) -> list[Tensor]:
    return [answer] if isinstance(answer, Tensor) else list(answer)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:240]
