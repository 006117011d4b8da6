"""UCE on a pipeline: what its projections read when they are told prompts, and the change that edits them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkit.diffusion.pipeline import TextToImagePipeline
from mmkit.diffusion.spm.calls import Calls
from mmkit.diffusion.spm.templates import check_prompts, filled
from mmkit.diffusion.spm.uce import Text, UCEConfig, cross_attention, factors, kept_rows, pair_of, text_projections
from mmkit.errors import InputError


def closed_form_edit(
    draw: TextToImagePipeline,
    concepts: Sequence[str],
    keep: Sequence[str],
    surrogate: str,
    templates: Sequence[str],
    config: UCEConfig | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The change of every projection, as `factors` of `mmkit.diffusion.spm.uce` gives it; see `erase`.

    Raises `InputError` for words the model does not know, and for a model whose text goes in elsewhere.
    """
    config = config or UCEConfig()
    check_prompts(draw, [surrogate] if surrogate else [])
    paths = text_projections(draw.denoiser, config.with_to_k)
    if not paths:
        raise InputError(
            f"UCE edits cross-attention, or the layers that take the text in of Flux and SD3, and {type(draw.denoiser).__name__} has "
            "neither; use 'spm' or 'esd'."
        )
    prompts = [(filled(t, c), filled(t, surrogate)) for c in concepts for t in templates]
    texts = list(dict.fromkeys([*(p for pair in prompts for p in pair), *keep]))
    inputs = _inputs(Calls(draw, options), paths, texts)
    pairs, kept, made = {}, {}, {}
    for path in paths:
        rows = inputs[path]
        key = rows.data_ptr()  # one text for all layers is one solve
        if key not in made:
            read = {text: _parts(draw, r, text) for text, r in zip(texts, rows, strict=True)}
            own = [pair_of(c, g, config) for a, b in prompts for c, g in zip(read[a], read[b], strict=True)]
            made[key] = own, kept_rows([part for k in keep for part in read[k]], config)
        pairs[path], kept[path] = made[key]
    return factors(draw.denoiser, pairs, kept, config)


def _parts(draw: TextToImagePipeline, rows: Tensor, text: str) -> list[Text]:
    """The rows (L, C) of a prompt, apart by the text encoder they come from: one for most, two for SD3; a pooled row (C) is a word."""
    if rows.dim() == 1:
        return [Text(rows[None], 2)]
    pipe = draw.pipe
    tokenizers = [t for name in ("tokenizer", "tokenizer_2", "tokenizer_3") if (t := getattr(pipe, name, None))]
    if cross_attention(draw.denoiser) or len(tokenizers) == 1:
        shares = [(rows, tokenizers[0])]
    elif len(tokenizers) == 3:  # SD3: the rows of CLIP, then those of T5
        first = pipe.tokenizer_max_length
        shares = [(rows[:first], tokenizers[0]), (rows[first:], tokenizers[2])]
    else:  # Flux: CLIP gives the pooled row, T5 these
        shares = [(rows, tokenizers[-1])]
    return [
        Text(own, len(tokenizer(text, truncation=True, max_length=len(own)).input_ids)) for own, tokenizer in shares
    ]


def _inputs(calls: Calls, paths: list[str], texts: list[str]) -> dict[str, Tensor]:
    """What the layers at `paths` read when the denoiser is told `texts`: (N, L, C), or (N, C) for pooled texts."""
    found: dict[str, Tensor] = {}

    def reader(path: str) -> Any:
        def look(module: Any, args: Any) -> None:
            found[path] = args[0]

        return calls.model.get_submodule(path).register_forward_pre_hook(look)

    latents, t = calls.rolled_in(texts, [0] * len(texts), steps=2, at=0, guidance=1.0)
    condition = calls.condition(texts)
    handles = [reader(path) for path in paths]
    try:
        with torch.no_grad():
            calls.answer(latents, t, condition)
    finally:
        for handle in handles:
            handle.remove()
    if unread := [p for p in paths if p not in found or len(found[p]) != len(texts)]:
        raise InputError(f"{unread[:3]} do not read one row per prompt, so that UCE cannot edit them.")
    return found
