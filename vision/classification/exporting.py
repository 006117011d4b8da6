"""Fine-tuned models for others to run: ONNX, `torch.export`, a folder of timm's, an adapter of peft's; each compared before it is there."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmkit.adapters import attached_adapters, save_adapter
from mmkit.adapters.peft import PeftAdapter
from mmkit.backbones import image_info, save_backbone
from mmkit.errors import BackendUnavailableError, InputError, MMKitError, NotMergeableError, nearest
from mmkit.storage import atomic_write, new_folder
from mmkit.storage.files import absolute
from mmkit.vision.classification.saving import load_finetuned

TOLERANCE = 1e-4
"""Largest difference of a logit, in parts of the largest logit (at least of 1)."""
_SIZES = (1, 3)


@dataclass(frozen=True)
class Exported:
    """What was written: `path`, and how far its logits are from the original's at most, over `pictures` random pictures."""

    path: Path
    difference: float
    pictures: int


def export(
    run: str | os.PathLike[str],
    format: str,
    output: str | os.PathLike[str],
    *,
    backbone: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Exported:
    """Write a fine-tuned model in another format, after what others read from it has answered as the original does.

    Args:
        run: a folder written by `finetune`, `mmkit merge` or `save_backbone`.
        format: "onnx" or "torch-export": a file that takes any number of pictures (B, C, H, W), normalised as its metadata say;
            "timm": a folder for `timm.create_model("local-dir:...", pretrained=True)`; "peft": one for
            `peft.PeftModel.from_pretrained`.
        output: the file or folder. An adapter is folded into the weights first, but for "peft".
        backbone, options: as in `load_finetuned`.

    Raises:
        InputError: another format, or one that this model does not go into.
        NotMergeableError: an adapter that cannot be folded.
        BackendUnavailableError: a package is missing.
        MMKitError: what was written answers otherwise; nothing is left then.
    """
    if format not in FORMATS:
        raise InputError(f"Unknown format {format!r}. {nearest(format, FORMATS)} Known: {', '.join(FORMATS)}.")
    model = load_finetuned(run, backbone=backbone, **options).float()
    return FORMATS[format](model, absolute(output))


# ------------------------------------------------------------------------------------------------------------- comparing


@torch.no_grad()
def _answers(model: Any, info: Any) -> list[tuple[Tensor, Tensor]]:
    """Random pictures, one and several at a time, with what the model says."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, *info.input_size, generator=generator) for n in _SIZES]
    return [(x, model(x)) for x in batches]


def _compare(expected: list[tuple[Tensor, Tensor]], other: Callable[[Tensor], Any], what: str) -> float:
    """The largest difference; raises `MMKitError` when it is no rounding."""
    largest = 0.0
    for images, logits in expected:
        with torch.no_grad():
            found = torch.as_tensor(other(images))
        if found.shape != logits.shape:
            raise MMKitError(
                f"{what} answers {tuple(found.shape)} where the model answers {tuple(logits.shape)}; nothing was written."
            )
        difference = float((found - logits).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(logits.abs().max())):
            raise MMKitError(
                f"{what} differs from the model by {difference:.1e} in a logit, which is no rounding; nothing was written."
            )
        largest = max(largest, difference)
    return largest


def _plain(model: nn.Module) -> nn.Module:
    """The model with its adapters folded into the weights."""
    for name, adapter in attached_adapters(model).items():
        if not adapter.mergeable:
            raise NotMergeableError(
                f"The adapter {name!r} ({adapter.method}) cannot be folded into the weights, and other libraries do not know it. "
                "Train a method that folds (ssf, lora, bitfit ...), or export a lora as an adapter (--format peft)."
            )
        adapter.merge()
    return model.eval()


# --------------------------------------------------------------------------------------------------------------- formats


def _program(model: nn.Module, info: Any) -> torch.export.ExportedProgram:
    example = torch.zeros(2, *info.input_size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},)
            )
    except Exception as error:  # whatever a foreign model does that cannot be traced
        raise InputError(
            f"torch.export cannot trace {type(model).__name__} for any number of pictures: {str(error).splitlines()[0]}"
        ) from error


def _metadata(info: Any) -> dict[str, str]:
    """What a reader needs to prepare a picture and to name the answer."""
    facts = {**info.preprocessing(), "class_names": list(info.class_names)}
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}


def _onnx(model: nn.Module, path: Path) -> Exported:
    missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(n) is None]
    if missing:
        raise BackendUnavailableError(f"ONNX export needs {', '.join(missing)}: pip install {' '.join(missing)}")
    import onnx
    import onnxruntime

    info = image_info(model)
    expected = _answers(model, info)
    program = _program(_plain(model), info)
    with atomic_write(path) as temporary, _quiet():
        torch.onnx.export(
            program, (), str(temporary), input_names=["images"], output_names=["logits"], external_data=False, dynamo=True, verbose=False,
        )  # fmt: skip
        written = onnx.load(str(temporary))
        for key, value in _metadata(info).items():
            written.metadata_props.add(key=key, value=value)
        onnx.save(written, str(temporary))
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        difference = _compare(
            expected, lambda x: np.asarray(session.run(None, {"images": x.numpy()})[0]), "The ONNX file"
        )
    return Exported(path, difference, sum(_SIZES))


def _torch_export(model: nn.Module, path: Path) -> Exported:
    if path.suffix != ".pt2":
        raise InputError(f"torch.export writes files that end in .pt2; give --output {path.with_suffix('.pt2').name}.")
    info = image_info(model)
    expected = _answers(model, info)
    program = _program(_plain(model), info)
    with atomic_write(path) as temporary, _quiet():
        with open(temporary, "wb") as file:
            torch.export.save(program, file, extra_files=_metadata(info))
        with open(temporary, "rb") as file:
            again = torch.export.load(file).module()
        difference = _compare(expected, again, "The exported program")
    return Exported(path, difference, sum(_SIZES))


def _timm(model: nn.Module, path: Path) -> Exported:
    import timm

    info = image_info(model)
    if not type(model).__module__.startswith("timm."):
        raise InputError(
            f"{info.name} is no model of timm's ({type(model).__name__}); export it as onnx or torch-export."
        )
    expected = _answers(model, info)
    plain = _plain(model)
    with new_folder(path, "backbone") as draft:
        save_backbone(plain, draft, class_names=info.class_names)
        try:
            again = timm.create_model(f"local-dir:{draft}", pretrained=True).eval()
        except Exception as error:  # an architecture that its config does not describe
            raise InputError(f"timm cannot build this model from a folder: {str(error).splitlines()[0]}") from error
        difference = _compare(expected, again, "What timm loads")
    return Exported(path, difference, sum(_SIZES))


def _peft(model: nn.Module, path: Path) -> Exported:
    adapters = attached_adapters(model)
    own = next(iter(adapters.values()), None)
    if len(adapters) != 1 or not isinstance(own, PeftAdapter):
        told = own.method if own is not None else "a whole model"
        raise InputError(
            f"peft knows lora and its relatives; this run holds {told}. Export it as timm, onnx or torch-export."
        )
    expected = _answers(model, image_info(model))
    with new_folder(path, "adapter") as draft:
        save_adapter(own, draft)
        base = own.detach()
        try:
            difference = _compare(expected, _read_by_peft(base, draft), "What peft loads")
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"peft cannot load this adapter: {str(error).splitlines()[0]}") from error
    return Exported(path, difference, sum(_SIZES))


def _read_by_peft(base: nn.Module, folder: Path) -> Callable[[Tensor], Any]:
    """The backbone alone with what peft's own loader makes of the folder; what it does not find is an error."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Mm]issing.*")
        loaded = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    return lambda x: loaded.base_model.model(x)  # peft's own forward adds keywords for language models


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


FORMATS: dict[str, Callable[[nn.Module, Path], Exported]] = {
    "onnx": _onnx,
    "torch-export": _torch_export,
    "timm": _timm,
    "peft": _peft,
}
"""Format -> its writer."""
