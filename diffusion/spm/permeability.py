"""Facilitated transport: how far the membranes of a concept open for a prompt. arXiv 2312.16145.

A membrane acts fully on prompts that name its concept and little on others. Two scores say how near a prompt is: the cosine of the text
encoder's outputs, flattened over the whole padded sequence, and the share of the concept's words that stand in the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkit.errors import InputError

MATCHING = ("clipcos+tokens", "clipcos", "tokens")


def check_gates(matching: object, floor: object, known: Collection[str] = MATCHING) -> None:
    """Raise `InputError` unless `matching` is one of `known` or a finite number, and `floor` a number in 0..1."""
    if not ((isinstance(matching, str) and matching in known) or _number(matching)):
        raise InputError(f"matching is one of {', '.join(known)}, or a number; not {matching!r}.")
    if not (_number(floor) and 0 <= floor <= 1):
        raise InputError(f"floor lies in 0..1, not {floor!r}.")


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def cosine_scores(prompt: Tensor, concepts: Tensor) -> Tensor:
    """Cosine of a prompt's embedding (L, C) with those of concepts (N, L, C), flattened: (N,)."""
    return F.cosine_similarity(prompt.float().reshape(1, -1), concepts.float().flatten(1), dim=1)


def token_scores(prompt: Sequence[int], concepts: Sequence[Sequence[int]], special: Collection[int]) -> Tensor:
    """Share of each concept's distinct tokens, special ones left out, that the prompt has, too: (N,). 0 for a concept without any."""
    there = set(prompt)
    own = [set(c) - set(special) for c in concepts]
    return torch.tensor([len(o & there) / len(o) if o else 0.0 for o in own])


def scores(cosine: Tensor, tokens: Tensor, matching: str = "clipcos+tokens") -> Tensor:
    """The score of each concept (N,) by the rule `matching`, one of `MATCHING`; an adapter's permeability is its largest."""
    if matching not in MATCHING:
        raise InputError(f"matching is one of {', '.join(MATCHING)}, or a number; not {matching!r}.")
    return {"clipcos": cosine, "tokens": tokens}.get(matching, torch.maximum(cosine, tokens))


def gate(score: Tensor, *, floor: float = 0.0, zero: float = 0.0) -> float:
    """The permeability that scores (N,) of one adapter's concepts give: the largest, `zero` taken off and at least `floor`.

    Args:
        floor: the least permeability, for concepts that must stay out whatever words a prompt uses.
        zero: the score that means "nothing in common", such as the empty prompt's; all prompts share padding, so that the cosine of
            unrelated ones is far above 0. The official code has 0.
    """
    value = float(score.max())
    if zero:
        value = (value - zero) / (1 - zero)
    return max(floor, min(max(value, 0.0), 1.0)) if zero or floor else value
