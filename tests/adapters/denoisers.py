"""Tiny denoisers of diffusers for the contract suite: how each is built and called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkit.backbones import create_backbone

SETTINGS: dict[str, dict[str, Any]] = {
    "DiTTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10,
    },
    "PixArtTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "sample_size": 8, "patch_size": 2, "cross_attention_dim": 16, "caption_channels": 12,
        "use_additional_conditions": False,
    },
    "SD3Transformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "sample_size": 8, "patch_size": 2, "joint_attention_dim": 12, "caption_projection_dim": 16,
        "pooled_projection_dim": 20, "pos_embed_max_size": 8,
    },
    "FluxTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
        "patch_size": 1, "joint_attention_dim": 12, "pooled_projection_dim": 20, "axes_dims_rope": (4, 4, 8),
    },
    "Flux2Transformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
        "patch_size": 1, "joint_attention_dim": 12, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4),
    },
    "QwenImageTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "out_channels": 4, "num_layers": 2,
        "patch_size": 2, "joint_attention_dim": 12, "axes_dims_rope": (8, 4, 4),
    },
    "ZImageTransformer2DModel": {
        "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32, "n_layers": 1, "n_heads": 2,
        "n_refiner_layers": 1, "n_kv_heads": 2, "cap_feat_dim": 12, "axes_dims": [8, 4, 4], "axes_lens": [64, 16, 16],
    },
    "SanaTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 1,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
        "caption_channels": 12, "sample_size": 8, "patch_size": 1,
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "num_layers": 1, "num_refiner_layers": 1,
        "num_attention_heads": 2, "num_kv_heads": 2, "multiple_of": 16, "axes_dim_rope": (8, 4, 4),
        "axes_lens": (64, 16, 16), "cap_feat_dim": 12,
    },
}  # fmt: skip
NAMES = {name.removesuffix("Transformer2DModel").lower(): name for name in SETTINGS}


def denoiser(family: str) -> nn.Module:
    """The tiny model of a family of `NAMES`; skips where the installed diffusers lacks it."""
    import diffusers
    import pytest

    name = NAMES[family]
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return create_backbone(f"diffusers:{name}", **SETTINGS[name])


def call_of(family: str, generator: torch.Generator) -> dict[str, Any]:
    """Keyword arguments of a call with two rows."""

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    t, text = torch.tensor([0.3, 0.7]), rand(2, 3, 12)
    picture: dict[str, Any] = {"hidden_states": rand(2, 4, 8, 8), "timestep": torch.tensor([3, 7])}
    tokens: dict[str, Any] = {"hidden_states": rand(2, 16, 4), "timestep": t, "encoder_hidden_states": text}
    calls: dict[str, dict[str, Any]] = {
        "dit": {**picture, "class_labels": torch.tensor([1, 10])},
        "pixart": {**picture, "encoder_hidden_states": text},
        "sd3": {**picture, "encoder_hidden_states": text, "pooled_projections": rand(2, 20)},
        "flux": {
            **tokens,
            "pooled_projections": rand(2, 20),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(3, 3),
        },
        "flux2": {
            **tokens,
            "guidance": torch.ones(2),
            "img_ids": torch.zeros(16, 4),
            "txt_ids": torch.zeros(3, 4),
        },
        "qwenimage": {
            **tokens,
            "hidden_states": rand(2, 16, 16),
            "encoder_hidden_states_mask": torch.ones(2, 3).long(),
            "img_shapes": [[(1, 4, 4)]] * 2,
        },
        "zimage": {"x": [rand(4, 1, 8, 8), rand(4, 1, 8, 8)], "t": t, "cap_feats": [rand(5, 12), rand(5, 12)]},
        "sana": {**picture, "encoder_hidden_states": text},
        "lumina2": {
            "hidden_states": rand(2, 4, 8, 8),
            "timestep": t,
            "encoder_hidden_states": text,
            "encoder_attention_mask": torch.ones(2, 3).bool(),
        },
    }
    return calls[family]
