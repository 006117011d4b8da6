"""The parts of a diffusers pipeline that training needs, behind one interface for the architectures that differ in their calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.diffusion.objective import Objective
from mmkit.errors import InputError

Condition = dict[str, Tensor]

TRAINABLE = (
    "UNet2DConditionModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "DiTTransformer2DModel",
)
"""Classes of denoisers that `Denoiser` knows how to call."""


def denoiser_of(pipe: Any) -> nn.Module:
    """The network of a diffusers pipeline that removes noise."""
    model: nn.Module | None = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if model is None:
        raise InputError(f"{type(pipe).__name__} has neither a `transformer` nor a `unet`; give a diffusers pipeline.")
    return model


class Denoiser(nn.Module):
    """Calls the denoiser of a pipeline, encodes its captions and its pictures.

    Args:
        pipe: a diffusers pipeline with a denoiser of `TRAINABLE`; a pipeline without autoencoder works on pixels.

    Attributes:
        model: the denoiser, the only part that is a submodule and can be trained.
        objective: what it answers.
        size: side in pixels of the pictures it was made for.
    """

    model: Any
    pipe: Any

    def __init__(self, pipe: Any):
        super().__init__()
        self.model = denoiser_of(pipe)
        self.kind = type(self.model).__name__
        if self.kind not in TRAINABLE:
            raise InputError(f"{self.kind} cannot be trained here yet; {', '.join(TRAINABLE)} can.")
        self.__dict__["pipe"] = pipe  # no submodule: text encoder and autoencoder stay as they are
        self.objective = Objective.of(pipe.scheduler)
        self.size = int(self.model.config.sample_size * (pipe.vae_scale_factor if self._vae is not None else 1))

    @property
    def _vae(self) -> Any:
        return getattr(self.pipe, "vae", None)

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Latents of pictures (B, 3, H, W) in -1..1; the pictures themselves where there is no autoencoder."""
        if self._vae is None:
            return pictures
        out = self._vae.encode(pictures)
        latents = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        config = self._vae.config
        return (latents - (config.get("shift_factor") or 0.0)) * (config.get("scaling_factor") or 1.0)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[Any]) -> Condition:
        """What the denoiser is told: embeddings of sentences, or class numbers for DiT (-1 is the null class)."""
        pipe, texts = self.pipe, list(captions)
        if self.kind == "DiTTransformer2DModel":
            labels = torch.as_tensor([int(c) for c in texts])
            null = self.model.config.num_embeds_ada_norm
            return {"class_labels": torch.where(labels < 0, null, labels)}
        if self.kind == "UNet2DConditionModel":
            embeds, _ = pipe.encode_prompt(texts, pipe.device, 1, False)
            return {"encoder_hidden_states": embeds}
        if self.kind == "PixArtTransformer2DModel":
            length = min(pipe.tokenizer.model_max_length, 120)
            embeds, mask, *_ = pipe.encode_prompt(texts, False, max_sequence_length=length, clean_caption=False)
            return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
        embeds, _, pooled, _ = pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def empty_captions(self, count: int) -> list[Any]:
        """What stands for "no caption"."""
        return [-1 if self.kind == "DiTTransformer2DModel" else ""] * count

    def forward(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser's answer to noisy latents (B, C, h, w) at timesteps (B,), of the same shape."""
        extra = {}
        if self.kind == "PixArtTransformer2DModel":
            extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        if self.kind == "UNet2DConditionModel":
            answer: Tensor = self.model(noisy, t, **condition).sample
        else:
            answer = self.model(hidden_states=noisy, timestep=t, **condition, **extra).sample
        return answer[:, : noisy.shape[1]]  # DiT and PixArt may answer a variance too

    def loss(self, clean: Tensor, condition: Condition, noise: Tensor, t: Tensor) -> Tensor:
        """Weighted squared error per example (B,)."""
        answer = self(self.objective.noised(clean, noise, t), t, condition)
        error = (answer - self.objective.target(clean, noise, t)).square().flatten(1).mean(1)
        return error * self.objective.weight(t).to(error)
