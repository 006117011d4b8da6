"""The bundled text-to-image model of the drawn world: how its parts are built, as an ordinary diffusers pipeline.

Everything is of diffusers and transformers: `PixArtAlphaPipeline` with a word-level tokenizer, a T5 encoder, a PixArt
transformer and a solver for rectified flow. There is no autoencoder: the transformer works on the pixels of pictures of 24 x 24, in
16 patches of 6 x 6. With diffusers alone:

    pipe = PixArtAlphaPipeline.from_pretrained(folder, vae=None)
    pixels = pipe("a red circle", guidance_scale=3.0, output_type="latent", use_resolution_binning=False).images
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkit.backbones.model import Model
from mmkit.data.drawn.scenes import WORDS
from mmkit.lazy import library

MAX_WORDS = 16

TEXT_ENCODER: dict[str, Any] = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 192,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 16,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 4,
    "sample_size": 24,
    "patch_size": 6,
    "in_channels": 3,
    "out_channels": 3,
    "cross_attention_dim": 128,
    "caption_channels": 64,
    "use_additional_conditions": False,
}
SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}


def word_tokenizer() -> Any:
    """A tokenizer of whole words of the drawn world; each caption ends with `</s>`, other words become `<unk>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocab = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return library("transformers").PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_WORDS,
    )


class ScenePainter(Model):
    """The two networks of the pipeline, which learn together: a text encoder and a transformer that answers the flow."""

    def __init__(self) -> None:
        super().__init__()
        diffusers, transformers = library("diffusers"), library("transformers")

        self.transformer: Any = diffusers.PixArtTransformer2DModel(**TRANSFORMER)
        self.text_encoder: Any = transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=len(word_tokenizer()), **TEXT_ENCODER)
        )

    def forward(self, noisy: Tensor, t: Tensor, words: Tensor) -> Tensor:
        """The answer (B, 3, H, W) to noisy pictures in -1..1 at timesteps (B,) for captions as word numbers (B, L)."""
        mask = (words != 0).long()
        text = self.text_encoder(words, attention_mask=mask)[0]
        sizes = {"resolution": None, "aspect_ratio": None}
        answer: Tensor = self.transformer(
            noisy, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=t, added_cond_kwargs=sizes
        ).sample
        return answer


def scene_painter() -> ScenePainter:
    """The networks of the text-to-image model of drawn scenes, with random weights."""
    return ScenePainter()


def scenes_pipeline(painter: ScenePainter | None = None) -> Any:
    """The diffusers pipeline around `painter`, by default one with random weights."""
    diffusers = library("diffusers")

    painter = painter or scene_painter()
    return diffusers.PixArtAlphaPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=painter.text_encoder,
        vae=None,
        transformer=painter.transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(**SCHEDULER),
    )
