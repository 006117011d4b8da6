"""Facilitated transport in the modular pipelines of diffusers: their denoising, with every eraser as strong as a prompt asks for.

blocks = StableDiffusionXLAutoBlocks()
blocks.sub_blocks["denoise"] = transport(blocks.sub_blocks["denoise"])
pipe = blocks.init_pipeline(...)
erase(...)  # or load_adapter(pipe.unet, "snoopy/adapter")
pipe(prompt=["a photo of snoopy", "a dog"])

`ConceptEraser` does this for other pipelines, and compares embeddings, too; a block knows the prompts' words alone.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines import ModularPipelineBlocks, SequentialPipelineBlocks
from torch import Tensor

from mmkit.diffusion.spm.permeability import MATCHING, check_gates, gate, token_scores
from mmkit.diffusion.spm.pipeline import erasers_of, opened
from mmkit.errors import InputError


class TransportDenoise(SequentialPipelineBlocks):  # type: ignore[misc]
    """A block that denoises inside, with gates from the `prompt` of the pipeline's state; see `transport`."""

    matching: str | float = "tokens"
    floor: float = 0.0
    description = "Denoise with every concept eraser as strong as the prompt asks for."

    def __call__(self, pipeline: Any, state: Any) -> Any:
        """Run the blocks inside. Raises `InputError` when the pipeline was given embeddings instead of prompts."""
        model = next(m for n in ("unet", "transformer") if (m := getattr(pipeline, n, None)) is not None)
        prompts = state.get("prompt")
        if prompts is None and self.matching == "tokens" and erasers_of(model):
            raise InputError("Erasers open by the words of a prompt: give prompt=, or transport(..., matching=1.0).")
        texts = [prompts] if isinstance(prompts, str) else list(prompts or [""])
        gates = self._gates(pipeline.tokenizer, texts, model)
        each = int(state.get("num_images_per_prompt") or 1)
        with opened(model, {k: v.repeat_interleave(each) for k, v in gates.items()}, len(texts) * each):
            return super().__call__(pipeline, state)  # type: ignore[misc]

    def _gates(self, tokenizer: Any, prompts: list[str], model: Any) -> dict[str, Tensor]:
        """One value per prompt for each eraser."""
        if self.matching != "tokens":
            return {name: torch.full((len(prompts),), float(self.matching)) for name in erasers_of(model)}

        def ids(text: str) -> list[int]:
            return tokenizer(text, truncation=True).input_ids  # type: ignore[no-any-return]

        special, found = tokenizer.all_special_ids, {}
        for name, adapter in erasers_of(model).items():
            own = [ids(c) for c in adapter.config.concepts]
            found[name] = torch.tensor([gate(token_scores(ids(p), own, special), floor=self.floor) for p in prompts])
        return found


def transport(denoise: Any, *, matching: str | float = "tokens", floor: float = 0.0) -> TransportDenoise:
    """A block for the place of `denoise` in a modular pipeline.

    Args:
        denoise: the block that calls the denoiser.
        matching: "tokens", the share of a concept's words that stand in the prompt, or a number that holds for all prompts.
        floor: the least permeability, 0..1.

    Raises `InputError` for other values.
    """
    if isinstance(matching, str) and matching in MATCHING[:2]:
        raise InputError(f"A block goes by 'tokens' or a number, not {matching!r}; ConceptEraser compares embeddings.")
    check_gates(matching, floor, ("tokens",))
    if not isinstance(denoise, ModularPipelineBlocks):
        raise InputError(f"denoise is a block of a modular pipeline, not {type(denoise).__name__}.")
    block = TransportDenoise.from_blocks_dict({"denoise": denoise})
    block.matching, block.floor = matching, floor
    return block  # type: ignore[no-any-return]
