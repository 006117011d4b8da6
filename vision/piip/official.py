"""The authors' configurations and checkpoints (OpenGVLab/PIIP): classification, detection, and the gates of PIIP-LLaVA."""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any

from torch import Tensor

from mmkit.errors import CheckpointError, InputError

logger = logging.getLogger(__name__)

_RENAMED = (
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.ca_weight$", ".ca_gamma"),  # PIIP-LLaVA: transformers rewrote keys with "gamma"
    (r"\.cffn_weight$", ".cffn_gamma"),
)
_COUNTED = (  # official branches count from 1, our lists from 0
    (r"^branch(\d)\.(norm|head)\.", "{kind}s.{i}."),
    (r"^merge_branch(\d)\.", "merge.branches.{i}."),
    (r"^w(\d)$", "merge.weights.{i}"),
    (r"^intermediate_merging_(\d+)_branch(\d)\.", "taps.{tap}.branches.{i}."),
    (r"^intermediate_merging_(\d+)_w(\d)$", "taps.{tap}.weights.{i}"),
)
_OTHER_PARTS = ("neck.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head.", "decode_head.", "auxiliary_head.")


def own_state(state: dict[str, Any], model: Any) -> dict[str, Any]:
    """An official state dict with the keys of `model`, a `Pyramid`.

    Prefixes of wrappers go, and what a detector has besides its backbone. A position of the class token that the pyramid never
    uses goes where `model` has no room for it. Everything else keeps or changes its name; nothing is left out.

    Raises `CheckpointError` for weights of branches whose layout is not a plain vision transformer's.
    """
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    if any(k.startswith("backbone.") for k in state):
        left = [k for k in state if k.startswith(_OTHER_PARTS)]
        if left:
            logger.info("%d tensors of the detector or segmenter around the backbone are left out", len(left))
        state = {k.removeprefix("backbone."): v for k, v in state.items() if not k.startswith(_OTHER_PARTS)}
    found = {_own_key(key): value for key, value in state.items()}
    _refuse_foreign(found, model)
    own = model.state_dict()
    for key, value in found.items():
        if key.endswith("pos_embed") and key in own and value.shape[1] == own[key].shape[1] + 1:
            found[key] = value[:, 1:]
    if getattr(model, "separate_head", False) and model.pool != "first_patch":
        warnings.warn(
            "Official weights with separate heads were trained to read the first patch, not the class token: build the model with "
            "pool='first_patch' (official=True).",
            stacklevel=3,
        )
    return found


def _own_key(key: str) -> str:
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    for pattern, template in _COUNTED:
        match = re.match(pattern, key)
        if match:
            groups = match.groups()
            tap = pattern.startswith("^intermediate")
            names = {"i": int(groups[1 if tap else 0]) - 1, "tap": groups[0], "kind": groups[-1]}
            return template.format(**names) + key[match.end() :]
    return key


def _refuse_foreign(state: dict[str, Tensor], model: Any) -> None:
    own = model.state_dict()
    norms = [k for k in state if k.endswith(("attn.q_norm.weight", "attn.k_norm.weight")) and k not in own]
    if norms:
        kind = "layer" if norms[0].replace(".weight", ".bias") in state else "rms"
        raise CheckpointError(
            f"The file has norms of queries and keys over the full width (InternViT), such as {norms[0]}, and this model has none. "
            f"Build that branch with BranchConfig(qk_norm={kind!r})."
        )
    for part in ("clip_model.", "convnext_model.", "rel_pos", "visual_embed."):
        foreign = [k for k in state if part in k and k not in own]
        if foreign:
            raise CheckpointError(
                f"The file has a branch of another layout ({foreign[0]}). Its interactions can be used with a branch of that "
                "architecture from timm or transformers, but its branch weights cannot be renamed; load those with load_branch."
            )


