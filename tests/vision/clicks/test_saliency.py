"""First clicks without a person: saliency, and the random walker that needs no network."""

import numpy as np
import pytest
from PIL import Image

from mmkit.errors import InputError
from mmkit.vision.clicks.metrics import iou
from mmkit.vision.clicks.pipeline import InteractiveSegmenter
from mmkit.vision.clicks.saliency import initial_prompt, saliency_map


def test_saliency_finds_the_odd_one_out():
    picture = np.full((60, 90, 3), (40, 120, 60), np.uint8)
    picture[15:45, 35:65] = (220, 60, 40)
    saliency = saliency_map(Image.fromarray(picture))
    prompt = initial_prompt(saliency, with_box=True)
    (x, y) = prompt.points[0]
    assert 35 <= x < 65
    assert 15 <= y < 45
    assert prompt.confidence > 0.5
    assert prompt.box[0] < 45 < prompt.box[2]


def test_nothing_salient_means_the_centre_with_no_confidence():
    prompt = initial_prompt(saliency_map(Image.new("RGB", (50, 30))))
    assert prompt.points == ((25, 15),)
    assert prompt.confidence == 0
    assert prompt.box is None
    with pytest.raises(InputError):
        initial_prompt(np.full((3, 3), np.nan))


def ball(color=(220, 60, 40)):
    rows, cols = np.indices((90, 120))
    target = (cols - 70) ** 2 + (rows - 40) ** 2 < 20**2
    picture = np.full((90, 120, 3), (40, 120, 60), np.uint8)
    picture[target] = color
    return picture, target


def test_the_random_walker_needs_no_network():
    picture, target = ball()
    segmenter = InteractiveSegmenter("random-walker")
    segmenter.set_image(picture)
    segmenter.propose()
    assert iou(segmenter.mask.binary, target) > 0.85
    segmenter.reset()
    assert iou(segmenter.add_click(70, 40).binary, target) > 0.85
    assert not segmenter.add_click(70, 30, positive=False).binary[30, 70]
    segmenter.reset()
    assert iou(segmenter.set_box(45, 15, 95, 65).binary, target) > 0.85
    segmenter.reset()
    assert not segmenter.add_click(3, 3, positive=False).binary.any()
