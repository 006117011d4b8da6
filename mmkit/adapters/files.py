"""Adapter folders: `adapter_config.json` + `adapter_model.safetensors`, never pickle.

The JSON holds the method, its settings, the modules with their tensor shapes and a digest of them. A method with files of its own
(peft's) overrides the two halves of `AdapterFiles`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit import __version__
from mmkit.errors import CheckpointError, InputError
from mmkit.storage import read_json, read_tensors, require_folder, write_json, write_safetensors

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"


class AdapterFiles:
    """How an adapter becomes files and comes back; a base of `Adapter`."""

    def write_files(self: Any, folder: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into `folder`."""
        write_safetensors(folder / TENSORS_NAME, self.state_dict())
        config = {
            "method": self.method,
            "format_version": FORMAT_VERSION,
            "mmkit_version": __version__,
            "base_model": base_name(self.model),
            "config": self.config.to_dict(),
            "sites": {k: list(v.shape) for k, v in self.state_dict().items()},
            "digest": self.digest(),
        }
        write_json(folder / CONFIG_NAME, config)

    @classmethod
    def from_files(
        cls: Any,
        model: nn.Module,
        folder: Path,
        saved: dict[str, Any],
        tensors: dict[str, Tensor],
        name: str,
        strict: bool,
    ) -> Any:
        """Rebuild the adapter that `write_files` wrote on `model`.

        Args:
            saved: the parsed `adapter_config.json`.
            tensors: those of `adapter_model.safetensors`, all finite.
            strict: `False` loads what fits and logs what stays as it was initialised.

        Raises `CheckpointError`; the model is then unchanged.
        """
        try:
            config = cls.config_class.from_dict(saved["config"])
            adapter = cls(config, name=name).attach(model)
        except (InputError, TypeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"The adapter in {folder} (made for {saved.get('base_model')!r}) does not fit this model: {error}"
            ) from error
        return adapter.fill(tensors, f"The adapter in {folder} (made for {saved.get('base_model')!r})", strict)

    def fill(self: Any, tensors: dict[str, Tensor], source: str, strict: bool) -> Any:
        """Put `tensors` into this freshly attached adapter; takes it off again when they do not fit."""
        own = self.state_dict()
        missing = sorted(k for k in own if k not in tensors)
        unexpected = sorted(k for k in tensors if k not in own)
        shapes = sorted(
            f"{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}"
            for k, v in tensors.items()
            if k in own and own[k].shape != v.shape
        )
        problem = (
            f"{len(missing)} sites missing {missing[:4]}, {len(unexpected)} unexpected {unexpected[:4]}, "
            f"{len(shapes)} of another shape {shapes[:4]}"
        )
        fitting = {k: v for k, v in tensors.items() if k in own and own[k].shape == v.shape}
        if not fitting or (strict and (missing or unexpected or shapes)):
            self.detach()
            raise CheckpointError(f"{source} does not fit this model: {problem}.")
        if missing or unexpected or shapes:
            logger.warning("%s fits in part: %s. What is missing stays as initialised.", source, problem)
        self.load_state_dict(fitting, strict=False)
        return self


def base_name(model: nn.Module) -> str:
    """What an adapter file calls the model it was made for."""
    info = getattr(model, "backbone_info", None)
    return info.name if info else type(model).__name__


def read_adapter_config(folder: Any) -> dict[str, Any]:
    """The parsed `adapter_config.json` of a folder written by mmkit or peft. Raises `CheckpointError`."""
    path = require_folder(folder) / CONFIG_NAME
    saved = read_json(path)
    if not isinstance(saved, dict) or not any(isinstance(saved.get(k), str) for k in ("method", "peft_type")):
        raise CheckpointError(f"{path} is not an adapter configuration: neither 'method' nor 'peft_type' names one.")
    version = saved.get("format_version", 0)
    if "method" in saved and (not isinstance(version, int) or version > FORMAT_VERSION):
        raise CheckpointError(f"{path} has format version {version}; this mmkit reads {FORMAT_VERSION}. Upgrade mmkit.")
    return saved


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, all finite. Raises `CheckpointError`."""
    tensors = read_tensors(folder / TENSORS_NAME, allow_pickle_format=False)
    bad = [k for k, v in tensors.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise CheckpointError(f"{folder / TENSORS_NAME} holds NaN or infinite values in {bad[:4]}.")
    return tensors


def halve_tensors(folder: Path) -> None:
    """Round the tensors of an adapter folder to float16. Raises `InputError` when one would overflow."""
    tensors = read_adapter_tensors(folder)
    halves = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    if bad := [k for k, v in halves.items() if not torch.isfinite(v).all()]:
        raise InputError(f"half=True: values in {bad[:4]} are beyond 65504, the largest number of float16.")
    write_safetensors(folder / TENSORS_NAME, halves)
