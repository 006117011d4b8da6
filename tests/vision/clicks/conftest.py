"""A session that needs no network."""

import numpy as np
import pytest

from mmkit.vision.clicks import InteractiveSegmenter


def disks(image, points, labels):
    """A disk of radius 6 around each positive click, removed around each negative one."""
    rows, cols = np.indices(image.shape[:2])
    inside = np.zeros(image.shape[:2], bool)
    for (x, y), label in zip(points, labels, strict=True):
        inside[(cols - x) ** 2 + (rows - y) ** 2 <= 36] = label == 1
    return np.where(inside, 5.0, -5.0)


@pytest.fixture
def session():
    segmenter = InteractiveSegmenter(disks)
    segmenter.set_image(np.full((40, 60, 3), 128, np.uint8))
    return segmenter
