"""Frame sampling: the published formulas, number by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmkit.errors import InputError
from mmkit.video import SSV2_FLIP_MAP, ClipTransform, DenseSampler, SegmentSampler, UniformSampler
from mmkit.video.samplers import window_starts
from mmkit.video.transforms import crops


def test_uniform_matches_the_reference_table() -> None:
    assert UniformSampler(8).sample(100).tolist() == [[6, 18, 31, 43, 56, 68, 80, 93]]
    two = UniformSampler(4, clips=2).sample(41)  # g = 10
    assert two.tolist() == [[3, 13, 23, 33], [6, 16, 26, 36]]


def test_dense_matches_the_reference_table() -> None:
    assert DenseSampler(8, 16, clips=3).sample(300)[:, 0].tolist() == [0, 94, 187]
    assert DenseSampler(8, 16).sample(50).tolist() == [[0, 16, 32, 48, 14, 30, 46, 12]]
    assert DenseSampler(8, 16, pad="repeat_last").sample(50).tolist() == [[0, 16, 32, 48, 49, 49, 49, 49]]
    assert DenseSampler(4, 2).sample(20).tolist() == [[6, 8, 10, 12]]
    assert DenseSampler(4, 2, target_fps=10).sample(100, fps=20).tolist() == [[43, 47, 51, 56]]


@pytest.mark.parametrize("n", [1, 2, 5, 7, 30, 100, 301])
def test_training_draws_stay_in_their_segments(n: int) -> None:
    for seed in range(150):
        rng = np.random.default_rng(seed)
        g = (n - 1) / 8
        uniform = UniformSampler(8).sample(n, train=True, rng=rng)[0]
        assert all(round(g * i) <= v <= round(g * (i + 1)) for i, v in enumerate(uniform))
        assert (np.diff(uniform) >= 0).all() or n < 9
        segment = SegmentSampler(8).sample(n, train=True, rng=rng)[0]
        assert all(n * i // 8 <= v <= max(n * (i + 1) // 8 - 1, n * i // 8) for i, v in enumerate(segment))
        for clips in (1, 3):
            dense = DenseSampler(4, 6, clips=clips).sample(n, train=True, rng=rng)
            assert dense.shape == (clips, 4)
            assert dense.min() >= 0
            assert dense.max() < n
            if n > 24:
                assert (np.diff(dense, axis=1) == 6).all()


def test_segment_middle_and_bad_input() -> None:
    assert SegmentSampler(4).sample(10).tolist() == [[1, 3, 6, 8]]
    for sampler in (UniformSampler(0), DenseSampler(8, 0), UniformSampler(8, clips=0)):
        with pytest.raises(InputError):
            sampler.sample(10)
    with pytest.raises(InputError):
        UniformSampler(8).sample(0)
    with pytest.raises(InputError):
        DenseSampler(8, 2, target_fps=5).sample(10)
    with pytest.raises(InputError):
        DenseSampler(8, 2, pad="wrap").sample(10)


def test_windows_cover_the_video() -> None:
    assert window_starts(10, 4).tolist() == [0, 4, 6]
    assert window_starts(8, 4).tolist() == [0, 4]
    assert window_starts(3, 4).tolist() == [0]
    assert window_starts(10, 4, 1).tolist() == [0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(InputError):
        window_starts(10, 0)


def test_three_crops_left_centre_right() -> None:
    wide = torch.arange(40.0).expand(2, 3, 10, 40)
    views = crops(wide, 10, 3)
    assert views.shape == (3, 2, 3, 10, 10)
    assert views[:, 0, 0, 0, 0].tolist() == [0, 15, 30]
    tall = wide.transpose(-1, -2)
    assert crops(tall, 10, 3)[:, 0, 0, 0, 0].tolist() == [0, 15, 30]
    assert torch.equal(crops(wide, 10)[0], views[1])
    with pytest.raises(InputError):
        crops(wide, 20, 1)


def test_flip_swaps_the_labels_that_name_a_direction() -> None:
    clip = torch.randint(0, 255, (4, 3, 40, 50), dtype=torch.uint8)
    always = ClipTransform(32, train=True, flip=1.0, flip_label_map=SSV2_FLIP_MAP)
    assert [always(clip, k)[1] for k in (86, 87, 93, 94, 166, 167, 5)] == [87, 86, 94, 93, 167, 166, 5]
    never = ClipTransform(32, train=True, flip=0.0, flip_label_map=SSV2_FLIP_MAP)
    assert never(clip, 86)[1] == 86


def test_transform_shapes_values_and_equal_draws_for_all_frames() -> None:
    frame = torch.randint(0, 255, (1, 3, 37, 61), dtype=torch.uint8)
    clip = frame.expand(5, 3, 37, 61)
    for transform in (
        ClipTransform(32, (0.5,) * 3, (0.5,) * 3, train=True, rand_augment=(4, 7), random_erasing=1.0),
        ClipTransform(32, (0.5,) * 3, (0.5,) * 3),
    ):
        out = transform(clip)[0]
        assert out.shape == (5, 3, 32, 32)
        assert out.dtype == torch.float32
        assert out.abs().max() <= 1
        if not transform.train:
            assert torch.equal(out, out[:1].expand_as(out))
    torch.manual_seed(3)
    out = ClipTransform(32, train=True, rand_augment=(2, 7))(clip)[0]
    assert torch.equal(out, out[:1].expand_as(out))
    assert ClipTransform(32, num_crops=3)(clip)[0].shape == (3, 5, 3, 32, 32)
