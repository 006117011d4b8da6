"""SqueezeSAM's published files (yformer/EfficientSAM, `squeeze_sam/` at 3477a43): configuration and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mmkit.errors import CheckpointError, InputError

_OFFICIAL_NAMES = {
    "img_size": "encoder_image_size",
    "patch_size": "encoder_patch_size",
    "patch_embed_dim": "encoder_patch_embed_dim",
    "dims": "encoder_unet_conv_dims",
    "depth": "decoder_transformer_depth",
    "mlp_dim": "decoder_transformer_mlp_dim",
    "num_heads": "decoder_num_heads",
    "num_multimask_outputs": "num_multimask_outputs",
    "iou_head_depth": "iou_head_depth",
    "iou_head_hidden_dim": "iou_head_hidden_dim",
}


def config_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' constructor arguments as `SqueezeSAM` keywords, with their prompt reading.

    Raises `InputError` when one is missing; impossible values are refused by `SqueezeSAM`.
    """
    missing = {"normalization_type", "activation_fn", *_OFFICIAL_NAMES.values()} - set(config)
    if missing:
        raise InputError(f"The official configuration lacks {sorted(missing)}.")
    norm = {"sync_batch_norm": "batch_norm"}.get(config["normalization_type"], config["normalization_type"])
    return {
        **{ours: config[theirs] for ours, theirs in _OFFICIAL_NAMES.items()},
        "norm_layer": norm,
        "act_layer": str(config["activation_fn"]).rsplit(".", 1)[-1].strip("'>").lower(),
        "strict_official_prompts": True,
    }


def own_state(state: dict[str, Tensor], in_chans: int) -> dict[str, Tensor]:
    """A published state dict for a network with `in_chans` input channels: those the published code lacks get zero weights.

    Raises `CheckpointError` for a patch embedding of another width.
    """
    key = "patch_embed.proj.0.weight"
    weight = state.get(key)
    if weight is None or weight.ndim != 4 or weight.shape[1] >= in_chans:
        return state
    if weight.shape[1] != 5:
        raise CheckpointError(f"{key} has {weight.shape[1]} input channels; expected 5 or {in_chans}.")
    return {**state, key: F.pad(weight, (0, 0, 0, 0, 0, in_chans - 5))}
