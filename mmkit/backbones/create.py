"""Create, save and restore backbones. The object returned is the library's own `nn.Module`: keys and behaviour stay its own."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from torch import nn

from mmkit.backbones.builder import Builder, attach_info
from mmkit.backbones.info import ImageBackboneInfo, backbone_info, checked_facts
from mmkit.backbones.state import load_backbone_state, note_random, still_random
from mmkit.errors import CheckpointError, InputError
from mmkit.registry import LIBRARIES
from mmkit.storage import new_folder, open_folder, read_json, read_tensors
from mmkit.storage.files import expanded
from mmkit.weights import bundled_name


def create_backbone(
    name: str | os.PathLike[str],
    checkpoint_path: str | os.PathLike[str] | None = None,
    *,
    pretrained: bool | str = False,
    num_classes: int | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a backbone; it tells its preprocessing, grid, blocks and heads as `model.backbone_info`.

    Args:
        name: "vit_small_patch16_224" or "timm:...", "open_clip:ViT-B-32" (the visual tower), "transformers:dinov2" (a model
            type or a class), "diffusers:UNet2DModel", "mmkit:tiny_vit" (bundled weights), or a folder written by
            `save_backbone`, timm, transformers or diffusers. A bare name takes the bundled weights of that name, so
            "mobilenetv2_100" knows photos; "timm:mobilenetv2_100", or `checkpoint_path`, leaves them out.
        checkpoint_path: a weight file to load. A classifier of another size stays fresh when `num_classes` is given; position
            embeddings of another image size are interpolated; both are logged.
            Anything else that differs is an error.
        pretrained: fetch the library's own weights from the hub (needs the network); for open_clip also one of its tags.
        num_classes: outputs of a classifier: the model then returns logits (B, num_classes). `None` keeps the library's
            default (open_clip and transformers: no classifier).
        overrides: passed to the library's constructor or configuration.

    Raises:
        InputError: unknown name (the nearest are offered) or setting, `num_classes` for a model without a classifier, or weights from
            two places at once.
        CheckpointError: a wrong, partial or damaged weight file (its keys are listed), or the hub cannot be reached.
    """
    if num_classes is not None and (
        isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0
    ):
        raise InputError(f"num_classes must be a whole number of at least 0, not {num_classes!r}.")
    if not isinstance(name, str | os.PathLike):
        raise InputError(f"A backbone is given by its name or folder, not by {type(name).__name__}.")
    if pretrained and checkpoint_path is not None:
        raise InputError("pretrained and checkpoint_path exclude each other: both are weights. Leave one of them out.")
    folder = expanded(name)
    if folder.is_dir():
        if pretrained:
            raise InputError(
                f"{folder} is a folder, whose own weights are read: pretrained means nothing. Leave it out."
            )
        model = _from_folder(folder, num_classes, overrides)
    else:
        library, plain = split_name(str(name), own_weights=checkpoint_path is not None)
        model = _builder(library).build(plain, pretrained, num_classes, overrides)
    info = backbone_info(model)
    if num_classes and not info.heads:
        raise InputError(
            f"{info.name} has no classifier, so num_classes={num_classes} means nothing to it. Leave it out."
        )
    if checkpoint_path is not None:
        state = _builder(info.library).own_keys(model, read_tensors(checkpoint_path))
        load_backbone_state(model, state, str(checkpoint_path), new_head=num_classes is not None)
    note_random(model)
    return model


def split_name(name: str, *, own_weights: bool = False) -> tuple[str, str]:
    """("timm", "vit_...") from "timm:vit_..." or from a bare name. Raises `InputError` with the nearest names.

    With `own_weights` an architecture's name means timm's plain model, and not the variant whose weights are bundled.
    """
    library, colon, plain = name.partition(":")
    if colon:
        if library not in LIBRARIES.names():
            raise InputError(f"Unknown library {library!r} in {name!r}; known: {LIBRARIES.names()}.")
        return library, plain
    bundled = bundled_name(name)
    if bundled is not None and (bundled == name or not own_weights):
        return "mmkit", bundled
    if os.sep in name or name.startswith("."):
        raise InputError(f"{name!r} is not a folder. Give a folder, or a model name such as 'vit_small_patch16_224'.")
    return "timm", name


