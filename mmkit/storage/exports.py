"""Models for other programs: ONNX files and exported programs, each compared with the model before it is called done."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.errors import BackendUnavailableError, InputError
from mmkit.storage.files import atomic_write

TOLERANCE = 1e-4
"""Largest difference to the model, relative to its largest answer (at least 1)."""


def write_onnx(
    model: nn.Module,
    example: Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    inputs: Sequence[str] = ("input",),
    outputs: Sequence[str] = ("output",),
    dynamic_batch: bool = True,
) -> Path:
    """Write `model` as an ONNX file that onnxruntime answers with as the model does; tried on other numbers and another batch.

    Args:
        model: whose forward takes tensors and returns a tensor or a tuple of them; it is exported in eval mode.
        example: inputs, each with the batch first.
        inputs, outputs: their names in the file.
        dynamic_batch: let the file take any batch.

    Raises:
        BackendUnavailableError: onnx, onnxscript or onnxruntime are missing.
        InputError: the model cannot be exported, or the file answers differently; nothing is written.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError(
            "ONNX export needs three packages: pip install onnx onnxscript onnxruntime"
        ) from error
    path = Path(path).expanduser()
    with atomic_write(path) as draft:
        program = exported(model, example, dynamic_batch=dynamic_batch)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    program, (), str(draft), input_names=list(inputs), output_names=list(outputs), external_data=False,
                    dynamo=True, verbose=False,
                )  # fmt: skip
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(str(draft), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of every operator in its own words
            raise InputError(f"{type(model).__name__} has operations ONNX cannot say: {_short(error)}") from error

        def answer(given: list[Tensor]) -> list[Tensor]:
            fed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), given, strict=True)}
            return [torch.from_numpy(o) for o in session.run(None, fed)]

        _compare(model, example, answer, dynamic_batch)
    return path


def write_program(
    model: nn.Module, example: Sequence[Tensor], path: str | os.PathLike[str], *, dynamic_batch: bool = True
) -> Path:
    """Write `model` as a `torch.export` program (`.pt2`), for `torch.export.load(path).module()`; see `write_onnx`."""
    path = Path(path).expanduser()
    if path.suffix != ".pt2":
        raise InputError(f"Exported programs are called .pt2, not {path.name!r}.")
    with atomic_write(path) as draft:
        with draft.open("wb") as file:
            torch.export.save(exported(model, example, dynamic_batch=dynamic_batch), file)
        with draft.open("rb") as file:
            program: Any = torch.export.load(file).module()
        _compare(model, example, lambda given: _flat(program(*given)), dynamic_batch)
    return path


def exported(
    model: nn.Module, example: Sequence[Tensor], *, dynamic_batch: bool = True
) -> torch.export.ExportedProgram:
    """`torch.export` of `model` in eval mode. Raises `InputError` where its code depends on values."""
    given = tuple(_sample(t, 2, 0) for t in example) if dynamic_batch else tuple(example)
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in given) if dynamic_batch else None
    try:
        with _still(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
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


def _compare(model: nn.Module, example: Sequence[Tensor], answer: Any, dynamic_batch: bool) -> None:
    """Raise `InputError` unless `answer` says what the model does, for the example's batch and for three."""
    with _still(model), torch.no_grad():
        for batch in {len(example[0]), 3 if dynamic_batch else len(example[0])}:
            given = [_sample(t, batch, seed) for seed, t in enumerate(example)]
            wanted = _flat(model(*given))
            try:
                found = answer(given)
            except Exception as error:
                raise InputError(f"The export fails on a batch of {batch}: {_short(error)}") from error
            for mine, theirs in zip(wanted, found, strict=True):
                away = float((mine - theirs).abs().max()) / max(float(mine.abs().max()), 1.0)
                if not away <= TOLERANCE:
                    raise InputError(
                        f"The export differs from the model by {away:.1e} on a batch of {batch}; it is not kept."
                    )


def _sample(example: Tensor, batch: int, seed: int) -> Tensor:
    """Other numbers of the same kind; whole numbers are those of the example, repeated."""
    if example.is_floating_point():
        made = torch.randn(batch, *example.shape[1:], generator=torch.Generator().manual_seed(seed))
        return made.to(example.dtype)
    return example[:1].expand(batch, *example.shape[1:]).contiguous()


def _flat(answer: Any) -> list[Tensor]:
    return [answer] if isinstance(answer, Tensor) else list(answer)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:240]
