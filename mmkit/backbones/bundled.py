"""Our own small models with their weights: `create_backbone("mmkit:tiny_vit")`, `load_weights("lightm_unet_nuclei")`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from mmkit.backbones.builder import Builder, attach_info
from mmkit.backbones.create import create_backbone
from mmkit.backbones.info import BackboneInfo, ImageBackboneInfo, image_info, per_channel
from mmkit.backbones.model import create_model
from mmkit.backbones.state import load_backbone_state
from mmkit.errors import InputError
from mmkit.registry import LIBRARIES
from mmkit.storage import load_state
from mmkit.weights import load_tensors, weight_entry


class BundledBuilder(Builder):
    """Backbones of other libraries with bundled weights; other bundled models are loaded with `load_weights`."""

    library = "mmkit"

    def build(self, name: str, pretrained: bool | str, num_classes: int | None, overrides: dict[str, Any]) -> nn.Module:
        entry = weight_entry(name)
        if ":" not in entry.model:
            raise InputError(f"{name!r} is no backbone; build it with mmkit.load_weights({name!r}).")
        settings = {**entry.config, **overrides, **({} if num_classes is None else {"num_classes": num_classes})}
        model = create_backbone(entry.model, **settings)
        load_backbone_state(model, load_tensors(name), f"bundled weights {name!r}", new_head=num_classes is not None)
        fields = {f.name for f in dataclasses.fields(ImageBackboneInfo)}
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.extra.items() if k in fields}
        info = image_info(model)
        if "img_size" in overrides:
            known.pop("input_size", None)  # the caller's size, not the one the weights were made with
        known |= {k: per_channel(known[k], len(info.mean)) for k in ("mean", "std") if k in known}
        info = dataclasses.replace(info, name=f"mmkit:{entry.name}", **known)
        if len(info.class_names) != info.num_classes:
            info = dataclasses.replace(info, class_names=())
        return attach_info(model, info)

    def write(self, model: nn.Module, info: BackboneInfo, folder: Path) -> None:
        library = weight_entry(info.name.partition(":")[2]).model.partition(":")[0]
        LIBRARIES.get(library)().write(model, info, folder)


def load_weights(name: str) -> nn.Module:
    """Build the bundled model `name` (see `mmkit.list_weights`) with its trained weights, in eval mode on the CPU.

    Raises:
        InputError: unknown name.
        CheckpointError: the file is missing or damaged.
    """
    entry = weight_entry(name)
    if ":" in entry.model:
        return create_backbone(f"mmkit:{name}").eval()
    model = create_model(entry.model, **entry.config)
    load_state(model, load_tensors(name), source=str(entry.path))
    return model.eval()
