"""A finer grid for a transformer that was trained on a coarse one: positions keep the range that it knows (arXiv 2304.06648, 3.3)."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmkit.adapters import attached_adapters
from mmkit.errors import InputError


def raise_resolution(model: nn.Module, size: int) -> nn.Module:
    """Let a diffusers transformer with sin-cos positions work on samples of `size` x `size`, in place; returns it.

    The patch at index i of the finer grid gets the position `i * old / size`, so that no position lies outside what pre-training saw,
    and training at the new size starts from pictures instead of noise. PixArt keeps this in its config. A saved DiT does not: call
    it again after loading.

    Args:
        model: `PixArtTransformer2DModel` or `DiTTransformer2DModel`, without adapters.
        size: in samples (pixels of the latents), a multiple of the patch size.

    Raises:
        InputError: another model, an attached adapter, or a size that does not fit.
    """
    from diffusers.models.embeddings import PatchEmbed

    embed: Any = getattr(model, "pos_embed", None)
    if not isinstance(embed, PatchEmbed) or embed.pos_embed_max_size or embed.pos_embed is None:
        raise InputError(
            f"{type(model).__name__} has no fixed sin-cos positions that could be spread: PixArt and DiT have."
        )
    if attached_adapters(model):
        raise InputError("Detach or merge the adapters first; load them again afterwards.")
    config: Any = model.config
    patch, old = embed.patch_size, config.sample_size
    if not isinstance(size, int) or size < patch or size % patch:
        raise InputError(f"size must be a multiple of the patch size {patch}, not {size!r}.")
    scale = embed.interpolation_scale * size / old
    weight = embed.proj.weight
    fresh = PatchEmbed(size, size, patch, weight.shape[1], weight.shape[0], interpolation_scale=scale)
    fresh.proj = embed.proj
    model.pos_embed = fresh.to(weight.device)
    kept = {"interpolation_scale": scale} if "interpolation_scale" in config else {}
    model.register_to_config(sample_size=size, **kept)  # type: ignore[operator]
    return model
