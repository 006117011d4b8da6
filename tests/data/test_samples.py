"""Digits and procedural pictures."""

from __future__ import annotations

import numpy as np
import pytest

from mmkit.data import ImageTransform, ProceduralImages, array_dataset, load_digits, split_dataset
from mmkit.data.drawn.pictures import class_names, draw
from mmkit.errors import InputError


def test_digits():
    digits = load_digits()
    assert (len(digits), digits.class_names) == (1797, [str(d) for d in range(10)])
    image, label = digits[0]
    assert (image.size, image.mode, label) == ((32, 32), "RGB", 0)
    high = load_digits((9, 5), size=16)
    assert high.class_names == ["9", "5"]
    assert len(high) == 180 + 182
    assert set(high.labels) == {0, 1}
    train, val = split_dataset(digits.with_transform(ImageTransform(32)))
    assert len(train) + len(val) == 1797
    assert val[0][0].shape == (3, 32, 32)
    assert np.array_equal(val.images[3], digits.images[int(val.describe(3).rpartition("/")[2])])
    with pytest.raises(InputError, match="0 to 9"):
        load_digits((3, 3))


def test_array_dataset_checks():
    with pytest.raises(InputError, match="uint8"):
        array_dataset(np.zeros((2, 4, 4)), [0, 1], ["a", "b"])
    with pytest.raises(InputError, match="fit together"):
        array_dataset(np.zeros((2, 4, 4), np.uint8), [0, 2], ["a", "b"])


def test_procedural_is_deterministic_and_varied():
    data = ProceduralImages(200, size=24, seed=3)
    names = class_names()
    assert len(names) == len(set(names)) == 44
    first = [np.asarray(data[i][0]) for i in range(88)]
    assert all(f.shape == (24, 24, 3) and f.dtype == np.uint8 for f in first)
    assert np.array_equal(first[50], np.asarray(ProceduralImages(51, size=24, seed=3)[50][0]))
    assert not np.array_equal(first[0], first[44])  # same class, another picture
    assert not np.array_equal(first[0], np.asarray(ProceduralImages(1, size=24, seed=4)[0][0]))
    assert [data[i][1] for i in range(45)] == [*range(44), 0]
    assert all(f.std() > 4 for f in first)  # something is visible
    assert len(list(data)) == 200
    with pytest.raises(InputError, match="Unknown procedural class"):
        draw("teapot", np.random.default_rng(0))
    with pytest.raises(InputError):
        ProceduralImages(0)
