"""Point operators: both backends against each other and against plain definitions, gradients, ties, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from mmkit.errors import InputError
from mmkit.ops.points import (
    ball_query,
    chamfer_distance,
    farthest_point_sample,
    gather_points,
    group_points,
    knn,
    knn_indices,
    three_interpolate,
)


def cloud(n: int, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, n, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_fps(points: np.ndarray, m: int, start: int = 0) -> list[int]:
    """The definition, one step at a time."""
    d, last, found = np.full(len(points), np.inf, np.float32), start, []
    for _ in range(m):
        found.append(last)
        e = (points - points[last]) ** 2
        d = np.minimum(d, (e[:, 0] + e[:, 1]) + e[:, 2])
        last = int(d.argmax())
    return found


@pytest.mark.parametrize(
    "n, m", [(50, 60), (700, 64), (6000, 200), (300_000, 9)]
)  # 6000: several leaves; 300,000: sorted by cells first
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_sampling_is_the_plain_algorithm_bit_by_bit(n, m, backend):
    x = cloud(n)
    x[:, n // 2 : n // 2 + 20] = x[:, :20]  # ties
    x[1] = (x[1] * 4).round() / 4  # many of them
    got = farthest_point_sample(x, m, torch.tensor([0, 7]), backend=backend)
    assert got.tolist() == [plain_fps(x[0].numpy(), m), plain_fps(x[1].numpy(), m, 7)]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_origin_and_masked_points_are_never_picked(backend):
    x = cloud(3000) * 0.2
    got = farthest_point_sample(x, 400, skip_origin=True, backend=backend)
    assert (gather_points(x, got).square().sum(-1)[:, 1:] > 1e-3).all()
    mask = torch.rand(2, 3000, generator=torch.Generator().manual_seed(1)) < 0.3
    got = farthest_point_sample(x, 100, mask=mask, backend=backend)
    assert mask.gather(1, got[:, 1:]).all()
    assert farthest_point_sample(x * 0, 5, skip_origin=True, backend=backend).tolist() == [[0] * 5] * 2


def test_sampling_does_not_know_the_order_of_the_points():
    x = cloud(500, 1)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(2))
    a = farthest_point_sample(x, 40, 3)[0]
    b = farthest_point_sample(x[:, order], 40, int((order == 3).nonzero()))[0]
    assert a.tolist() == order[b].tolist()


@pytest.mark.parametrize("n", [300, 5000])  # one leaf, several
def test_neighbours_agree_with_scipy_and_between_backends(n):
    x, q = cloud(n), cloud(70, seed=1)
    d, idx = knn(x, q, 9)
    for b in range(2):
        want_d, want = cKDTree(x[b].numpy()).query(q[b].numpy(), 9)
        assert np.array_equal(idx[b].numpy(), want)
        assert np.allclose(d[b].numpy(), want_d, atol=1e-5)
    assert torch.equal(idx, knn_indices(x, q, 9, backend="torch"))


def test_equally_far_neighbours_come_by_index_in_every_backend():
    x = cloud(40).repeat(1, 3, 1)
    for backend in ("cpu", "torch"):
        idx = knn_indices(x, x[:, :40], 3, backend=backend)
        assert torch.equal(idx[0, :, :3], torch.arange(40)[:, None] + torch.tensor([0, 40, 80]))
    x = (cloud(5000) * 2).round() / 2  # a few hundred places
    for k in (1, 30, 150):
        assert torch.equal(knn_indices(x, x[:, :40], k), knn_indices(x, x[:, :40], k, backend="torch"))
    big = cloud(300_000, 1)
    assert torch.equal(knn_indices(big, big[:, :3] + 9, 4), knn_indices(big, big[:, :3] + 9, 4, backend="torch"))


def test_threads_do_not_matter():
    x, q = cloud(1500), cloud(301, seed=1)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append((knn_indices(x, q, 7), farthest_point_sample(x, 50)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for f in found[1:] for a, b in zip(found[0], f, strict=True))


def test_balls_hold_the_first_points_inside_and_repeat_them():
    x = cloud(200)
    far = torch.full((2, 1, 3), 50.0)
    for backend in ("cpu", "torch"):
        idx = ball_query(x, torch.cat([x[:, :9], far], 1), 0.9, 6, backend=backend)
        assert (idx[:, -1] == 0).all()
        for q in range(9):
            inside = ((x[0] - x[0, q]).square().sum(-1) < 0.81).nonzero()[:6, 0].tolist()
            assert idx[0, q].tolist() == inside + [inside[0]] * (6 - len(inside))


def test_groups_lie_around_their_centres():
    x = cloud(300)
    groups = group_points(x, 20, 8)
    assert torch.allclose(groups.neighborhood + groups.center.unsqueeze(2), gather_points(x, groups.idx), atol=1e-6)
    assert torch.equal(groups.idx[..., 0], groups.center_idx)
    assert (groups.neighborhood[:, :, 0] == 0).all()


@pytest.mark.parametrize("k", [3, 20])
def test_interpolation_keeps_constants_and_known_points(k):
    x, s, f = cloud(50), cloud(20, seed=1), torch.randn(2, 20, 4)
    assert torch.allclose(three_interpolate(x, s, torch.ones(2, 20, 4), k), torch.ones(2, 50, 4), atol=1e-6)
    assert torch.allclose(three_interpolate(s, s, f, k), f, atol=1e-4)
    assert torch.isfinite(three_interpolate(s, s[:, :1].expand(-1, 20, -1), f, k)).all()


@pytest.mark.parametrize("n", [30, 700])
def test_chamfer_distances(n):
    x = cloud(n)
    t = torch.tensor([0.3, 0.0, 0.4])
    assert chamfer_distance(x, x).item() == 0
    assert chamfer_distance(x[:, :1], x[:, :1] + t).item() == pytest.approx(0.5)
    assert chamfer_distance(x[:, :1], x[:, :1] + t, "l1").item() == pytest.approx(0.5)
    y = cloud(n + 5, seed=3)
    for norm in ("l1", "l2"):
        a = chamfer_distance(x, y, norm, "none")
        assert torch.allclose(a, chamfer_distance(y, x, norm, "none"))
        assert torch.allclose(a, chamfer_distance(x, y, norm, "none", backend="torch"))
        assert torch.equal(a[1:], chamfer_distance(x[1:], y[1:], norm, "none"))  # the batch does not matter
    x.requires_grad_()
    chamfer_distance(x, x.detach(), "l1").backward()
    assert torch.isfinite(x.grad).all()


def test_gradients_in_double_precision():
    x, y, f = (cloud(n, 1, n, torch.float64).requires_grad_() for n in (7, 6, 6))
    assert torch.autograd.gradcheck(lambda a, b: knn(a, b, 3)[0], (x, y))
    assert torch.autograd.gradcheck(lambda a, b, c: three_interpolate(a, b, c, 3), (x, y, f))
    assert torch.autograd.gradcheck(lambda a, b, c: three_interpolate(a, b, c, 6), (x, y, f))
    for norm in ("l1", "l2"):
        assert torch.autograd.gradcheck(lambda a, b, norm=norm: chamfer_distance(a, b, norm), (x, y))
    assert torch.autograd.gradcheck(lambda a: group_points(a, 4, 3).neighborhood, (x,))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: farthest_point_sample(x[0], 3), "floating tensor"),
        (lambda x: farthest_point_sample(x[:, :0], 3), "empty"),
        (lambda x: farthest_point_sample(x * torch.nan, 3), "NaN"),
        (lambda x: farthest_point_sample(x, 3, 99), "start"),
        (lambda x: farthest_point_sample(x.double(), 3, backend="cpu"), "float32"),
        (lambda x: knn(x, x, 31), "k must"),
        (lambda x: knn(x, x[:1], 3), "do not fit"),
        (lambda x: ball_query(x, x, -1.0, 3), "radius"),
        (lambda x: chamfer_distance(x, x, "l3"), "norm"),
        (lambda x: three_interpolate(x, x, x[:, :4]), "features"),
        (lambda x: knn(x, x, 3, backend="gpu"), "unknown backend"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(InputError, match=message):
        call(cloud(30))


def test_half_precision_and_duplicates():
    x = cloud(64).half()
    assert group_points(x, 8, 4).neighborhood.dtype == torch.float32
    same = torch.ones(1, 9, 3)
    assert farthest_point_sample(same, 4).tolist() == [[0, 0, 0, 0]]
    assert knn_indices(same, same, 3)[0, 5].tolist() == [0, 1, 2]
