"""Prompts with a concept in its place, checked against what the model's tokenizer knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmkit.diffusion.pipeline import TextToImagePipeline
from mmkit.diffusion.spm.adapter import phrases
from mmkit.errors import InputError, nearest


def concept_prompts(
    draw: TextToImagePipeline, concepts: Any, keep: Sequence[str] = (), templates: Sequence[str] = ("{}",)
) -> list[str]:
    """The concepts in all templates, checked; see `SPMTrainer`."""
    names = phrases(concepts)
    if isinstance(keep, str) or not all(isinstance(k, str) for k in keep):
        raise InputError(f"keep is a list of prompts, not {keep!r}.")
    kept = {k.strip().lower() for k in keep}
    if both := [n for n in names if n.lower() in kept]:
        raise InputError(f"{both} cannot be erased and kept at once.")
    if not templates or any("{}" not in t for t in templates):
        raise InputError(f"templates are prompts with {{}} in place of the concept, not {list(templates)!r}.")
    prompts = [filled(t, n) for n in names for t in templates]
    check_prompts(draw, [*prompts, *keep])
    return prompts


def filled(template: str, word: str) -> str:
    """The template with `word` in place of {}; without double spaces, where the word is none. Raises `InputError` for no text."""
    if not isinstance(word, str):
        raise InputError(f"What stands in place of a concept is text, such as 'a dog', or ''; not {word!r}.")
    return " ".join(template.replace("{}", word).split())


def check_prompts(draw: TextToImagePipeline, prompts: Sequence[str]) -> None:
    """Raise `InputError` for prompts with words the model does not know, or longer than its tokenizer takes."""
    tokenizer = getattr(draw.pipe, "tokenizer", None)
    longest = getattr(tokenizer, "model_max_length", 10**9)
    for prompt in prompts:
        if unknown := draw.unknown_words(prompt):
            words = [w for w in tokenizer.get_vocab() if w.isalpha()]  # type: ignore[union-attr]
            raise InputError(f"The model does not know {unknown} in {prompt!r}. {nearest(unknown[0], words)}")
        if tokenizer is not None and longest < 10**6 and (count := len(tokenizer(prompt).input_ids)) > longest:
            raise InputError(
                f"{prompt[:60]!r}... has {count} tokens and the model reads {longest}: the rest would be ignored."
            )
