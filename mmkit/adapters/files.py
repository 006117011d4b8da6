"""Adapter folders: `adapter_config.json` + `adapter_model.safetensors`, nothing else, never pickle.

The JSON holds the method, its settings, the sites with their tensor shapes, a digest of them, and the sha256 of the tensor file.
Folders written by peft itself are recognised by their `peft_type` and loaded through peft.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmkit import __version__
from mmkit.adapters.core import Adapter, AdapterStack
from mmkit.errors import CheckpointError, InputError
from mmkit.registry import ADAPTERS
from mmkit.storage import read_json, read_tensors, require_folder, sha256_file, write_json, write_safetensors

FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"


def save_adapter(adapter: Adapter, folder: str | os.PathLike[str], *, extra: dict[str, Any] | None = None) -> Path:
    """Write `adapter` (with its saved modules) to `folder`; each file appears complete or not at all.

    Args:
        adapter: attached or merged.
        folder: created when missing; an adapter already there is replaced.
        extra: JSON-friendly facts to keep beside it, for example class names.

    Returns:
        The folder.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder to save the adapter in.")
    if hasattr(adapter, "save_peft"):
        return adapter.save_peft(folder, extra or {})
    model = adapter.model
    write_safetensors(folder / TENSORS_NAME, adapter.state_dict())
    info = getattr(model, "backbone_info", None)
    write_json(
        folder / CONFIG_NAME,
        {
            "method": adapter.method,
            "format_version": FORMAT_VERSION,
            "mmkit_version": __version__,
            "base_model": info.name if info else type(model).__name__,
            "config": adapter.config.to_dict(),
            "sites": {k: list(v.shape) for k, v in adapter.state_dict().items()},
            "digest": adapter.digest(),
            "sha256": sha256_file(folder / TENSORS_NAME),
            "extra": extra or {},
        },
    )
    return folder


def read_adapter_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The parsed `adapter_config.json` of a folder written by mmkit or peft. Raises `CheckpointError`."""
    path = require_folder(folder) / CONFIG_NAME
    saved = read_json(path)
    if not isinstance(saved, dict) or not ("method" in saved or "peft_type" in saved):
        raise CheckpointError(f"{path} is not an adapter configuration: neither 'method' nor 'peft_type' is there.")
    if "method" in saved and saved.get("format_version", 0) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {saved['format_version']}; this mmkit reads {FORMAT_VERSION}. Upgrade mmkit."
        )
    return saved


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, name: str = "default", strict: bool = True, freeze: bool = True
) -> Adapter:
    """Rebuild a saved adapter on `model` and attach it. On any error the model is unchanged.

    Args:
        model: the same architecture the adapter was trained on.
        folder: written by `save_adapter`, or by peft's `save_pretrained`.
        name: name on this model.
        strict: `False` loads the sites that fit and leaves the others as initialised.
        freeze: stop the gradients of the base.

    Raises:
        CheckpointError: missing, truncated, damaged or unsafe files, an unknown method, or an adapter for another model (the
            differing sites are listed).
    """
    folder = require_folder(folder)
    saved = read_adapter_config(folder)
    if "peft_type" in saved:
        adapter = ADAPTERS.get("peft").load_peft(model, folder, name)
    else:
        adapter = _load_own(model, folder, saved, name, strict)
    if freeze:
        AdapterStack.of(model).freeze(model)
    return adapter


def _load_own(model: nn.Module, folder: Path, saved: dict[str, Any], name: str, strict: bool) -> Adapter:
    try:
        cls = ADAPTERS.get(saved["method"])
    except InputError as error:
        raise CheckpointError(
            f"{folder}: {error} If the method comes from another package, install or import that package first."
        ) from error
    tensors = read_tensors(folder / TENSORS_NAME, allow_pickle_format=False)
    if saved.get("sha256") not in (None, sha256_file(folder / TENSORS_NAME)):
        raise CheckpointError(
            f"{folder / TENSORS_NAME} does not belong to its {CONFIG_NAME} (sha256 differs). Save or copy the folder again."
        )
    bad = [k for k, v in tensors.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise CheckpointError(f"{folder / TENSORS_NAME} holds NaN or infinite values in {bad[:4]}.")
    try:
        config = cls.config_class.from_dict(saved["config"])
        adapter = cls(config, name=name).attach(model)
    except (InputError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"The adapter in {folder} (made for {saved.get('base_model')!r}) does not fit this model: {error}"
        ) from error
    own = adapter.state_dict()
    missing = sorted(k for k in own if k not in tensors)
    unexpected = sorted(k for k in tensors if k not in own)
    shapes = sorted(
        f"{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}"
        for k, v in tensors.items()
        if k in own and own[k].shape != v.shape
    )
    if strict and (missing or unexpected or shapes):
        adapter.detach()
        raise CheckpointError(
            f"The adapter in {folder} was made for {saved.get('base_model')!r} and does not fit this model: "
            f"{len(missing)} sites missing {missing[:4]}, "
            f"{len(unexpected)} unexpected {unexpected[:4]}, {len(shapes)} of another shape {shapes[:4]}."
        )
    adapter.load_state_dict({k: v for k, v in tensors.items() if k in own and own[k].shape == v.shape}, strict=False)
    return adapter
