"""The distance-mask page without a browser: what it opens with."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("gradio")

from mmkit.apps import gmm
from mmkit.data.drawn.pictures import class_names, draw


def test_the_page_opens_on_a_picture_that_its_model_reads_right(monkeypatch) -> None:
    drawn: list[tuple[str, np.ndarray]] = []

    def remember(name, rng, size):
        picture = draw(name, rng, size)
        drawn.append((name, np.asarray(picture)))
        return picture

    monkeypatch.setattr(gmm, "draw", remember)
    tries = []
    for seed in range(6):
        drawn.clear()
        picture = gmm.first_picture(seed)
        (name,) = (n for n, pixels in drawn if np.array_equal(pixels, np.asarray(picture)))
        scores = gmm.explorer()(picture).predictions["trained"]
        assert max(scores, key=scores.get) == name in class_names()
        tries.append(len(drawn))
    assert max(tries) > 1  # it does misread some, and those are passed over


def test_this_picture_is_what_the_opening_page_asks_for() -> None:
    import gradio as gr

    with gr.Blocks() as page:
        gmm.build()
    loaded = [f.fn.__name__ for f in page.fns.values() if any(event == "load" for _, event in f.targets)]
    assert "first_picture" in loaded
    assert "draw_picture" not in loaded
