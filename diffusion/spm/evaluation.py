"""A quick look at what an eraser has done to the bundled model, by the judge of drawn scenes; `benchmarks/erasure.py` looks closer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmkit.data.drawn.scenes import read_caption
from mmkit.diffusion.pipeline import TextToImagePipeline
from mmkit.diffusion.spm.adapter import phrases
from mmkit.diffusion.spm.prompts import scene_attribute, scene_keep, scene_phrases, scene_templates


@dataclass(frozen=True)
class SceneRates:
    """Shares of pictures, 0..1, before and after erasing, from the same seeds.

    Attributes:
        drawn: pictures for prompts with the concept in which the judge sees it.
        kept: what prompts without the concept name and the judge sees.
    """

    drawn: tuple[float, float]
    kept: tuple[float, float]

    def __str__(self) -> str:
        return (
            f"drawn when asked for: {self.drawn[0]:.0%} before, {self.drawn[1]:.0%} after; "
            f"other prompts obeyed: {self.kept[0]:.0%} before, {self.kept[1]:.0%} after"
        )


def scene_rates(draw: TextToImagePipeline, word: str, *, pictures: int = 48, seed: int = 0) -> SceneRates:
    """Look at `word` of the drawn world, erased from the bundled model by all adapters on it, with as many pictures for either figure.

    Raises `InputError` for a word that cannot be erased there.
    """
    from mmkit.backbones import load_weights

    judge: Any = load_weights("scene_judge")
    name, (word,) = scene_attribute(word), phrases(word)
    short = [t.replace("{}", p) for p in scene_phrases(word) for t in scene_templates(word)]
    asked = [short[i * len(short) // pictures] for i in range(pictures)]
    others = scene_keep([word], pictures, seed=seed + 1000)

    def look(strengths: dict[str, float] | None) -> tuple[float, float]:
        made = draw(asked, seed=seed, batch_size=48, strengths=strengths).tensor()
        drawn = sum(seen[name] == word for seen in judge.read(made)) / len(asked)
        made = draw(others, seed=seed, batch_size=48, strengths=strengths).tensor()
        right = [
            seen[k] == v for seen, p in zip(judge.read(made), others, strict=True) for k, v in read_caption(p).items()
        ]
        return drawn, sum(right) / len(right)

    before, after = look({}), look(None)
    return SceneRates((before[0], after[0]), (before[1], after[1]))
