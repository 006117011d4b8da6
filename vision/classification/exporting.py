"""Fine-tuned models for others to run: ONNX, `torch.export`, a folder of timm's, an adapter of peft's; each compared before it is there."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.adapters import attached_adapters, save_adapter
from mmkit.adapters.peft import PeftAdapter
from mmkit.backbones import image_info, save_backbone
from mmkit.errors import InputError, NotMergeableError, nearest
from mmkit.storage import new_folder
from mmkit.storage.exports import Answers, answers_of, compare, write_onnx, write_program
from mmkit.storage.files import absolute
from mmkit.vision.classification.saving import load_finetuned


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
        raise InputError(f"Unknown format {format!r}. {nearest(format, FORMATS)}")
    model = load_finetuned(run, backbone=backbone, **options).float()
    return FORMATS[format](model, absolute(output))


# ------------------------------------------------------------------------------------------------------------- comparing


def _answers(model: nn.Module, info: Any) -> Answers:
    """Random pictures, one and several at a time, with what the model says."""
    return answers_of(model, [torch.zeros(1, *info.input_size)])


def _exported(path: Path, difference: float, answers: Answers) -> Exported:
    return Exported(path, difference, sum(len(pictures) for (pictures,), _ in answers))


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


def _metadata(info: Any) -> dict[str, str]:
    """What a reader needs to prepare a picture and to name the answer."""
    facts = {**info.preprocessing(), "class_names": list(info.class_names)}
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}


def _file(write: Callable[..., float], **names: Any) -> Callable[[nn.Module, Path], Exported]:
    """A format that is one file."""

    def written(model: nn.Module, path: Path) -> Exported:
        info = image_info(model)
        answers, example = _answers(model, info), torch.zeros(2, *info.input_size)
        difference = write(_plain(model), [example], path, metadata=_metadata(info), answers=answers, **names)
        return _exported(path, difference, answers)

    return written


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
        difference = compare(expected, again, "What timm loads")
    return _exported(path, difference, expected)


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
            difference = compare(expected, _read_by_peft(base, draft), "What peft loads")
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"peft cannot load this adapter: {str(error).splitlines()[0]}") from error
    return _exported(path, difference, expected)


def _read_by_peft(base: nn.Module, folder: Path) -> Callable[[Tensor], Any]:
    """The backbone alone with what peft's own loader makes of the folder; what it does not find is an error."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Mm]issing.*")
        loaded: Any = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    return lambda x: loaded.base_model.model(x)  # peft's own forward adds keywords for language models


FORMATS: dict[str, Callable[[nn.Module, Path], Exported]] = {
    "onnx": _file(write_onnx, inputs=["images"], outputs=["logits"]),
    "torch-export": _file(write_program),
    "timm": _timm,
    "peft": _peft,
}
"""Format -> its writer."""
