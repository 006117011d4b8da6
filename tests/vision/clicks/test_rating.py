"""The model's rating of its own mask is what was measured on held-out objects, or not shown."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mmkit.backbones import load_weights
from mmkit.errors import InputError
from mmkit.vision.clicks import ClickNetEngine, InteractiveSegmenter, Rating, calibration_error

RESULT = Path(__file__).parents[3] / "benchmarks/results/interactive_rating.json"


def picture() -> np.ndarray:
    from skimage.data import astronaut

    return np.ascontiguousarray(astronaut()[:160, 150:310])


def test_lines_per_click_put_an_estimate_right() -> None:
    rng = np.random.default_rng(0)
    clicks = np.repeat([1, 2, 3, 4, 6], 200)
    truth = rng.random(1000)
    estimates = np.where(clicks == 1, 0.5 + truth / 4, truth**0.5 - 0.1)
    rating = Rating.fit(estimates.tolist(), truth.tolist(), clicks.tolist())
    fixed = rating(torch.tensor(estimates)[:, None].float(), torch.tensor(clicks))[:, 0].tolist()
    first = slice(0, 200)
    assert fixed[first] == pytest.approx(truth[first].tolist(), abs=1e-3)
    assert calibration_error(fixed, truth.tolist()) < 0.3 * calibration_error(estimates.tolist(), truth.tolist())
    assert Rating.from_dict(json.loads(json.dumps(rating.to_dict()))) == rating
    assert rating(torch.tensor([[9.0], [-9.0]]), torch.tensor([1, 9])).tolist() == [[1.0], [0.0]]
    falling = Rating.fit([0.1, 0.9] * 4, [0.9, 0.1] * 4, [1, 1, 2, 2, 3, 3, 4, 4])
    assert falling.slope == (0.0,) * 4  # a better estimate never means a worse mask
    with pytest.raises(InputError, match="after 2 clicks"):
        Rating.fit([0.5], [0.5], [1])


def test_the_bundled_weights_are_put_right_and_say_nothing_where_nothing_was_measured() -> None:
    segmenter, plain = InteractiveSegmenter(device="cpu"), InteractiveSegmenter(load_weights("clicknet-photo"))
    assert segmenter.calibrated
    assert not plain.calibrated
    rating = segmenter.predictor.engine.rating
    for session in (segmenter, plain):
        session.set_image(picture())
    for count, (x, y) in enumerate([(75, 60), (60, 140)], 1):
        mask, own = segmenter.add_click(x, y), plain.add_click(x, y)
        assert np.array_equal(mask.logits, own.logits)
        assert mask.iou == pytest.approx(rating(torch.tensor([[own.iou]]), torch.tensor([count])).item(), abs=1e-6)
    assert segmenter.undo().iou == pytest.approx(
        rating(torch.tensor([[plain.undo().iou]]), torch.tensor([1])).item(), abs=1e-6
    )
    boxed = segmenter.set_box(20, 20, 130, 150)
    assert math.isnan(boxed.iou)
    assert boxed.record()["predicted_iou"] is None
    assert math.isnan(segmenter(picture(), points=[(75, 60), (60, 140)]).iou)
    assert math.isfinite(segmenter(picture(), points=[(75, 60)]).iou)
    assert not InteractiveSegmenter(ClickNetEngine(plain.model)).calibrated


def test_the_measured_error_on_held_out_objects_is_small_after_the_first_click() -> None:
    row = json.loads(RESULT.read_text())["rows"]["click 1"]
    assert row["masks"] >= 50
    assert row["its calibration error then"] <= 0.06 < row["its calibration error"]