def _builder(library: str) -> Builder:
    return LIBRARIES.get(library)()


def save_backbone(model: nn.Module, folder: str | os.PathLike[str], *, class_names: tuple[str, ...] = ()) -> Path:
    """Write a folder from which `create_backbone(folder)` restores the model with its preprocessing and class names.

    The library that the model is from reads it too: timm (`timm.create_model("local-dir:FOLDER", pretrained=True)`),
    transformers and diffusers (`from_pretrained(FOLDER)`). Attached adapters are not saved here: merge them first, or use
    `save_adapter`.

    The folder appears whole or not at all, replaces only a saved backbone, and carries the digests of its files.

    Raises `InputError` when adapters are attached, `folder` is a file or holds something else, the model did not come from
    `create_backbone`, or `class_names` are not as many as the classifier's outputs.
    """
    adapters = model.__dict__.get("_mmkit_adapters")
    if adapters and (live := adapters.live()):
        raise InputError(
            f"Adapters {live} are attached and would be lost; call adapter.merge() or adapter.detach() first."
        )
    info = backbone_info(model)
    if info.library not in LIBRARIES.names():
        raise InputError(
            f"A {info.name} did not come from create_backbone, which could not build it again. Save its state_dict."
        )
    if class_names:
        if not isinstance(info, ImageBackboneInfo) or len(class_names) != info.num_classes:
            outputs = getattr(info, "num_classes", 0)
            raise InputError(f"{len(class_names)} class names for a classifier of {outputs} outputs.")
        info = dataclasses.replace(info, class_names=tuple(class_names))
    info = still_random(model, info)
    with new_folder(folder, kind="backbone") as draft:
        _builder(info.library).write(model, info, draft)
    return expanded(folder)


def _from_folder(folder: Path, num_classes: int | None, overrides: dict[str, Any]) -> nn.Module:
    open_folder(folder, ("backbone", "finetuned"), required=False)
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no model: it has no config.json. Give a folder of save_backbone, timm, transformers or diffusers."
        )
    config = read_json(path)
    builders = [_builder(library) for library in LIBRARIES.names()]
    builder = next((b for b in builders if isinstance(config, dict) and b.reads(config)), None)
    if builder is None:
        raise CheckpointError(
            f"{path} names no architecture; expected a folder of save_backbone, timm, transformers or diffusers."
        )
    model, state = builder.open(folder, config, num_classes, overrides)
    saved = config.get("mmkit")
    if isinstance(saved, dict):
        _restore(model, checked_facts(saved, path), keep_size=not overrides)
    load_backbone_state(model, state, str(folder), new_head=num_classes is not None)
    if isinstance(saved, dict):  # a folder can hold random weights as well
        info = backbone_info(model)
        theirs = {h for h in saved.get("fresh") or () if h in info.heads}
        random = saved.get("trained") is False
        fresh = () if random else tuple(h for h in info.heads if h in theirs or h in info.fresh)
        attach_info(model, dataclasses.replace(info, trained=not random, fresh=fresh))
    return model


def _restore(model: nn.Module, saved: dict[str, Any], *, keep_size: bool) -> None:
    """Put back what the folder says about the model, as far as it still fits what was built."""
    info = backbone_info(model)
    facts = {"name": saved["name"]} if "name" in saved else {}
    if isinstance(info, ImageBackboneInfo):
        facts |= {k: saved[k] for k in ("interpolation", "crop_pct", "crop_mode") if k in saved}
        facts |= {k: saved[k] for k in ("mean", "std") if len(saved.get(k, ())) == len(info.mean)}
        facts |= {"input_size": saved["input_size"]} if keep_size and "input_size" in saved else {}
        facts |= {"class_names": saved["class_names"]} if len(saved.get("class_names", ())) == info.num_classes else {}
    attach_info(model, dataclasses.replace(info, **facts))
