"""A tiny Stable Diffusion pipeline with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_text import UNET, words_tokenizer


@pytest.fixture
def sd() -> Any:
    """Made anew for each test; a hundredth of a second."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=13, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=words_tokenizer(),
        unet=UNet2DConditionModel(**UNET).eval(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
