"""Erasing from pipelines that tell their denoisers more than one embedding: sizes and pooled texts of SDXL, positions of Flux."""

from __future__ import annotations

from typing import Any

import denoisers
import pytest
import torch
from tiny_text import UNET, words_tokenizer

from mmkit.adapters import apply_adapter
from mmkit.diffusion import TextToImagePipeline
from mmkit.diffusion.spm import ConceptEraser, EraseConfig, UCEConfig, erase, text_projections, transport
from mmkit.diffusion.spm.calls import Calls
from mmkit.errors import InputError

SMALL = {"height": 16, "width": 16}


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


def sd3() -> Any:
    import diffusers
    from transformers import T5Config, T5EncoderModel

    t5 = T5Config(
        vocab_size=13, d_model=36, d_kv=4, d_ff=16, num_layers=1, num_heads=2, is_encoder_decoder=False,
        use_cache=False, pad_token_id=1, eos_token_id=1,
    )  # fmt: skip
    settings = {
        **denoisers.SETTINGS["SD3Transformer2DModel"],
        "joint_attention_dim": 36,
        "pooled_projection_dim": 32,
    }
    return diffusers.StableDiffusion3Pipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2),
        text_encoder=clip("CLIPTextModelWithProjection"), text_encoder_2=clip("CLIPTextModelWithProjection"),
        tokenizer=words_tokenizer(), tokenizer_2=words_tokenizer(),
        text_encoder_3=T5EncoderModel(t5).eval(), tokenizer_3=words_tokenizer(),
        transformer=diffusers.SD3Transformer2DModel(**settings).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("make", [sdxl, flux])
def test_erasing_from_other_pipelines(make: Any) -> None:
    torch.manual_seed(0)
    draw = ConceptEraser(make(), matching="tokens")
    small = SMALL if make is flux else {}
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
    edited = erase(draw, "snoopy", "uce", keep=["a dog"], options=small).adapters["uce"]
    assert edited.config.rank == 1
    assert not torch.equal(drawn()[1], base[1])


def test_closed_form_where_text_and_picture_share_their_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    strong = UCEConfig(lamb=1e-3, erase_scale=1e5)
    for make, rows in ((flux, {"context_embedder": [1]}), (sd3, {"context_embedder": [1, 9]})):
        draw = TextToImagePipeline(make())
        told = Calls(draw, SMALL).condition(["snoopy", "cat"])
        text, pooled = told["encoder_hidden_states"], told["pooled_projections"]
        before = {p: draw.denoiser.get_submodule(p) for p in text_projections(draw.denoiser)}
        assert {p.rpartition("time_text_embed.")[2] for p in before} == {"context_embedder", "text_embedder.linear_1"}
        want = {p: (m(pooled) if m.in_features == pooled.shape[1] else m(text))[1] for p, m in before.items()}
        erase(draw, "snoopy", "uce", surrogate="cat", config=strong, options=SMALL)
        for path, guide in want.items():
            module = draw.denoiser.get_submodule(path)
            if "linear_1" in path:
                torch.testing.assert_close(module(pooled)[0], guide, atol=1e-3, rtol=1e-3)
                continue
            for row in rows[path]:  # the word itself, of CLIP and of T5 where both are read
                torch.testing.assert_close(module(text)[0][row], guide[row], atol=1e-3, rtol=1e-3)
    monkeypatch.setattr("mmkit.diffusion.spm.closed_form.text_projections", lambda model, with_to_k: [])
    with pytest.raises(InputError, match="use 'spm' or 'esd'"):
        erase(draw, "snoopy", "uce", options=SMALL)


def test_a_block_of_modular_pipelines_opens_erasers_by_the_words() -> None:
    from diffusers import ClassifierFreeGuidance
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    torch.manual_seed(0)
    whole = sdxl()
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")

    def drawn(**settings: Any) -> torch.Tensor:
        blocks = StableDiffusionXLAutoBlocks()
        blocks.sub_blocks["denoise"] = transport(blocks.sub_blocks["denoise"], **settings)
        pipe = blocks.init_pipeline()
        pipe.update_components(
            **{n: getattr(whole, n) for n in parts}, guider=ClassifierFreeGuidance(3.0),
            image_processor=whole.image_processor, force_zeros_for_empty_prompt=True,
        )  # fmt: skip
        return pipe(
            prompt=["a cat", "snoopy"], num_inference_steps=2, height=16, width=16, num_images_per_prompt=2,
            generator=torch.Generator().manual_seed(1), output="latents",
        )  # fmt: skip

    base = drawn()
    adapter = apply_adapter(whole.unet, "spm", concepts=("snoopy",))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3)
    gated = drawn()
    assert torch.equal(gated[:2], base[:2]), "shut for a prompt without its words"
    opened = drawn(matching=1.0)
    torch.testing.assert_close(gated[2:], opened[2:])
    assert not torch.allclose(opened[:2], base[:2])
    for wrong in ({"matching": "clipcos"}, {"matching": float("nan")}, {"floor": 2.0}, {"floor": "a"}):
        with pytest.raises(InputError, match=r"lies in|number"):
            transport(None, **wrong)
    with pytest.raises(InputError, match="denoise is a block"):
        transport(None)
