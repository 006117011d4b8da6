"""Drawn scenes and their captions."""

from __future__ import annotations

import pytest
import torch

from mmkit.data.drawn.scenes import ATTRIBUTES, WORDS, asked_scenes, caption, draw_scenes, random_scenes, read_caption
from mmkit.errors import InputError


def test_a_full_caption_says_what_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    scenes = random_scenes(200, generator)
    for i, text in enumerate(caption(scenes, generator, detail=1)):
        asked = read_caption(text)
        for name, words in ATTRIBUTES.items():
            if name != "position" or int(scenes.count[i]) == 0:
                assert asked[name] == words[int(getattr(scenes, name)[i])], text
        assert set(text.split()) <= set(WORDS)
        assert len(text.split()) <= 13


def test_shorter_captions_are_true_too() -> None:
    generator = torch.Generator().manual_seed(1)
    scenes = random_scenes(300, generator)
    texts = caption(scenes, generator, detail=0.3)
    for i, text in enumerate(texts):
        for name, word in read_caption(text).items():
            assert word == ATTRIBUTES[name][int(getattr(scenes, name)[i])], text
    assert any("shape" in t for t in texts)
    drawn = asked_scenes(texts, generator)
    assert all(
        read_caption(t).items() <= read_caption(f).items()
        for t, f in zip(texts, caption(drawn, detail=1), strict=True)
        if "shape" not in t and t.startswith(("a ", "t"))
    )


def test_pictures_repeat_by_seed_and_show_color_and_side() -> None:
    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        scenes = random_scenes(
            20, generator, color="red", background="black", count="one", position="left", texture="plain"
        )
        return draw_scenes(scenes, generator)

    pictures = draw()
    assert torch.equal(pictures, draw())
    assert pictures.shape == (20, 3, 32, 32)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    red = pictures[:, 0] - pictures[:, 2]
    assert (red[..., :16].sum((1, 2)) > red[..., 16:].sum((1, 2))).all()
    assert draw_scenes(random_scenes(2), size=64).shape == (2, 3, 64, 64)
    with pytest.raises(InputError, match="shape='heart'"):
        random_scenes(2, shape="heart")
