"""Poses, trajectories' errors, labels' scores, keyframes: known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from skimage.metrics import structural_similarity

from mmkit.errors import InputError
from mmkit.pointcloud.slam import RGBDFrame, ate_rmse, depth_l1, miou, rpe
from mmkit.pointcloud.slam.depths import scale_and_shift
from mmkit.pointcloud.slam.keyframes import Keyframe, KeyframeSelector, border_of
from mmkit.pointcloud.slam.loops import optimise
from mmkit.pointcloud.slam.losses import densify_mask, silhouette_mask
from mmkit.pointcloud.slam.metrics import ssim
from mmkit.pointcloud.slam.poses import angle, constant_velocity, inverse, matrix, rigid, rotation_matrix, split


def path(n: int = 12, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    out = torch.eye(4, dtype=torch.float64).repeat(n, 1, 1)
    out[:, :3, :3] = torch.from_numpy(Rotation.from_rotvec(np.cumsum(rng.normal(0, 0.1, (n, 3)), 0)).as_matrix())
    out[:, :3, 3] = torch.from_numpy(np.cumsum(rng.normal(0, 0.2, (n, 3)), 0))
    return out


def test_a_quaternion_of_any_length_is_a_rotation():
    q = torch.tensor([0.5, -0.2, 0.7, 0.1], dtype=torch.float64)
    want = torch.from_numpy(Rotation.from_quat(q.numpy(), scalar_first=True).as_matrix())
    assert torch.allclose(rotation_matrix(q), want)
    assert torch.allclose(rotation_matrix(-7 * q), want)
    pose = matrix(q, torch.tensor([1.0, 2, 3], dtype=torch.float64))
    assert torch.allclose(matrix(*split(pose)), pose)
    assert torch.allclose(inverse(pose) @ pose, torch.eye(4, dtype=torch.float64), atol=1e-12)
    assert angle(
        torch.eye(4),
        torch.from_numpy(np.block([[Rotation.from_rotvec([0, 0.3, 0]).as_matrix(), np.zeros((3, 1))], [np.eye(4)[3]]])),
    ) == (pytest.approx(math.degrees(0.3)))


def test_velocity_goes_on_after_a_change_of_sign():
    turn = [torch.from_numpy(Rotation.from_rotvec([0, a, 0]).as_quat(scalar_first=True)) for a in (0.1, 0.2, 0.3)]
    zero = torch.zeros(3, dtype=torch.float64)
    for sign in (1, -1):
        q, t = constant_velocity(turn[1], zero + 2, sign * turn[0], zero + 1)
        assert torch.allclose(rotation_matrix(q), rotation_matrix(turn[2]), atol=1e-3)
        assert t.tolist() == [3, 3, 3]
    wild, _ = constant_velocity(turn[1], zero, -turn[0], zero, align_signs=False)  # the official code
    assert (rotation_matrix(wild) - rotation_matrix(turn[2])).abs().max() > 0.05


def test_poses_that_are_none_are_refused():
    with pytest.raises(InputError, match="finite"):
        rigid(torch.full((4, 4), math.inf))
    with pytest.raises(InputError, match="no rotation"):
        rigid(2 * torch.eye(4))


def test_ate_knows_no_rigid_motion_and_scale_when_asked():
    truth = path()
    move = path(3, 5)[2]
    assert ate_rmse(truth, truth) < 1e-9
    assert ate_rmse(move @ truth, truth) < 1e-6
    assert ate_rmse(move @ truth, truth, aligned=False) > 0.1
    doubled = truth.clone()
    doubled[:, :3, 3] *= 2
    assert ate_rmse(doubled, truth) > 0.05
    assert ate_rmse(doubled, truth, with_scale=True) < 1e-9
    bent = truth.clone()
    bent[:, 0, 3] += torch.tensor([1.0, -1.0] * 6, dtype=torch.float64)
    assert ate_rmse(bent, truth, aligned=False) == pytest.approx(1)
    lost = truth.clone()
    lost[3] = math.nan
    assert ate_rmse(truth, lost) < 1e-9
    with pytest.raises(InputError, match=r"\(F, 4, 4\)"):
        ate_rmse(truth, truth[:3])
    with pytest.raises(InputError, match="No frame"):
        ate_rmse(truth, torch.full_like(truth, math.nan))


def test_relative_error_is_of_the_steps():
    truth = path()
    drift = truth.clone()
    drift[:, 0, 3] += 0.01 * torch.arange(12)
    assert rpe(drift, truth)["translation"] == pytest.approx(0.01, abs=1e-6)
    assert rpe(drift, truth, 3)["translation"] == pytest.approx(0.03, abs=1e-6)
    assert rpe(drift, truth)["rotation"] < 1e-6
    with pytest.raises(InputError, match="delta"):
        rpe(truth, truth, 12)


def test_ssim_is_that_of_scikit_image():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(40, 50, 3, generator=g)
    b = (a + 0.1 * torch.randn(40, 50, 3, generator=g)).clamp(0, 1)
    _, full = structural_similarity(
        a.numpy(),
        b.numpy(),
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        win_size=11,
        use_sample_covariance=False,
        data_range=1,
        full=True,
    )
    assert ssim(a[5:-5, 5:-5], b[5:-5, 5:-5]) == pytest.approx(
        float(full[5:-5, 5:-5].mean()), abs=0.03
    )  # borders are zeros here
    assert ssim(a, a) == pytest.approx(1, abs=1e-6)


def test_miou_in_three_protocols():
    truth = [torch.tensor([[0, 0, 1, 1]]), torch.tensor([[2, 2, -1, 0]])]
    said = [torch.tensor([[0, 0, 1, 0]]), torch.tensor([[2, 1, 1, 0]])]
    # over all: class 0: 3/4, class 1: 1/3, class 2: 1/2
    assert miou(said, truth, 3) == pytest.approx((3 / 4 + 1 / 3 + 1 / 2) / 3)
    # frame 1: 2/3, 1/2; frame 2: 1, 0 (said, not there), 1/2
    assert miou(said, truth, 3, mode="per_frame") == pytest.approx(((2 / 3 + 1 / 2) / 2 + (1 + 0 + 1 / 2) / 3) / 2)
    scores = [torch.nn.functional.one_hot(s, 3).float() for s in said]
    scores[1][0, 1] = torch.tensor([0.1, 5.0, 0.2])  # class 1 is not in that frame: 2 is next
    assert miou(said, truth, 3, mode="visible_subset", scores=scores) == pytest.approx(((2 / 3 + 1 / 2) / 2 + 1) / 2)
    assert math.isnan(miou(said[:1], [torch.full((1, 4), -1)], 3))
    with pytest.raises(InputError, match="mode"):
        miou(said, truth, 3, mode="best")
    with pytest.raises(InputError, match="cannot be compared"):
        miou(said, truth[:1], 3)


def test_depths_count_where_they_are_known():
    assert depth_l1(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.5, 2.0, 0.0])) == pytest.approx(0.25)
    assert math.isnan(depth_l1(torch.ones(2), torch.zeros(2)))


def test_masks_of_tracking_and_growing():
    depth = torch.tensor([[1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    alpha = torch.tensor([[1.0, 1.0, 0.2, 1.0, 1.0, 1.0, 1.0]])
    seen = torch.tensor([[1.001, 1.0, 0.2, 1.001, 1.001, 1.001, 2.0]])
    assert densify_mask(alpha, seen, depth).tolist() == [[False, False, True, False, False, False, True]]
    assert silhouette_mask(torch.full_like(seen, math.nan), depth, alpha).sum() == 0
    assert silhouette_mask(seen, depth, alpha).tolist() == [[True, False, False, True, True, True, True]]


def test_keyframes_are_chosen_by_what_they_see():
    K = torch.tensor([[100.0, 0, 80], [0, 100, 60], [0, 0, 1]])
    depth = torch.full((120, 160), 2.0)
    frame = RGBDFrame(torch.zeros(120, 160, 3, dtype=torch.uint8), depth, K)
    back = torch.eye(4)
    back[0, 0] = back[2, 2] = -1
    here, behind = Keyframe(0, frame, torch.eye(4)), Keyframe(1, frame, back)
    selector = KeyframeSelector(4, torch.Generator().manual_seed(0))
    assert border_of(160, 120) == 15
    assert border_of(640, 480) == 20
    same, opposite = selector.overlap(frame, torch.eye(4), [here, behind])
    assert same == pytest.approx(130 * 90 / (160 * 120), abs=0.04)
    assert opposite == 0
    frames = [here, behind, here, here, here, behind]
    for _ in range(5):
        chosen = selector.choose(frame, torch.eye(4), frames)
        assert chosen[-1] == 5
        assert 1 not in chosen
        assert len(chosen) == 3
    empty = RGBDFrame(frame.color, torch.zeros(120, 160), K)
    assert selector.choose(empty, torch.eye(4), frames) == [5]


def test_a_loop_spreads_drift_over_the_path():
    n = 24
    true = torch.eye(4, dtype=torch.float64).repeat(n, 1, 1)
    turns = np.linspace(0, 2 * np.pi, n)
    true[:, :3, :3] = torch.from_numpy(Rotation.from_rotvec(np.outer(turns, [0, 1, 0])).as_matrix())
    true[:, :3, 3] = torch.from_numpy(np.stack([np.cos(turns), 0 * turns, np.sin(turns)], 1))
    true = inverse(true[:1]) @ true
    slip = torch.from_numpy(
        np.block([[Rotation.from_rotvec([0, 0.004, 0]).as_matrix(), np.array([[0.01], [0.002], [0]])], [np.eye(4)[3]]])
    )
    drifted = [true[0]]
    for i in range(1, n):
        drifted.append(drifted[-1] @ inverse(true[i - 1]) @ true[i] @ slip)
    drifted = torch.stack(drifted)
    closed = optimise(drifted, [(0, n - 1, inverse(true[0]) @ true[n - 1])])
    assert torch.equal(closed[0], drifted[0])
    assert (closed[-1] - true[-1]).abs().max() < 0.02
    assert ate_rmse(closed, true, aligned=False) < 0.7 * ate_rmse(drifted, true, aligned=False)


def test_scale_and_shift_are_found_in_spite_of_wrong_pixels():
    g = torch.Generator().manual_seed(0)
    depth = 1 + 2 * torch.rand(40, 40, generator=g)
    reference = 1.7 * depth + 0.3
    reference[:8] += 3
    known = torch.ones(40, 40, dtype=torch.bool)
    assert scale_and_shift(depth, reference, known) == (pytest.approx(1.7, abs=1e-3), pytest.approx(0.3, abs=2e-3))
    assert scale_and_shift(torch.full((40, 40), 2.0), torch.full((40, 40), 3.0), known) == (pytest.approx(1.5), 0.0)
    assert scale_and_shift(depth, reference, ~known) == (1.0, 0.0)
