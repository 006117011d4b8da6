"""The visual towers of open_clip."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmkit.backbones.builder import Builder, ClassifierOnTower, attach_info, read_weights, refused, unreachable
from mmkit.backbones.info import describe
from mmkit.errors import CheckpointError, InputError, nearest

logger = logging.getLogger(__name__)

_CROP_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}


class OpenClipBuilder(Builder):
    """`create_backbone("open_clip:ViT-B-32")`: the tower alone, or with `num_classes` a linear classifier on its embedding.

    A tag behind a dot ("ViT-B-32.laion2b_s34b_b79k", with `pretrained=True`) chooses among its published weights.
    Settings: `embed_dim` and `vision_cfg` (merged into the model's own). `pretrained` may be one of open_clip's tags.
    """

    library = "open_clip"

    def build(self, name: str, pretrained: bool | str, num_classes: int | None, overrides: dict[str, Any]) -> nn.Module:
        import open_clip

        name, _, tagged = name.partition(".")  # no model of open_clip has a dot in its name
        config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
        if config is None:
            raise InputError(f"open_clip has no model {name!r}. {nearest(name, open_clip.list_models())}")
        unknown = sorted(set(overrides) - {"embed_dim", "vision_cfg"})
        if unknown or (pretrained and overrides):
            raise InputError(
                f"open_clip:{name} takes embed_dim and vision_cfg, without pretrained; found {sorted(overrides)}."
            )
        tags = open_clip.list_pretrained_tags_by_model(name)
        tag = pretrained if isinstance(pretrained, str) else tagged or next(iter(tags), None)
        if (pretrained or tagged) and tag not in tags:
            raise InputError(f"open_clip has no weights {tag!r} for {name!r}. {nearest(str(tag), tags)}")
        embed_dim = overrides.get("embed_dim", config["embed_dim"])
        tower = _load(name, tag) if pretrained else _tower(name, config, embed_dim, overrides)
        facts = _facts(tower, open_clip.get_pretrained_cfg(name, tag) if tag else {})
        settings = overrides if num_classes is None else {**overrides, "num_classes": num_classes}
        model = ClassifierOnTower(tower, embed_dim, num_classes) if num_classes else tower
        known = {"num_features": embed_dim, "num_classes": num_classes or 0, "heads": ("head",) if num_classes else ()}
        return attach_info(
            model, describe(model, f"open_clip:{name}", settings, **facts, **known, trained=bool(pretrained))
        )

    def own_keys(self, model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a whole CLIP the keys `visual.*`; for a model with a classifier they lie under `tower.*`."""
        visual = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
        if visual:
            logger.info(
                "the file holds a whole CLIP: its %d tensors beside the visual tower are left", len(state) - len(visual)
            )
            state = visual
        if isinstance(model, ClassifierOnTower) and not any(k.startswith("tower.") for k in state):
            state = {f"tower.{k}": v for k, v in state.items()}
        return state

    def reads(self, config: dict[str, Any]) -> bool:
        return _saved_name(config).startswith("open_clip:")

    def open(
        self, folder: Path, config: dict[str, Any], num_classes: int | None, overrides: dict[str, Any]
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        saved = config["mmkit"].get("overrides", {})
        if not isinstance(saved, dict):
            raise CheckpointError(f"{folder}/config.json: overrides must be an object. Save the folder again.")
        settings = {**saved, **overrides}
        classes = settings.pop("num_classes", None)
        name = _saved_name(config).partition(":")[2]
        model = self.build(name, False, classes if num_classes is None else num_classes, settings)
        return model, read_weights(folder)


def _saved_name(config: dict[str, Any]) -> str:
    saved = config.get("mmkit")
    return str(saved.get("name", "")) if isinstance(saved, dict) else ""


def _load(name: str, tag: str) -> Any:
    import open_clip

    try:
        return open_clip.create_model(name, pretrained=tag).visual
    except Exception as error:
        home = (open_clip.get_pretrained_cfg(name, tag).get("hf_hub") or "").rstrip("/")
        address = f"https://huggingface.co/{home}/resolve/main/open_clip_model.safetensors" if home else ""
        raise unreachable(f"open_clip:{name}.{tag}", error, address) from error


def _tower(name: str, config: dict[str, Any], embed_dim: int, overrides: dict[str, Any]) -> Any:
    from open_clip.model import _build_vision_tower

    vision = {**config["vision_cfg"], **overrides.get("vision_cfg", {}), "timm_model_pretrained": False}
    try:
        return _build_vision_tower(embed_dim, vision, config.get("quick_gelu", False))
    except Exception as error:
        raise refused(f"open_clip:{name}", overrides, error) from error


def _facts(tower: Any, published: dict[str, Any]) -> dict[str, Any]:
    """Preprocessing that the published weights were trained with, and what the tower shows of its patches."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    p = merge_preprocess_dict(PreprocessCfg(), published)
    size = tower.image_size if isinstance(tower.image_size, (tuple, list)) else (tower.image_size,) * 2
    trunk = getattr(tower, "trunk", tower)  # timm's own model inside the towers built from it
    grid = getattr(tower, "grid_size", None) or getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    return {
        "mean": tuple(p["mean"]),
        "std": tuple(p["std"]),
        "input_size": (3, *size),
        "interpolation": p["interpolation"],
        "crop_mode": _CROP_MODES[p["resize_mode"]],
        "num_prefix_tokens": int(getattr(trunk, "num_prefix_tokens", 1 if hasattr(tower, "class_embedding") else 0)),
        "grid": tuple(grid) if grid else None,
    }
