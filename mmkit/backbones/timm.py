"""timm's models, and folders that timm writes or its hub holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmkit.backbones.builder import Builder, attach_info, read_weights, refused, unreachable
from mmkit.backbones.info import BackboneInfo, ImageBackboneInfo, checked_facts, describe, image_info, per_channel
from mmkit.errors import CheckpointError, InputError, nearest

# Arguments of `timm.create_model` that reach for files or the hub, or change what is returned: no setting of a model.
_NOT_SETTINGS = (
    "cache_dir", "checkpoint_path", "features_only", "model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
    "pretrained_custom_load", "pretrained_filter_fn", "pretrained_model_args", "pretrained_strict",
)  # fmt: skip
_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "origin_url")


class TimmBuilder(Builder):
    """`create_backbone("vit_tiny_patch16_224")`, with a tag if wanted ("vit_small_patch16_224.augreg_in21k")."""

    library = "timm"

    def build(
        self,
        name: str,
        pretrained: bool | str,
        num_classes: int | None,
        overrides: dict[str, Any],
        pretrained_cfg: dict[str, Any] | None = None,
    ) -> nn.Module:
        _check_name(name)
        if isinstance(pretrained, str):
            raise InputError(
                f"timm names its weights behind a dot: create_backbone('{name}.{pretrained}', pretrained=True)."
            )
        wrong = sorted(set(overrides) & set(_NOT_SETTINGS))
        if wrong:
            raise InputError(f"timm:{name}: {wrong} are no settings of a model; see create_backbone's own arguments.")
        settings = overrides if num_classes is None else {**overrides, "num_classes": num_classes}
        try:
            model = _create(name, settings, pretrained=bool(pretrained), pretrained_cfg=pretrained_cfg)
        except TypeError as error:
            raise refused(f"timm:{name}", settings, error) from error
        except Exception as error:
            if pretrained:
                raise unreachable(f"timm:{name}", error, _address(name)) from error
            raise refused(f"timm:{name}", settings, error) from error
        return attach_info(model, _describe(model, f"timm:{name}", settings, trained=bool(pretrained)))

    def describe(self, model: nn.Module) -> BackboneInfo:
        return (
            _describe(model, type(model).__name__, {}) if hasattr(model, "pretrained_cfg") else super().describe(model)
        )

    def reads(self, config: dict[str, Any]) -> bool:
        return isinstance(config.get("architecture"), str)

    def open(
        self, folder: Path, config: dict[str, Any], num_classes: int | None, overrides: dict[str, Any]
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        cfg, settings = _checked_config(folder, config)
        classes = cfg.get("num_classes") if num_classes is None else num_classes
        model = self.build(config["architecture"], False, classes, {**settings, **overrides}, cfg)
        labels = tuple(cfg.get("label_names") or ())
        info = image_info(model)
        attach_info(model, dataclasses.replace(info, class_names=labels if len(labels) == info.num_classes else ()))
        return model, read_weights(folder)

    def config(self, model: nn.Module, info: BackboneInfo) -> dict[str, Any]:
        assert isinstance(info, ImageBackboneInfo)
        theirs: Any = model.pretrained_cfg
        return {
            "architecture": theirs["architecture"],
            "num_classes": info.num_classes,
            "num_features": info.num_features,
            "label_names": list(info.class_names) or None,
            "pretrained_cfg": {
                **{k: theirs.get(k) for k in ("classifier", "first_conv", "pool_size", "fixed_input_size", "tag")},
                **info.preprocessing(),
                "num_classes": info.num_classes,
            },
            "model_args": {k: v for k, v in info.overrides.items() if k != "num_classes"},
        }


def _create(name: str, settings: dict[str, Any], **options: Any) -> nn.Module:
    """timm's model; `img_size` is what a convolutional network, which takes any size, is said to be prepared for."""
    import timm

    try:
        return timm.create_model(name, **options, **settings)
    except TypeError as error:
        if "img_size" not in settings or "'img_size'" not in str(error):
            raise
        return timm.create_model(name, **options, **{k: v for k, v in settings.items() if k != "img_size"})


def _address(name: str) -> str:
    """Where the published weights of a model lie, "" when timm does not say."""
    from timm.models import get_pretrained_cfg

    cfg: Any = get_pretrained_cfg(name)
    home = cfg and cfg.hf_hub_id
    return f"https://huggingface.co/{home}/resolve/main/model.safetensors" if home else (cfg and cfg.url) or ""


def _check_name(name: str) -> None:
    """Raise `InputError` with the nearest names unless timm knows the architecture and the tag behind the dot."""
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise InputError(f"timm has no model {name!r}. {nearest(name, timm.list_models())}")
    if tag and name not in (known := timm.list_pretrained(f"{architecture}.*")):
        raise InputError(f"timm has no weights {tag!r} for {architecture!r}. {nearest(name, known)}")


def _describe(model: nn.Module, name: str, settings: dict[str, Any], **known: Any) -> BackboneInfo:
    """What the model says, with the size and channels it was built for rather than those its weights were made with."""
    cfg: Any = model.pretrained_cfg
    channels, height, width = cfg.get("input_size") or (3, 224, 224)
    channels = settings.get("in_chans", getattr(model, "in_chans", channels))
    patch = getattr(model, "patch_embed", None)
    size = settings.get("img_size") or getattr(patch, "img_size", None) or (height, width)
    size = (size, size) if isinstance(size, int) else tuple(size)
    return describe(
        model,
        name,
        settings,
        input_size=(channels, *size),
        **{k: per_channel(cfg[k], channels) for k in ("mean", "std")},
        **known,
    )


def _checked_config(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`pretrained_cfg` and `model_args` of a folder, checked before timm sees them: data only, no path, no address.

    Older folders keep everything on one level. Raises `CheckpointError` naming the entry.
    """
    from timm.models import PretrainedCfg

    path = folder / "config.json"
    cfg, settings = config.get("pretrained_cfg", config), config.get("model_args") or {}
    if not isinstance(cfg, dict) or not isinstance(settings, dict):
        raise CheckpointError(
            f"{path}: pretrained_cfg and model_args must be objects. Save or download the folder again."
        )
    wrong = sorted(set(settings) & set(_NOT_SETTINGS))
    if wrong:
        raise CheckpointError(
            f"{path}: model_args may not hold {wrong}: a folder cannot send timm to other files or the hub."
        )
    labels = cfg.get("labels") or cfg.get("label_names")
    merged = {
        **cfg,
        "label_names": labels,
        **{k: config[k] for k in ("num_classes", "label_names") if config.get(k) is not None},
    }
    kept = {f.name for f in dataclasses.fields(PretrainedCfg)} - set(_SOURCES)
    clean = checked_facts({k: v for k, v in merged.items() if k in kept}, path)
    return clean, {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