def config_from_official(config: dict[str, Any], *, own_branch4: bool = False) -> dict[str, Any]:
    """The authors' constructor arguments as keywords of `PIIP`, or of `PIIPFeaturePyramid` for a detection backbone.

    Args:
        own_branch4: the authors' detector of four branches builds the fourth model from the settings of the third; only its resolution
            and interaction indexes are its own. `True` gives it all of its own settings.

    Raises `InputError` for branches that are no plain vision transformers.
    """
    numbers = [n for n in range(1, 5) if config.get(f"branch{n}")]
    detection = "real_size" in config["branch1"]
    if detection and len(numbers) == 4 and not own_branch4:
        own = {k: config["branch4"][k] for k in ("real_size", "interaction_indexes")}
        config = {**config, "branch4": {**config["branch3"], **own}}
    branches = [_branch(config[f"branch{n}"], n, detection) for n in numbers]
    pyramid = {
        "branches": branches,
        "attention": config.get("interact_attn_type", "normal"),
        "num_heads": config.get("deform_num_heads", 6),
        "num_points": config.get("n_points", 4),
        "value_ratio": config.get("deform_ratio", 1.0),
        "cffn": config.get("with_cffn", False),
        "cffn_ratio": config.get("cffn_ratio", 0.25),
        "proj": config.get("interaction_proj", True),
        "norm": config.get("norm_layer") != "none",
        "drop_path_rate": config.get("interaction_drop_path_rate", 0.3),
        "grid_fit": "floor",
    }
    if detection:
        taps = None if config.get("with_simple_fpn", True) else list(config.get("out_interaction_indexes", []))
        levels = (1, 2, 3) if config.get("is_dino") else (0, 1, 2, 3)
        return {"pyramid": pyramid, "taps": taps, "out_indices": levels}
    separate = config.get("separate_head", False)
    classes = config.get("num_classes", 1000)
    if separate:  # official branches have heads of their own that do not ask the pyramid's num_classes
        classes = config["branch1"].get("num_classes", 1000)
    return {"pyramid": pyramid, "num_classes": classes, "separate_head": separate, "pool": "first_patch"}


def _branch(config: dict[str, Any], number: int, detection: bool) -> dict[str, Any]:
    kind = _kind(config, detection)
    intern = kind == "augreg"
    token = bool(config.get("use_cls_token", not detection)) and not (intern and detection)
    settings: dict[str, Any] = {
        "img_size": config.get("pretrain_img_size", 224) if detection else config["img_size"],
        "patch_size": config.get("patch_size", 14 if intern and detection else 16),
        "embed_dim": config.get("embed_dim", 3200 if intern else 768),
        "depth": config.get("depth", 48 if intern else 12),
        "num_heads": config.get("num_heads", 25 if intern else 12),
        "mlp_ratio": config.get("mlp_ratio", 4.0),
        "qkv_bias": config.get("qkv_bias", False),
        "init_values": config.get("init_values", 0.1 if detection else None) if intern else config.get("init_scale", 1e-4),
        "class_token": token,
        "no_embed_class": not (intern and token),
    }  # fmt: skip
    if not token:
        settings["global_pool"] = "avg"
    rms = intern and config.get("norm_layer_type", "RMSNorm" if detection else "ln") == "RMSNorm"
    if rms:
        settings["norm_layer"] = "rmsnorm"
    qk_norm = config.get("qk_normalization", detection) if intern else False
    return {
        "backbone": "timm:vit_base_patch16_224",
        "img_size": config["real_size"] if detection else config["img_size"],
        "interaction_indexes": config["interaction_indexes"],
        "settings": settings,
        "class_token": token,
        "window": _windows(config, settings["depth"]),
        "pad_keys": not intern and not config.get("use_flash_attn", False),
        "qk_norm": ("rms" if rms else "layer") if qk_norm else "",
        "official_positions": True,
        "drop_path_rate": config.get("drop_path_rate", 0.0),
    }


def _kind(config: dict[str, Any], detection: bool) -> str:
    if not detection:
        return str(config.get("model_type", "deit"))
    name = str(config.get("pretrained") or "")
    for foreign in ("beit", "perceiver", "convnext"):
        if foreign in name and "deit" not in name:
            raise InputError(f"A {foreign} branch ({name}) has another layout; build the pyramid with BranchConfig.")
    return "deit" if "deit" in name else "augreg"


def _windows(config: dict[str, Any], depth: int) -> int | list[int]:
    on, size = config.get("window_attn"), config.get("window_size", 14)
    if not on:
        return 0
    flags = on if isinstance(on, list) else [on] * depth
    sizes = size if isinstance(size, list) else [size] * depth
    return [s if flag and s > 0 else 0 for flag, s in zip(flags, sizes, strict=True)]
