"""Simulated clicks and their counts, against hand-counted cases."""

import numpy as np
import pytest
from scipy import ndimage

from mmkit.errors import InputError
from mmkit.vision.clicks.metrics import Click, iou, miou_at_k, next_click, noc, simulate_clicks


def test_the_evaluation_click_is_the_deepest_error():
    rng = np.random.default_rng(0)
    target = ndimage.binary_dilation(rng.random((30, 40)) > 0.98, iterations=4)
    prediction = ndimage.binary_dilation(rng.random((30, 40)) > 0.98, iterations=3)
    missed = ndimage.distance_transform_edt(np.pad(target & ~prediction, 1))[1:-1, 1:-1]
    extra = ndimage.distance_transform_edt(np.pad(prediction & ~target, 1))[1:-1, 1:-1]
    click = next_click(target, prediction)
    assert click.positive == (missed.max() > extra.max())
    deep = missed if click.positive else extra
    assert deep[click.y, click.x] == deep.max()
    assert (click.y, click.x) == tuple(np.argwhere(deep == deep.max())[0])
    assert next_click(target, target) is None
    other = next_click(target, prediction, [click])
    assert (other.x, other.y) != (click.x, click.y)
    with pytest.raises(InputError):
        next_click(target, prediction[:5])


def test_equal_errors_give_a_negative_click_and_ignored_pixels_none():
    target, prediction = np.zeros((9, 20), bool), np.zeros((9, 20), bool)
    target[2:7, 2:7] = True
    prediction[2:7, 12:17] = True
    assert next_click(target, prediction) == Click(14, 4, False)
    assert next_click(target, prediction, ignore=prediction) == Click(4, 4, True)


def test_number_of_clicks_of_known_predictors():
    target = np.zeros((20, 20), bool)
    target[5:15, 5:15] = True
    oracle = [simulate_clicks(lambda clicks: target, target)]
    assert noc(oracle, 0.9) == (1.0, 0)
    never = [simulate_clicks(lambda clicks: np.zeros_like(target), target)]
    assert noc(never, 0.5) == (20.0, 1)
    assert len(never[0]) == 20
    with pytest.raises(InputError):
        simulate_clicks(lambda clicks: target, np.zeros_like(target))
    with pytest.raises(InputError):
        noc([], 0.9)


def test_a_predictor_that_stamps_squares_needs_the_hand_counted_clicks():
    target = np.zeros((3, 12), bool)
    target[:, :9] = True

    def stamp(clicks):
        out = np.zeros_like(target)
        for click in clicks:
            out[:, max(0, click.x - 1) : click.x + 2] = click.positive
        return out

    # First click at (1, 1) (all interior points are 2 deep), then (4, 1), then (7, 1): a third more each time.
    scores = simulate_clicks(stamp, target, max_clicks=5)
    np.testing.assert_allclose(scores, [1 / 3, 2 / 3, 1, 1, 1])
    assert noc([scores], 0.6) == (2.0, 0)
    assert miou_at_k([scores, scores], 2) == pytest.approx(2 / 3)
    assert len(simulate_clicks(stamp, target, stop_at=0.5)) == 2


def test_iou_leaves_ignored_pixels_out():
    a, b = np.array([[1, 1, 0]], bool), np.array([[1, 0, 0]], bool)
    assert iou(a, b) == 0.5
    assert iou(a, b, ignore=np.array([[0, 1, 0]], bool)) == 1
    assert iou(~a & a, ~b & b) == 1
