"""What users call: apply, save, load, list, and the active set of a model that carries several adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from mmkit.adapters.config import AdapterConfig
from mmkit.adapters.core import Adapter
from mmkit.adapters.files import halve_tensors, read_adapter_config, read_adapter_tensors
from mmkit.adapters.stack import AdapterStack, ModuleGroup, attached_adapters, roots_of
from mmkit.errors import CheckpointError, InputError, nearest
from mmkit.registry import ADAPTERS
from mmkit.storage import new_folder, open_folder, require_folder
from mmkit.storage.files import expanded

T = TypeVar("T", bound=type)


def register_adapter(name: str) -> Callable[[T], T]:
    """Class decorator: make a method available as `apply_adapter(model, name)` and to `load_adapter`."""

    def add(cls: T) -> T:
        cls.method = name  # type: ignore[attr-defined]
        cls.config_class.method = name  # type: ignore[attr-defined]
        return ADAPTERS.register(name)(cls)

    return add


def list_adapters(pattern: str = "", *, task: str | None = None) -> list[str]:
    """Names of the adapter methods.

    Args:
        pattern: a substring or wildcard.
        task: only methods that suit this task, for example "image-classification".
    """
    names = ADAPTERS.names(pattern)
    return names if task is None else [n for n in names if task in (ADAPTERS.get(n).tasks or (task,))]


def apply_adapter(
    model: nn.Module | Mapping[str, nn.Module],
    config: Any = "ssf",
    *,
    name: str = "default",
    freeze: bool = True,
    **settings: Any,
) -> Adapter:
    """Build the adapter of `config` and attach it to `model`.

    Args:
        model: any `nn.Module`, or several by name to be adapted as one, such as `{"unet": unet, "text_encoder": encoder}`.
        config: a method's name (with its settings as keywords), an `AdapterConfig`, or a peft config such as `peft.LoraConfig`.
        name: a model can carry several adapters under different names; they act in the order of attachment.
        freeze: stop the gradients of everything but adapters, and the running statistics of frozen norms. `detach` undoes both.

    Returns:
        The attached adapter; optimise `adapter.parameters()`.

    Raises:
        InputError: unknown method or setting, or no module matches; the model is unchanged.

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
        >>> adapter = apply_adapter(model, "ssf", modules_to_save=("head",))
        >>> sorted(adapter.state_dict())[-1]
        'patch_embed.proj.shift'
    """
    cls, config = resolve_config(config, settings)
    target = _one_module(model)
    adapter = cls(config, name=name).attach(target)
    if freeze:
        _freeze(target)
    return adapter


def _one_module(model: Any) -> nn.Module:
    """The module, or the several ones by name, that a user wants to adapt."""
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, Mapping):
        return ModuleGroup(dict(model))
    raise InputError(f"An adapter goes on an nn.Module, or a dict of such by name, not {type(model).__name__}.")


def resolve_config(config: Any, settings: dict[str, Any]) -> tuple[type[Adapter], Any]:
    """The class and the config that a user's `config` means. Raises `InputError` for an unknown method or setting."""
    if isinstance(config, str):
        cls = ADAPTERS.get(config)
        try:
            return cls, cls.configure(settings)
        except TypeError as error:
            known = [f.name for f in dataclasses.fields(cls.config_class)]
            raise InputError(f"{config!r}: {error}. Settings: {known}") from None
    if settings:
        raise InputError(f"Settings {sorted(settings)} belong into the config; give a method's name to pass them here.")
    if isinstance(config, AdapterConfig):
        return ADAPTERS.get(config.method), config
    if hasattr(config, "peft_type"):
        from mmkit.adapters.peft import from_peft_config

        return from_peft_config(config)
    raise InputError(f"config must be a method's name, an AdapterConfig or a peft config, not {type(config).__name__}.")


def _freeze(model: nn.Module) -> None:
    for _, root in roots_of(model):
        AdapterStack.of(root).freeze()


