"""Layout of the authors' checkpoints (MCG-NJU/ZeroI2V): keys, sizes, adapter names."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import Tensor

from mmkit.errors import CheckpointError, InputError
from mmkit.video.zeroi2v.adapter import resample_frames, warn_other_length

TEMPORAL = "backbone.temporal_embedding"


_ADAPTERS = {
    "T_Adapter_in": ("attn.qkv", "attn.in_proj"),
    "S_Adapter": ("attn.proj", "attn.out_proj"),
    "MLP_Adapter": ("mlp.fc1", "mlp.c_fc"),
    "MLP_Adapter_out": ("mlp.fc2", "mlp.c_proj"),
}


_TIMM_NAMES = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1": "patch_embed.proj",
    "ln_pre": "norm_pre",
    "ln_post": "norm",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "transformer.resblocks": "blocks",
}


def with_backbone_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of an official state dict whose network keys start with `backbone.`, also where a wrapper's name or nothing precedes them."""
    anchor = next((k for k in state if k.endswith("class_embedding")), "")
    prefix = anchor.removesuffix("class_embedding").removesuffix("backbone.")
    keys = ((k.removeprefix(prefix), v) for k, v in state.items())
    return {k if k.startswith(("backbone.", "cls_head.")) else f"backbone.{k}": v for k, v in keys}


def own_key(key: str, timm: bool) -> str:
    """One official key as this model writes it."""
    if key == TEMPORAL:
        return f"zeroi2v.{'norm_pre' if timm else 'ln_pre'}.temporal_embedding"
    block = "blocks" if timm else "transformer/resblocks"
    match = re.fullmatch(r"backbone\.transformer\.resblocks\.(\d+)\.(\w+)\.D_fc([12])\.(weight|bias)", key)
    if match and match[2] in _ADAPTERS:
        place = _ADAPTERS[match[2]][0 if timm else 1].replace(".", "/")
        return f"zeroi2v.{block}/{match[1]}/{place}.{'down' if match[3] == '1' else 'up'}.{match[4]}"
    key = key.replace("cls_head.fc_cls.", "head.")
    for theirs, ours in _TIMM_NAMES.items() if timm else ():
        key = key.replace(theirs, ours)
    return key


def own_state(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the authors' files (`backbone.transformer.resblocks...`, `cls_head.fc_cls...`) to those of `model`, a `VideoClassifier`.

    A file without a classifier keeps the head the model has; a temporal embedding for another clip length is interpolated.
    """
    state = with_backbone_prefix(state)
    if not model.merged and not any("D_fc" in k for k in state):
        raise CheckpointError(
            "The file is a merged checkpoint (no adapter keys) and this model has adapters: build it with "
            "zeroi2v_from_official, or with zeroi2v={'bottleneck_ratio': 0, 'train_norm': False, ...}."
        )
    timm = hasattr(model.backbone, "cls_token")
    table = state.get(TEMPORAL)
    if table is not None and model.adapter is not None and table.shape[1] != model.adapter.config.num_frames:
        warn_other_length(table.shape[1], model.adapter.config.num_frames)
        state[TEMPORAL] = resample_frames(table, model.adapter.config.num_frames)
    out = {own_key(key, timm): value for key, value in state.items()}
    for key in ("backbone.cls_token", "backbone.pos_embed"):
        if key in out:
            out[key] = out[key].reshape(1, -1, out[key].shape[-1])
    if not any(k.startswith("cls_head.") for k in state):
        out |= {f"head.{k}": v.detach() for k, v in model.head.state_dict().items()}
    for path in model.adapter.saved_paths if model.adapter is not None else ():
        out |= {
            f"zeroi2v.{path}.{k}": out[f"backbone.{path}.{k}"]
            for k in ("weight", "bias")
            if f"backbone.{path}.{k}" in out
        }
    return out


class Sizes(NamedTuple):
    """What an official file says about its network; `num_classes` is 0 without a classifier."""

    num_frames: int
    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    bottleneck_ratio: float
    mlp_out: bool
    merged: bool
    num_classes: int


def read_sizes(state: dict[str, Tensor], path: Any, num_heads: int | None = None) -> Sizes:
    """The sizes of the network behind a state dict from `with_backbone_prefix`; `num_heads` defaults to width / 64.

    Raises:
        CheckpointError: `path` has another layout.
        InputError: heads that do not divide the width.
    """
    try:
        frames = state[TEMPORAL].shape[1]
        width, _, patch, _ = state["backbone.conv1.weight"].shape
        tokens = state["backbone.positional_embedding"].shape[0] - 1
        mlp = state["backbone.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is not a ZeroI2V checkpoint: {error} is missing or misshapen.") from error
    heads = width // 64 if num_heads is None else num_heads
    if heads < 1 or width % heads:
        raise InputError(f"{path} has tokens of width {width}, which {heads} heads cannot divide; pass num_heads=.")
    down = next((v for k, v in state.items() if k.endswith("D_fc1.weight")), None)
    head = state.get("cls_head.fc_cls.weight")
    return Sizes(
        num_frames=frames,
        img_size=round(tokens**0.5) * patch,
        patch_size=patch,
        embed_dim=width,
        depth=1 + max(int(m[1]) for k in state if (m := re.search(r"resblocks\.(\d+)\.", k))),
        num_heads=heads,
        mlp_ratio=mlp,
        bottleneck_ratio=0.0 if down is None else (len(down) + 0.5) / width,
        mlp_out=any("MLP_Adapter_out" in k for k in state),
        merged=down is None,
        num_classes=0 if head is None else len(head),
    )


def clip_vit(
    library: str,
    img_size: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float = 4.0,
    quick_gelu: bool = True,
) -> tuple[str, dict[str, Any]]:
    """`create_backbone` name and keywords of a CLIP image tower with these sizes, from "timm" or "open_clip"."""
    if library == "timm":
        name = "vit_base_patch16_clip_quickgelu_224" if quick_gelu else "vit_base_patch16_clip_224"
        sizes = {
            "img_size": img_size,
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
        }
        return f"timm:{name}", {**sizes, "mlp_ratio": mlp_ratio}
    if library != "open_clip":
        raise InputError(f"library must be 'timm' or 'open_clip', not {library!r}.")
    vision = {
        "image_size": img_size,
        "patch_size": patch_size,
        "width": embed_dim,
        "layers": depth,
        "mlp_ratio": mlp_ratio,
    }
    name = "ViT-B-16-quickgelu" if quick_gelu else "ViT-B-16"
    return f"open_clip:{name}", {"vision_cfg": {**vision, "head_width": embed_dim // num_heads}}
