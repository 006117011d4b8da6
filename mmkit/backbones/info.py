"""What a backbone says about itself: blocks, classifiers, and for image backbones its preprocessing and patch grid."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmkit.backbones.heads import find_heads, watch_head
from mmkit.errors import CheckpointError, InputError
from mmkit.registry import LIBRARIES

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PREPROCESSING = ("mean", "std", "input_size", "interpolation", "crop_pct", "crop_mode")


@dataclass(frozen=True)
class BackboneInfo:
    """Facts about any backbone, attached to it as `model.backbone_info`.

    Attributes:
        name: what `create_backbone` was given, with its library ("timm:vit_tiny_patch16_224").
        overrides: the keywords it was built with.
        blocks: module paths of the residual blocks, in order.
        heads: module paths of the classifiers: none, one, or several (distilled models have two).
        num_features: width of the vector a classifier reads, 0 when not known.
        trained: whether weights were loaded or trained (`False`: all random; `None`: not known).
        fresh: those of the heads that are still random although the rest is not.
        dtype: of the weight file that was loaded ("float16", ...); the model itself is made in float32.
    """

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    num_features: int = 0
    trained: bool | None = None
    fresh: tuple[str, ...] = ()
    dtype: str = "float32"

    @property
    def library(self) -> str:
        """The library in `name`, "" when the model did not come from `create_backbone`."""
        library, colon, _ = self.name.partition(":")
        return library if colon else ""


@dataclass(frozen=True)
class ImageBackboneInfo(BackboneInfo):
    """Facts about a backbone that takes pictures.

    Attributes:
        mean, std: per-channel normalisation of images in 0..1.
        input_size: (C, H, W) it was made for.
        interpolation: "bilinear", "bicubic", ...
        crop_pct: share of the resized picture that the crop keeps at evaluation.
        crop_mode: "center", "squash" or "border" as in timm, or "pad"; see `mmkit.data.ImageTransform`.
        grid: patch grid (rows, columns), or `None`.
        num_prefix_tokens: class and register tokens before the patches.
        num_frames: frames of a clip that a video model takes, (B, T, C, H, W); 0 for pictures.
        num_classes: outputs of the classifiers, 0 when there are none.
        class_names: labels of the outputs, when known.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    input_size: tuple[int, int, int] = (3, 224, 224)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    grid: tuple[int, int] | None = None
    num_prefix_tokens: int = 0
    num_frames: int = 0
    num_classes: int = 0
    class_names: tuple[str, ...] = ()

    def preprocessing(self) -> dict[str, Any]:
        """mean, std, input_size, interpolation, crop_pct and crop_mode as keywords."""
        return {k: getattr(self, k) for k in _PREPROCESSING}


def backbone_info(model: nn.Module) -> BackboneInfo:
    """The facts about `model`: those `create_backbone` attached, else what its library reads off it, else what its modules show."""
    attached = getattr(model, "backbone_info", None)
    if isinstance(attached, BackboneInfo):
        return attached
    library = _library(model)
    return LIBRARIES.get(library)().describe(model) if library else describe(model, type(model).__name__)


def _library(model: nn.Module) -> str:
    """The known library whose class `model` is, or ""."""
    package = type(model).__module__.partition(".")[0]
    return package if package != "mmkit" and package in LIBRARIES.names() else ""


def image_info(model: nn.Module) -> ImageBackboneInfo:
    """`backbone_info` of a model that takes pictures. Raises `InputError` when it does not say how they are prepared."""
    info = backbone_info(model)
    if not isinstance(info, ImageBackboneInfo):
        raise InputError(
            f"{info.name} does not say how pictures are prepared for it. Build it with create_backbone, or set "
            "model.backbone_info = ImageBackboneInfo(name, input_size=(C, H, W), mean=..., std=...)."
        )
    return info