def save_adapter(
    adapter: Adapter, folder: str | os.PathLike[str], *, extra: dict[str, Any] | None = None, half: bool = False
) -> Path:
    """Write `adapter` (with its saved modules) to `folder`, which appears complete or not at all.

    Args:
        adapter: attached or merged.
        folder: created when missing; an adapter already there is replaced.
        extra: JSON-friendly facts to keep beside it, for example class names.
        half: store float16, for half the size: what is loaded then differs from `adapter` by up to 1 in 2048 of each value. Without,
            it is the same to the bit.

    Returns:
        The folder.

    Raises:
        InputError: `adapter` is none or was detached, or `half`, and a value beyond the range of float16.
    """
    if not isinstance(adapter, Adapter):
        raise InputError(
            f"save_adapter writes what apply_adapter returned, not {type(adapter).__name__}. For a whole model use save_backbone."
        )
    with new_folder(folder, kind="adapter", facts={"extra": extra or {}}) as temporary:
        adapter.write_files(temporary)
        if half:
            halve_tensors(temporary)
    return expanded(folder)


def load_adapter(
    model: nn.Module | Mapping[str, nn.Module],
    folder: str | os.PathLike[str],
    *,
    name: str = "default",
    strict: bool = True,
    freeze: bool = True,
) -> Adapter:
    """Rebuild a saved adapter on `model` and attach it. On any error the model is unchanged.

    Args:
        model: the same architecture the adapter was trained on.
        folder: written by `save_adapter`, or by peft's `save_pretrained`.
        name: name on this model.
        strict: `False` loads the sites that fit, leaves the others as initialised and logs which.
        freeze: stop the gradients of the base.

    Raises:
        CheckpointError: missing, truncated, damaged or unsafe files, an unknown method, or an adapter for another model (the
            differing sites are listed).
    """
    open_folder(folder, required=False)  # every file as it was saved; peft's own folders carry no digests
    folder = require_folder(folder)
    saved = read_adapter_config(folder)
    method = saved.get("method") or saved["peft_type"].lower()
    try:
        cls = ADAPTERS.get(method)
    except InputError as error:
        raise CheckpointError(
            f"{folder}: {error} If the method comes from another package, install or import that package first."
        ) from error
    target = _one_module(model)
    adapter = cls.from_files(target, folder, saved, read_adapter_tensors(folder), name, strict)
    if freeze:
        _freeze(target)
    return adapter


def set_active_adapters(model: nn.Module, names: Iterable[str] | str) -> None:
    """Let exactly the adapters called `names` act, without attaching anything anew; also in a compiled model.

    A merged adapter that is left out is unmerged. Raises `InputError` for a name the model does not carry; nothing changes then.
    """
    wanted = {names} if isinstance(names, str) else set(names)
    adapters = attached_adapters(model)
    if unknown := wanted - set(adapters):
        raise InputError(f"The model has no adapter {sorted(unknown)[0]!r}. {nearest(sorted(unknown)[0], adapters)}")
    for key, adapter in sorted(adapters.items(), key=lambda item: -item[1]._merge_order):
        if key not in wanted and adapter.merged:
            adapter.unmerge()
        adapter.enabled = key in wanted


def merge_adapters(model: nn.Module, scales: Mapping[str, float] | None = None) -> nn.Module:
    """Fold several adapters into the weights, each at its strength, in the order of attachment. All or nothing.

    Args:
        scales: adapter name -> strength; `None` takes all that are not merged yet at their own `scale`.

    Raises `NotMergeableError` (then none of them is merged) or `InputError` for an unknown name.
    """
    adapters = attached_adapters(model)
    if unknown := set(scales or ()) - set(adapters):
        raise InputError(f"The model has no adapter {sorted(unknown)[0]!r}. {nearest(sorted(unknown)[0], adapters)}")
    done: list[tuple[Adapter, float]] = []
    try:
        for name, adapter in adapters.items():
            if (scales is None and not adapter.merged) or name in (scales or ()):
                before = adapter.scale
                adapter.merge(None if scales is None else scales[name])
                done.append((adapter, before))
    except BaseException:
        with contextlib.suppress(InputError):
            for adapter, before in reversed(done):
                adapter.unmerge()
                adapter.scale = before
        raise
    return model
