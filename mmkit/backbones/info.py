"""What a backbone says about itself: its preprocessing, patch grid, prefix tokens, blocks and head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmkit.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BackboneInfo:
    """Facts about a backbone, attached to it as `model.backbone_info`.

    Attributes:
        name: what `create_backbone` was given, with its library ("timm:vit_tiny_patch16_224").
        overrides: the keywords it was built with.
        mean, std: per-channel normalisation of images in 0..1.
        input_size: (C, H, W) it was made for.
        interpolation: "bilinear", "bicubic", ...
        crop_pct: share of the resized picture that the centre crop keeps at evaluation.
        grid: patch grid (rows, columns), or `None`.
        num_prefix_tokens: class and register tokens before the patches.
        blocks: module paths of the residual blocks, in order.
        head: module path of the classifier, "" when there is none.
        num_classes: outputs of the head, 0 when there is none.
        class_names: labels of the outputs, when known.
    """

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    input_size: tuple[int, int, int] = (3, 224, 224)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    grid: tuple[int, int] | None = None
    num_prefix_tokens: int = 0
    blocks: tuple[str, ...] = ()
    head: str = ""
    num_classes: int = 0
    class_names: tuple[str, ...] = ()

    def preprocessing(self) -> dict[str, Any]:
        """mean, std, input_size, interpolation and crop_pct as keywords."""
        keys = ("mean", "std", "input_size", "interpolation", "crop_pct")
        return {k: getattr(self, k) for k in keys}


def backbone_info(model: nn.Module) -> BackboneInfo:
    """The facts about `model`: those `create_backbone` attached, else read from a timm model, else what its modules show."""
    attached = getattr(model, "backbone_info", None)
    return attached if isinstance(attached, BackboneInfo) else describe(model, type(model).__name__)


def describe(model: nn.Module, name: str, overrides: dict[str, Any] | None = None, **known: Any) -> BackboneInfo:
    """Read the facts off a model; `known` values win."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    facts: dict[str, Any] = {
        k: tuple(cfg[k]) if isinstance(cfg[k], (list, tuple)) else cfg[k]
        for k in ("mean", "std", "input_size", "interpolation", "crop_pct")
        if cfg.get(k) is not None
    }
    patch = getattr(model, "patch_embed", None)
    if getattr(patch, "grid_size", None):
        facts["grid"] = tuple(patch.grid_size)
    if getattr(patch, "img_size", None):
        facts["input_size"] = (patch.proj.weight.shape[1], *patch.img_size)
    facts["num_prefix_tokens"] = int(getattr(model, "num_prefix_tokens", 0))
    facts["blocks"] = _block_paths(model)
    facts["head"] = _find_head(model)
    facts["num_classes"] = int(getattr(model, "num_classes", 0) or 0) if facts["head"] else 0
    return BackboneInfo(name=name, overrides=dict(overrides or {}), **{**facts, **known})


def head_name(model: nn.Module, *, required: bool = True) -> str:
    """Module path of the classifier; "" when there is none and `required` is `False`.

    Raises `InputError` when a head is required and cannot be found.
    """
    attached = getattr(model, "backbone_info", None)
    head = attached.head if isinstance(attached, BackboneInfo) else _find_head(model)
    if not head and required:
        raise InputError(
            f"{type(model).__name__} has no classifier that could be found. Build it with num_classes=N, "
            "or name the module in modules_to_save."
        )
    return head


def _find_head(model: nn.Module) -> str:
    """timm knows its classifier; elsewhere the usual names."""
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    names = [classifier] if isinstance(classifier, str) else []
    for name in [*names, "head", "fc", "classifier", "heads"]:
        top = name.partition(".")[0]  # "head.fc": the whole head is trained, its norm included
        module = getattr(model, top, None)
        if isinstance(module, nn.Module) and any(True for _ in module.parameters()):
            return top
    return ""


def _block_paths(model: nn.Module) -> tuple[str, ...]:
    """The longest `nn.ModuleList`/`nn.Sequential` chains of equal blocks: blocks, stages.*.blocks, resblocks, ..."""
    keys = ("blocks", "resblocks", "transformer_blocks", "layers")
    lists = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in keys and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }
    inner = [n for n in lists if not any(o != n and o.startswith(f"{n}.") for o in lists)]
    return tuple(f"{n}.{i}" for n in inner for i in range(len(lists[n])))
