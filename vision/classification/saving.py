"""The folder of a fine-tuning run: what its backbone's name alone does not bring back, the report, the settings; and reading it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mmkit.adapters import load_adapter, save_adapter
from mmkit.adapters.files import CONFIG_NAME
from mmkit.backbones import create_backbone, image_info, mark_trained, save_backbone
from mmkit.errors import CheckpointError, InputError
from mmkit.storage import atomic_write, new_folder, open_folder, require_folder
from mmkit.vision.classification.preparing import Prepared

KINDS = ("finetuned", "adapter", "backbone")
"""What a folder of fine-tuning holds, and the kinds that are read and replaced alike."""


KEPT = ("training",)
"""The state of the run in such a folder."""


def save_run(prepared: Prepared, folder: Path, documents: Callable[[int], Mapping[str, str]] | None = None) -> int:
    """Save what the backbone's name alone does not bring back; returns its size in bytes.

    Args:
        documents: given that size, further files by name, with their text.
    """
    with new_folder(folder, KINDS[0], keep=KEPT, replaces=KINDS[1:]) as draft:
        backbone = dict(prepared.backbone)
        if prepared.adapter is None:
            save_backbone(prepared.model, draft, class_names=tuple(prepared.class_names))
        else:
            if prepared.keep_backbone:  # the adapter is useless without these very weights
                live = prepared.adapter
                model = live.detach()
                try:
                    save_backbone(model, draft / "backbone")
                finally:
                    live.attach(model)
                backbone = {"name": "backbone", "overrides": {}}
            save_adapter(prepared.adapter, draft, extra={"backbone": backbone, "class_names": prepared.class_names})
        size = sum(f.stat().st_size for f in draft.iterdir() if f.is_file())
        for name, text in (documents(size) if documents is not None else {}).items():
            with atomic_write(draft / name) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="replace")  # a path may be no UTF-8
    return size


def load_finetuned(
    folder: str | os.PathLike[str], *, backbone: str | os.PathLike[str] | None = None, **options: Any
) -> nn.Module:
    """The model of a folder written by `finetune`, with the adapter attached (`attached_adapters(model)["default"]`).

    Args:
        folder: holds an adapter, or a whole model after full fine-tuning.
        backbone: where the backbone is now, if not where the folder says.
        options: `checkpoint_path` and `pretrained` of `create_backbone`, for a backbone that needs them.

    Raises:
        InputError: a whole model was given a backbone.
        CheckpointError: the folder is damaged or does not say which backbone it needs.
    """
    folder = require_folder(folder)
    manifest = open_folder(folder, KINDS, required=False)
    adapted, whole = (folder / CONFIG_NAME).exists(), (folder / "config.json").exists()
    if manifest is None and adapted and whole:
        raise CheckpointError(
            f"{folder} holds an adapter ({CONFIG_NAME}) and a whole model (config.json), and nothing says which is meant. "
            "Move one of them to a folder of its own."
        )
    if not adapted and not whole and (folder / KEPT[0]).is_dir():
        raise CheckpointError(f"{folder} holds a run that has not ended. Run the same command again to finish it.")
    if not adapted and not whole:
        raise CheckpointError(
            f"{folder} holds no image classifier: neither {CONFIG_NAME} nor config.json. Give a folder written by `mmkit finetune`, "
            "`mmkit merge` or `save_backbone`."
        )
    if not adapted:
        if backbone is not None or any(options.values()):
            raise InputError(f"{folder} holds a whole model, which takes no other backbone or weights. Leave them out.")
        return create_backbone(folder).eval()
    spec, classes = _needed(folder, manifest or {})
    if backbone is None:
        if "name" not in spec:
            raise CheckpointError(
                f"{folder} does not say which backbone it was made for; name it with backbone= (--backbone)."
            )
        name = spec["name"]
        backbone = folder / name if (folder / str(name)).is_dir() else name
    model = create_backbone(backbone, num_classes=len(classes) or None, **options, **spec.get("overrides", {}))
    info = dataclasses.replace(image_info(model), class_names=tuple(classes))
    model.__dict__["backbone_info"] = info
    if load_adapter(model, folder).config.modules_to_save:
        mark_trained(model)
    return model.eval()


def _needed(folder: Path, manifest: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Which backbone an adapter's folder needs ("name" and "overrides", as far as it says), and its classes."""
    extra = manifest.get("extra") or {}
    spec, classes = (extra.get("backbone") or {}, extra.get("class_names") or []) if isinstance(extra, dict) else (0, 0)
    if (
        not isinstance(spec, dict)
        or not isinstance(spec.get("name", ""), str)
        or not isinstance(spec.get("overrides", {}), dict)
        or "num_classes" in spec.get("overrides", {})
        or not isinstance(classes, list)
        or not all(isinstance(c, str) for c in classes)
    ):
        raise CheckpointError(
            f"{folder}: what mmkit.json says of backbone and classes is damaged. Copy the folder again."
        )
    return spec, classes
