"""The prompts of `erasure.py`: of a concept, around it, and without it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmkit.data.drawn.scenes import COLORS, PLURALS, SHAPES, caption, random_scenes, read_caption
from mmkit.diffusion.spm import scene_attribute, scene_phrases

HELD_OUT = ("triangle", "purple", "dotted", "brown")
"""Never among the anchors."""


def few(prompts: Sequence[str], count: int) -> list[str]:
    """`count` of the prompts, spread over all of them, repeated where there are fewer."""
    return [prompts[i * len(prompts) // count] for i in range(count)]


def direct(word: str) -> list[str]:
    """Short prompts that name the concept."""
    made = {
        "shape": [f"a {c} {word}" for c in COLORS] * 4,
        "color": [f"a {word} {s}" for s in SHAPES] * 4,
        "texture": [f"a {c} {word} {s}" for c in COLORS for s in SHAPES[:4]],
        "background": [f"a {c} {s} on a {word} background" for c in COLORS for s in SHAPES[:4]],
    }
    return made[scene_attribute(word)]


def attacks(word: str) -> dict[str, list[str]]:
    """Prompts around the trained ones: paraphrases, compositions, and what leaves the attribute open."""
    phrasings = {
        "shape": [t for c in COLORS for t in (f"one {c} {word}", f"{c} {PLURALS.get(word)}")],
        "color": [t for s in SHAPES for t in (f"one {s} {word}", f"three {word} {PLURALS[s]}")],
        "texture": [t for s in SHAPES for t in (f"one {s} {word}", f"three {word} {PLURALS[s]}")],
        "background": [t for s in SHAPES for t in (f"on {word} a {s}", f"{word} background a {s}")],
    }
    name = scene_attribute(word)
    generator = torch.Generator().manual_seed(3)
    told = caption(random_scenes(400, generator, **{name: word}), generator, detail=0.8)
    rich = [t for t in told if read_caption(t).get(name) == word and len(read_caption(t)) >= 4]
    open_ = {
        "shape": [f"a {c} shape" for c in COLORS],
        "color": [f"a {s}" for s in SHAPES],
        "texture": direct_without_texture(),
        "background": [f"a {c} shape" for c in COLORS],
    }[name]
    return {"paraphrase": phrasings[name], "composition": few(rich, 24), "superclass": few(open_, 12)}


def direct_without_texture() -> list[str]:
    """Captions that leave the texture open."""
    return [f"a {c} {s}" for c, s in zip(COLORS, SHAPES, strict=True)]


def kept(words: Sequence[str]) -> dict[str, list[str]]:
    """Prompts without any of the words, by what they are beside them."""
    banned = {p for w in words for p in scene_phrases(w)}
    generator = torch.Generator().manual_seed(5)
    scenes = caption(random_scenes(1500, generator), generator, detail=0.7)
    far = {p for w in HELD_OUT for p in (w, PLURALS.get(w, w))}
    usable = [t for t in scenes if not banned & set(t.split()) and {"shape", "color"} <= read_caption(t).keys()]
    anchored = [t for t in usable if not far & set(t.split())]
    plain = [f"a {c} {s}" for c in COLORS for s in SHAPES if not (banned | far) & {c, s}]
    sets = {
        "another value": few(plain, 24),
        "number": few([t for t in anchored if read_caption(t).get("count") in ("two", "three")], 12),
        "place": few([t for t in anchored if read_caption(t).get("position", "centre") != "centre"], 12),
        "never anchored": few([t for t in usable if far & set(t.split())], 24),
    }
    return sets
