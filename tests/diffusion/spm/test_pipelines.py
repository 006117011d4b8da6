"""Erasing from pipelines that tell their denoisers more than one embedding: sizes and pooled texts of SDXL, positions of Flux."""

from __future__ import annotations

from typing import Any

import denoisers
import pytest
import torch
from tiny_text import UNET, words_tokenizer

from mmkit.diffusion.spm import ConceptEraser, EraseConfig, erase
from mmkit.errors import InputError


def clip(kind: str) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=13, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=16,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def sdxl() -> Any:
    import diffusers

    size = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = {**UNET, "cross_attention_dim": 32, **size, "projection_class_embeddings_input_dim": 16 + 48}
    return diffusers.StableDiffusionXLPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2),
        text_encoder=clip("CLIPTextModel"), text_encoder_2=clip("CLIPTextModelWithProjection"),
        tokenizer=words_tokenizer(), tokenizer_2=words_tokenizer(),
        unet=diffusers.UNet2DConditionModel(**unet).eval(),
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )  # fmt: skip


def flux() -> Any:
    import diffusers
    from transformers import T5Config, T5EncoderModel

    t5 = T5Config(
        vocab_size=13, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2, is_encoder_decoder=False,
        use_cache=False, pad_token_id=1, eos_token_id=1,
    )  # fmt: skip
    settings = {**denoisers.SETTINGS["FluxTransformer2DModel"], "pooled_projection_dim": 16, "guidance_embeds": True}
    return diffusers.FluxPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=1, norm_num_groups=1),
        text_encoder=clip("CLIPTextModel"), tokenizer=words_tokenizer(),
        text_encoder_2=T5EncoderModel(t5).eval(), tokenizer_2=words_tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(**settings).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("make", [sdxl, flux])
def test_erasing_from_other_pipelines(make: Any) -> None:
    torch.manual_seed(0)
    draw = ConceptEraser(make(), matching="tokens")
    small = {"height": 16, "width": 16} if make is flux else {}
    config = EraseConfig(
        max_steps=2, rollin_steps=3, anchors=3, batch_size=2, lr=1e-2, warmup_steps=0, anchor_kind="released"
    )

    def drawn() -> torch.Tensor:
        options = {**small, "output_type": "latent"}
        return torch.stack(list(draw.run(["a cat", "snoopy"], [1, 2], 2, 3.0, options=options)))

    base = drawn()
    done = erase(draw, "snoopy", config=config, options=small, progress=False)
    erased = drawn()
    assert torch.equal(erased[0], base[0]), "the membrane stays shut for a prompt without its words"
    assert not torch.equal(erased[1], base[1])
    done.adapters["snoopy"].detach()
    if make is flux:
        with pytest.raises(InputError, match="cross-attention"):
            erase(draw, "snoopy", "uce", options=small)
        return
    edited = erase(draw, "snoopy", "uce", keep=["a dog"]).adapters["uce"]
    assert edited.config.rank == 1
    assert not torch.equal(drawn()[1], base[1])
