"""Drawn clips show the motion that their label says, whoever draws them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit.data.drawn.motion import MOTIONS, WHOLE, any_motion
from mmkit.data.drawn.sprites import CASES, motion_cases, sprite_clip
from mmkit.errors import InputError

WAYS = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)])


def drift(clip: np.ndarray) -> np.ndarray:
    """How the middle of what differs from the ground (the median over time) moves from the first to the last frame: x, y."""
    grey = clip.astype(float).mean(-1)
    ground = np.median(grey, 0)
    middles = []
    for frame in (grey[0], grey[-1]):
        weight = np.abs(frame - ground) * (np.abs(frame - ground) > 25)
        y, x = np.indices(frame.shape)
        middles.append([(weight * axis).sum() / max(weight.sum(), 1e-9) for axis in (x, y)])
    return np.subtract(*middles[::-1])


@pytest.mark.parametrize("ground", ["dark", "bright"])
def test_a_sprite_goes_where_its_label_says(ground):
    for number, label in enumerate(MOTIONS):
        way = drift(sprite_clip(label, ground, 40 + number, speed=(0.06, 0.06)))
        if label == "stands still":
            assert np.abs(way).max() < 2
        else:
            assert way @ WAYS[number] > 20
            assert way @ WAYS[number] > 3 * abs(way @ WAYS[number][::-1])


def test_sprites_are_dark_on_bright_and_the_reverse():
    for ground, darker in (("dark", False), ("bright", True)):
        clip = sprite_clip("moves left", ground, 3).astype(float).mean(-1)
        odd = np.abs(clip[0] - np.median(clip, 0)) > 25
        assert odd.any()
        assert (clip[0][odd].mean() < np.median(clip)) == darker


def test_sprite_clips_repeat_and_say_what_they_cannot_draw():
    assert np.array_equal(sprite_clip("moves up", "textured", 5), sprite_clip("moves up", "textured", 5))
    for wrong in (("moves on", "dark"), ("moves up", "green"), ("moves up", "photo"), (WHOLE, "dark")):
        with pytest.raises(InputError):
            sprite_clip(*wrong, 0)
    with pytest.raises(InputError, match="slow"):
        motion_cases("sideways", 1, ())


def test_cases_cover_every_class():
    photos = [Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))]
    labels = {label for name in CASES for _, label in motion_cases(name, len(MOTIONS), photos)}
    assert labels == set(range(len(MOTIONS) + 1))


def test_any_motion_draws_all_classes_within_range_and_repeats():
    photos = torch.rand(3, 3, 40, 40)
    clips, labels = any_motion(48, torch.Generator().manual_seed(0), photos, size=24, num_frames=6)
    again, _ = any_motion(48, torch.Generator().manual_seed(0), photos, size=24, num_frames=6)
    assert clips.shape == (48, 6, 3, 24, 24)
    assert torch.equal(clips, again)
    assert clips.min() >= 0
    assert clips.max() <= 1
    assert set(labels.tolist()) == set(range(len(MOTIONS) + 1))
    change = (clips[:, 1:] - clips[:, :-1]).abs().amax((1, 2))  # where anything changed at all
    share = (change > 0.12).float().mean((1, 2))
    whole, still = share[labels == len(MOTIONS)], share[labels == MOTIONS.index("stands still")]
    assert whole.median() > 4 * still.median()


def test_the_object_of_any_motion_goes_where_its_label_says():
    clips, labels = any_motion(300, torch.Generator().manual_seed(1), size=48)
    right = []
    for clip, label in zip(clips, labels.tolist(), strict=True):
        if label < 4:
            way = drift((255 * clip).permute(0, 2, 3, 1).numpy())
            right.append(way @ WAYS[label] > 0)
    assert np.mean(right) > 0.9
