"""Prompts to erase by: templates in which a concept stands, and for the drawn world what is to be kept beside it.

An eraser learns from the prompts it sees. With the bare concept alone it misses longer ones, so that `expand_prompts` puts the concept into
common ones; keeping works best with prompts as various as those that will be drawn.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from mmkit.data.drawn.scenes import ATTRIBUTES, COLORS, PLURALS, SHAPES, caption, random_scenes
from mmkit.diffusion.spm.training import EraseConfig
from mmkit.diffusion.spm.uce import UCEConfig
from mmkit.errors import InputError, nearest

_KINDS = {
    "object": ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
    "art": ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
}


def expand_prompts(kind: str = "object") -> tuple[str, ...]:
    """Templates for `erase(templates=...)`: the concept alone and in five common prompts, as UCE has them, for "object" or "art"."""
    if kind not in _KINDS:
        raise InputError(f"kind is one of {', '.join(_KINDS)}, not {kind!r}.")
    return ("{}", *_KINDS[kind])


def scene_attribute(word: str) -> str:
    """The attribute of drawn scenes that `word` is a value of; shapes, colors, textures and backgrounds can be erased.

    Raises `InputError` for another word.
    """
    known = {w: name for name in ("shape", "color", "texture", "background") for w in ATTRIBUTES[name] if w != "plain"}
    if word not in known:
        raise InputError(f"The drawn world has no concept {word!r} to erase. {nearest(word, known)}")
    return known[word]


def scene_phrases(word: str) -> tuple[str, ...]:
    """The words of the drawn world for a concept: of shapes one and many."""
    return (word, PLURALS[word]) if scene_attribute(word) == "shape" else (word,)


def scene_surrogate(word: str) -> str:
    """What stands in a caption when the concept is not told: "shape" for shapes, nothing for others."""
    return "shape" if scene_attribute(word) == "shape" else ""


def scene_superclass(word: str) -> tuple[str, ...]:
    """Words that leave a concept of the drawn world open and bring it all the same: "a shape" is mostly a circle."""
    return ("shape", PLURALS["shape"]) if scene_attribute(word) == "shape" else ()


def scene_guidance(word: str) -> float:
    """How far to push away from a concept of the drawn world (`EraseConfig.guidance_scale`).

    The surrogate's answer holds the concept as often as the model draws it unasked, and with `s = p / (1 - p)` nothing of it is left. "A
    shape" is mostly a circle, but a square is red only once in six times; pushed too far, pictures fall apart.
    """
    return {"shape": 4.0, "texture": 1.0, "background": 0.8}.get(scene_attribute(word), 0.4)


def scene_templates(word: str, captions: int = 80, *, seed: int = 12) -> tuple[str, ...]:
    """Captions of the drawn world with {} in place of `word`: the shortest ones, and longer ones drawn at random."""
    name, things = scene_attribute(word), (*SHAPES, "shape")
    short = {
        "shape": ("{}", "a {}", "two {}", "three {}", *(f"a {c} {{}}" for c in COLORS)),
        "color": ("{}", *(f"a {{}} {s}" for s in things)),
        "texture": ("{}", *(f"a {{}} {s}" for s in things)),
        "background": tuple(f"a {s} on a {{}} background" for s in things),
    }[name]
    generator = torch.Generator().manual_seed(seed)
    told = caption(random_scenes(3 * captions, generator, **{name: word}), generator, detail=0.6)
    own = set(scene_phrases(word))
    long = (" ".join("{}" if w in own else w for w in text.split()) for text in told if own & set(text.split()))
    return tuple(dict.fromkeys((*short, *list(dict.fromkeys(long))[:captions])))


def scene_keep(
    words: Collection[str], count: int = 300, *, seed: int = 11, held_out: Collection[str] = ()
) -> list[str]:
    """Captions of the drawn world without any of `words`, in any number, for `erase(keep=...)`.

    Args:
        held_out: words that the captions shall lack as well, to see what becomes of concepts that nobody thought of keeping.
    """
    banned = set(held_out) | {p for word in words for p in scene_phrases(word)}
    banned |= {PLURALS[w] for w in held_out if w in PLURALS}
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, None] = {}
    for _ in range(20):
        told = caption(random_scenes(count, generator), generator)
        found |= dict.fromkeys(c for c in told if not banned & set(c.split()))
        if len(found) >= count:
            break
    return list(found)[:count]


def scene_recipe(word: str, method: str = "spm", *, held_out: Collection[str] = (), **settings: Any) -> dict[str, Any]:
    """What `erase` is to be given for a word of the drawn world: `erase(None, **scene_recipe("circle"))`.

    Args:
        method: see `erase`.
        held_out: see `scene_keep`.
        settings: of `EraseConfig`, instead of those found for the bundled model.
    """
    config: EraseConfig | UCEConfig = UCEConfig()
    templates, open_ = scene_templates(word), scene_superclass(word)
    if method == "uce":  # it edits the last word of a prompt
        templates, open_ = ("{}", *(t for t in templates if t != "{}" and t.endswith("{}"))), ()
    if method != "uce":
        esd = {"anchor_kind": "none", "lr": 1e-3, "max_steps": 60} if method == "esd" else {}
        own: dict[str, Any] = {"guidance_scale": scene_guidance(word)}
        own |= {"max_steps": 450} if open_ else {}  # two things to learn
        config = EraseConfig.small(**own | esd | settings)
    return {
        "concepts": {word: scene_phrases(word)}, "method": method, "surrogate": scene_surrogate(word), "superclass": open_,
        "config": config, "templates": templates,
        "keep": scene_keep([word], 40 if method == "uce" else 300, held_out=(*held_out, *open_[:1])),
    }  # fmt: skip
