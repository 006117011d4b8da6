"""Checkpoints of the authors' five backbones (arXiv 2309.05375): their keys and layouts as ours."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

_BLOCK = (
    (r"\.0\.norm\.", ".norm1."),
    (r"\.0\.fn\.to_qkv\.", ".attn.qkv."),
    (r"\.0\.fn\.to_out\.0\.", ".attn.proj."),
    (r"\.0\.fn\.mask\.", ".attn.mask."),
    (r"\.1\.norm\.", ".norm2."),
    (r"\.1\.fn\.net\.0\.", ".mlp.fc1."),
    (r"\.1\.fn\.net\.3\.", ".mlp.fc2."),
    (r"^mlp_head\.0\.", "fc_norm."),
    (r"^mlp_head\.1\.", "head."),
    (r"^pos_embedding$", "pos_embed"),
)

_KEYS = {
    "GMMViT": (
        (r"^to_patch_embedding\.1\.", "patch_embed.proj."),
        (r"^transformer\.layers\.", "blocks."),
        *_BLOCK,
    ),
    "GMMCaiT": (
        (r"^to_patch_embedding\.1\.", "patch_embed.proj."),
        (r"^patch_transformer\.layers\.", "blocks."),
        (r"^cls_transformer\.layers\.", "cls_blocks."),
        (r"\.0\.scale$", ".gamma_1"),
        (r"\.1\.scale$", ".gamma_2"),
        (r"\.fn\.norm\.", ".norm."),
        (r"\.fn\.fn\.", ".fn."),
        (r"\.0\.fn\.to_q\.", ".attn.q."),
        (r"\.0\.fn\.to_kv\.", ".attn.kv."),
        (r"\.0\.fn\.mix_heads_(pre|post)_attn$", r".attn.mix_\1"),
        *_BLOCK,
    ),
    "GMMT2T": (
        (r"^tokens_to_token\.attention1\.", "token_blocks.0."),
        (r"^tokens_to_token\.attention2\.", "token_blocks.1."),
        (r"^tokens_to_token\.norm\.", "token_norm."),
        (r"^tokens_to_token\.project\.", "project."),
    ),
    "GMMPiT": (
        (r"^to_patch_embedding\.0\.", "patch_embed.proj."),
        (r"^layers\.(\d*[13579])\.downsample\.net\.0\.", r"stages.\1.depthwise."),
        (r"^layers\.(\d*[13579])\.downsample\.net\.1\.", r"stages.\1.pointwise."),
        (r"^layers\.(\d*[13579])\.cls_ff\.", r"stages.\1.cls_fc."),
        (r"^layers\.(\d+)\.layers\.", r"stages.\1."),
        *_BLOCK,
    ),
    "GMMSwin": (
        (r"^absolute_pos_embed$", "pos_embed"),
        (r"^layers\.", "stages."),
    ),
}
_DROPPED = re.compile(r"(.*\.)?(attn_mask|relative_position_index)")  # Swin's, computed again


def own_state(state: dict[str, Any], model: str, patch_size: int) -> dict[str, Any]:
    """The authors' state dict under our keys; their frozen base masks (4-D tensors called `mask`) are computed again, not loaded.

    Args:
        state: as read from the file.
        model: name of our class.
        patch_size: of the model.
    """
    out: dict[str, Any] = {}
    for key, value in state.items():
        if _DROPPED.fullmatch(key) or (re.fullmatch(r"(.*\.)?mask", key) and value.dim() == 4):
            continue
        name = re.sub(r"\.mask\.mask$", ".mask.weight", key)
        for pattern, replacement in _KEYS[model]:
            name = re.sub(pattern, replacement, name)
        if model == "GMMSwin":  # the official code merges patches at the end of a stage, timm at the next start
            name = re.sub(r"^stages\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", name)
        out[name] = _own_value(name, value, patch_size)
    return out


def _own_value(name: str, value: Tensor, patch_size: int) -> Tensor:
    """One tensor in our layout: patch embeddings that were linear layers become convolutions, CaiT's scales vectors."""
    if name == "patch_embed.proj.weight" and value.dim() == 2:
        return value.reshape(len(value), patch_size, patch_size, -1).permute(0, 3, 1, 2)
    return value.flatten() if name.endswith((".gamma_1", ".gamma_2")) else value
