"""The click page without a browser: what is shown and saved belongs to one state of the session."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

from mmkit.apps import segment
from mmkit.backbones import load_weights
from mmkit.vision.clicks.pipeline import InteractiveSegmenter
from mmkit.vision.clicks.result import Mask


@pytest.fixture
def segmenter() -> InteractiveSegmenter:
    picture = np.full((60, 80, 3), 90, np.uint8)
    picture[20:40, 30:60] = (220, 40, 40)
    session = InteractiveSegmenter("random-walker")
    session.set_image(picture)
    session.add_click(40, 30)
    return session


@pytest.mark.parametrize("meanwhile", ["reset", "undo", "click"])
@pytest.mark.parametrize("scale", [1, 2])
def test_clicks_while_the_files_are_written_mix_nothing(segmenter, monkeypatch, meanwhile, scale):
    save, before = Mask.save, segmenter.mask

    def slow(mask, path):
        written = save(mask, path)
        {"reset": segmenter.reset, "undo": segmenter.undo, "click": lambda: segmenter.add_click(5, 5)}[meanwhile]()
        return written

    monkeypatch.setattr(Mask, "save", slow)
    original = segmenter.image.resize((80 * scale, 60 * scale))
    shown, png, record = segment.finish(segment.SESSIONS.add(segment.Photo(segmenter, original)))
    assert np.array_equal(np.asarray(shown), np.asarray(before.cutout()))
    expected = before if scale == 1 else before.resized(original)
    with Image.open(png.value["path"] if isinstance(png.value, dict) else png.value) as file:
        assert np.array_equal(np.asarray(file), np.asarray(expected.cutout()))
    with open(record.value["path"] if isinstance(record.value, dict) else record.value) as file:
        assert json.load(file) == json.loads(json.dumps(expected.record()))


def test_the_usual_model_comes_first() -> None:
    choices = segment.model_choices()
    assert choices[0] == InteractiveSegmenter.default_weights
    assert {"clicknet-permissive", "random-walker"} <= set(choices)


def test_only_a_measured_rating_is_shown() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8)
    texts = []
    for segmenter in (InteractiveSegmenter(device="cpu"), InteractiveSegmenter(load_weights("clicknet-photo"))):
        segmenter.set_image(picture)
        segmenter.add_click(50, 40)
        texts.append(segment.describe(segmenter, None))
    assert re.search(r"masks like this overlap \d+ % with what was meant, on average", texts[0])
    assert "overlap" not in texts[1]
    assert not any("rates" in text for text in texts)


def test_smaller_and_larger_go_through_the_masks_on_offer() -> None:
    rows, cols = np.indices((60, 80))
    away = np.hypot(cols - 40, rows - 30)
    session = InteractiveSegmenter(lambda image, points, labels: np.stack([6.0 - away, 12.0 - away, 20.0 - away]))
    session.set_image(np.full((60, 80, 3), 90, np.uint8))
    smallest = session.add_click(40, 30).binary.sum()
    key = segment.SESSIONS.add(segment.Photo(session, session.image))
    status = segment.on_history(key, 0.5, "larger")[1]
    assert session.mask.binary.sum() > smallest
    assert "1 click" in status
    segment.on_history(key, 0.5, "undo")
    assert session.mask.binary.sum() == smallest