def describe(model: nn.Module, name: str, overrides: dict[str, Any] | None = None, **known: Any) -> BackboneInfo:
    """Read the facts off a model; `known` values win. It is an image backbone when it or `known` says its preprocessing."""
    common: dict[str, Any] = {
        "name": name,
        "overrides": dict(overrides or {}),
        "blocks": _block_paths(model),
        "heads": find_heads(model),
        "num_features": int(getattr(model, "num_features", 0) or 0),
    }
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    if not cfg and "mean" not in known:
        return BackboneInfo(**{**common, **known})
    facts: dict[str, Any] = {k: _tuple(cfg[k]) for k in _PREPROCESSING if cfg.get(k) is not None}
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    facts["grid"] = tuple(grid) if grid else None
    facts["num_prefix_tokens"] = int(getattr(model, "num_prefix_tokens", 0))
    facts["num_classes"] = int(getattr(model, "num_classes", 0) or 0) if common["heads"] else 0
    return ImageBackboneInfo(**{**common, **facts, **known})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def per_channel(values: Any, channels: int) -> tuple[float, ...]:
    """Statistics for another number of channels: their mean, as timm sums or repeats the input weights."""
    values = tuple(values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def checked_facts(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a file says about a backbone, lists as tuples and nulls left out. Raises `CheckpointError` naming a wrong entry."""
    facts = {k: _tuple(v) for k, v in values.items() if v is not None}
    for key in _CHECKS.keys() & facts.keys():
        if not _CHECKS[key](facts[key]):
            raise CheckpointError(
                f"{path}: {key} is {facts[key]!r}, which makes no sense. Save or download the folder again."
            )
    return facts


def _numbers(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)


def _names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(v, str) for v in value)


_CHECKS: dict[str, Any] = {
    "name": lambda v: isinstance(v, str),
    "mean": lambda v: _numbers(v) and len(v) > 0,
    "std": lambda v: _numbers(v) and len(v) > 0 and min(v) > 0,
    "input_size": lambda v: _numbers(v) and len(v) == 3 and all(isinstance(x, int) and x > 0 for x in v),
    "crop_pct": lambda v: _numbers((v,)) and v > 0,
    "crop_mode": lambda v: v in ("center", "squash", "border", "pad"),
    "interpolation": lambda v: isinstance(v, str),
    "num_classes": lambda v: isinstance(v, int) and v >= 0,
    "class_names": _names,
    "fresh": _names,
    "trained": lambda v: isinstance(v, bool),
    "label_names": _names,
}


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Module paths of all classifiers, as in the plain model; empty when there are none. Each is a module that is called.

    A model that says it has classes but not where (`ImageBackboneInfo(num_classes=...)` without `heads`) is watched in one
    forward of its example input.
    """
    info = backbone_info(model)
    if info.heads or not getattr(info, "num_classes", 0):
        return info.heads
    args, kwargs = example_input(model) or ((), {})
    return watch_head(model, args, kwargs)


def head_scopes(model: nn.Module) -> tuple[str, ...]:
    """The heads with what belongs to them alone: "head" where the classifier is "head.fc" beside its own norm and pooling.

    Methods that adapt the trunk leave these out.
    """
    heads, blocks = head_names(model), backbone_info(model).blocks
    return tuple(dict.fromkeys(_scope(head, blocks) for head in heads))


def _scope(head: str, blocks: tuple[str, ...]) -> str:
    """The outermost module around `head` that holds none of the blocks; `head` itself where no blocks are known."""
    parts = head.split(".")
    outer = [".".join(parts[:n]) for n in range(1, len(parts))] if blocks else []
    return next((path for path in outer if not any(b.startswith(f"{path}.") for b in blocks)), head)


def example_input(model: nn.Module, batch_size: int = 1) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments for `model(*args, **kwargs)` that make it run, for checks and tracing; `None` when they are not known.

    For image backbones: zeros of the shape they were made for, (B, C, H, W), clips (B, T, C, H, W) for video models, on the
    device and in the dtype of the parameters. For diffusers' denoisers: their keywords, from the configuration. A model with a
    method of this name answers itself.
    """
    if own := getattr(model, "example_input", None):
        return own(batch_size)
    info, p = backbone_info(model), next(model.parameters(), None)
    if p is None:
        return None
    if isinstance(info, ImageBackboneInfo):
        frames = [info.num_frames] if info.num_frames else []
        return (torch.zeros(batch_size, *frames, *info.input_size, device=p.device, dtype=p.dtype),), {}
    library = info.library or _library(model)
    return LIBRARIES.get(library)().example_input(model, batch_size) if library else None


def randomness(model: nn.Module) -> str:
    """A sentence when all weights or a classifier of `model` are random, and what to do; "" when they are not."""
    info = backbone_info(model)
    if info.trained is False:
        return (
            f"{info.name} has random weights: what it answers or learns from means little. Pass pretrained=True (--pretrained; "
            "needs the network), checkpoint_path=FILE (--checkpoint FILE), a folder, or a bundled model (mmkit.list_weights())."
        )
    if info.fresh:
        return f"The classifier ({', '.join(info.fresh)}) of {info.name} is random: its answers mean nothing before it is trained."
    return ""


def warn_if_random(model: nn.Module) -> None:
    """Warn when every weight of `model` is random, so that nobody takes what it learns for more."""
    if backbone_info(model).trained is False:
        warnings.warn(randomness(model), stacklevel=3)


def mark_trained(model: nn.Module) -> None:
    """Note that `model`, with its classifiers, is random no more."""
    info = getattr(model, "backbone_info", None)
    if isinstance(info, BackboneInfo):
        model.__dict__["backbone_info"] = dataclasses.replace(info, trained=True, fresh=())


def _block_paths(model: nn.Module) -> tuple[str, ...]:
    """The longest `nn.ModuleList`/`nn.Sequential` chains of equal blocks: blocks, stages.*.blocks, resblocks, ..."""
    keys = ("blocks", "resblocks", "transformer_blocks", "layers", "layer")
    lists = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in keys and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }
    inner = [n for n in lists if not any(o != n and o.startswith(f"{n}.") for o in lists)]
    return tuple(f"{n}.{i}" for n in inner for i in range(len(lists[n])))
