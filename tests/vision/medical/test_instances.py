"""Touching objects are parted, and how many were found is measured."""

from __future__ import annotations

import numpy as np
import pytest

from mmkit.errors import InputError
from mmkit.vision.medical import average_precision, split_touching


def disks(*middles: tuple[float, ...], radius: float = 9, side: int = 60) -> np.ndarray:
    """Numbers of balls (side, ...); each pixel belongs to the nearest middle."""
    points = np.stack(np.indices((side,) * len(middles[0])), -1)[..., None, :]
    far = np.linalg.norm(points - np.array(middles), axis=-1)
    return np.where(far.min(-1) < radius, far.argmin(-1) + 1, 0)


def test_touching_disks_are_parted_where_they_meet():
    truth = disks((15, 15), (15, 30), (40, 40), (26, 45))
    found = split_touching(truth > 0)
    assert found.dtype == np.int32
    assert found.max() == 4
    assert ((found > 0) == (truth > 0)).all()
    for number in range(1, 5):
        own = found == np.bincount(found[truth == number]).argmax()
        assert (own & (truth == number)).sum() / (own | (truth == number)).sum() > 0.9


def test_balls_crumbs_and_nothing():
    assert split_touching(disks((10, 10, 10), (10, 10, 24), radius=8, side=34) > 0).max() == 2
    mask = np.zeros((20, 20), bool)
    mask[3, 3:6] = True
    assert split_touching(mask).max() == 0
    assert split_touching(mask, min_pixels=2).max() == 1
    assert not split_touching(np.zeros((5, 5))).any()
    assert split_touching(np.ones((30, 30))).max() >= 1
    with pytest.raises(InputError, match="2 or 3 axes"):
        split_touching(np.zeros(4))


def test_average_precision_counts_found_missed_and_invented():
    truth = disks((15, 15), (15, 45), (45, 15))
    assert average_precision(truth, truth) == 1
    assert average_precision(truth * (truth != 2), truth) == pytest.approx(2 / 3)
    assert average_precision(truth, truth * (truth != 2)) == pytest.approx(2 / 3)
    assert average_precision((truth > 0).astype(int) * 5, truth) == 0  # three as one
    assert average_precision(truth, np.zeros_like(truth)) == 0
    empty = np.zeros((4, 4), int)
    assert average_precision(empty, empty) == 1
    eroded = disks((15, 15), radius=6.9)  # 0.59 of the disk
    assert average_precision(eroded, disks((15, 15))) == 1
    assert average_precision(eroded, disks((15, 15)), 0.7) == 0
    with pytest.raises(InputError, match="equal"):
        average_precision(empty, truth)
    with pytest.raises(InputError, match="overlap"):
        average_precision(empty, empty, 0.4)
