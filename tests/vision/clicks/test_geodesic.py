"""Geodesic distances against Dijkstra on the same graph, and what the click channels say."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra

from mmkit.vision.clicks.geodesic import FAR, click_maps, geodesic_distance
from mmkit.vision.clicks.model import SqueezeSAM


def by_dijkstra(pixels: np.ndarray, seeds: np.ndarray, ground: float) -> np.ndarray:
    """Shortest paths on the grid graph of one picture `(C, H, W)`."""
    h, w = seeds.shape
    index = np.arange(h * w).reshape(h, w)
    across = np.abs(np.diff(pixels, axis=2)).mean(0)
    down = np.abs(np.diff(pixels, axis=1)).mean(0)
    mean = np.concatenate([across.ravel(), down.ravel()]).mean()
    a = np.concatenate([index[:, :-1].ravel(), index[:-1].ravel()])
    b = np.concatenate([index[:, 1:].ravel(), index[1:].ravel()])
    cost = np.concatenate([across.ravel(), down.ravel()]) / mean + ground
    graph = coo_matrix((np.r_[cost, cost], (np.r_[a, b], np.r_[b, a])), shape=(h * w, h * w)).tocsr()
    return dijkstra(graph, indices=index[seeds]).min(0).reshape(h, w)


def test_equals_dijkstra_on_rough_ground_once_the_sweeps_suffice() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 13, 17, generator=generator)
    seeds = torch.rand(2, 2, 13, 17, generator=generator) < 0.02
    seeds[:, :, 4, 5] = True
    found = geodesic_distance(pixels, seeds, ground=0.3, sweeps=12)
    for n in range(2):
        for q in range(2):
            expected = by_dijkstra(pixels[n].numpy(), seeds[n, q].numpy(), 0.3)
            np.testing.assert_allclose(found[n, q].numpy(), expected, atol=2e-2)  # float32 sums along whole rows


def test_no_seed_is_far_and_a_wall_is_walked_around() -> None:
    pixels = torch.zeros(1, 1, 9, 9)
    pixels[0, 0, :6, 4] = 1.0  # a wall with an opening at the bottom
    seeds = torch.zeros(1, 2, 9, 9, dtype=torch.bool)
    seeds[0, 0, 2, 2] = True
    near, none = geodesic_distance(pixels, seeds)[0]
    assert (none >= FAR).all()
    assert near[2, 2] == 0
    assert near[2, 3] < near[2, 5]
    assert abs(float(near[2, 6]) - 0.2 * (4 + 4 + 4)) < 1e-2  # down four, across four, up four: cheaper than through


def test_channels_prefer_the_clicked_side_of_an_edge() -> None:
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[..., 8:] = 1.0
    positive, negative = torch.zeros(2, 1, 1, 16, 16, dtype=torch.bool)
    positive[0, 0, 8, 4] = True
    to_positive, to_negative, verdict = click_maps(pixels, positive, negative)[0, 0]
    assert to_positive.max() == 1
    assert to_negative.max() == 0
    assert verdict[8, 4] > 0.3
    assert verdict[8, 12] < 0
    negative[0, 0, 8, 5] = True
    assert click_maps(pixels, positive, negative)[0, 0, 2, 8, 6] < 0 < verdict[8, 6]
    assert (click_maps(pixels, torch.zeros_like(positive), negative)[0, 0, 2] == 0).all()


def test_geodesic_channels_change_nothing_until_trained_and_stay_out_of_the_padding() -> None:
    settings = {"img_size": 32, "dims": (8, 16), "patch_embed_dim": 8, "mlp_dim": 16, "num_heads": 2}
    torch.manual_seed(0)
    plain = SqueezeSAM(**settings, keep_aspect=True).eval()
    more = SqueezeSAM(**settings, keep_aspect=True, negative_clicks=True, geodesic=True).eval()
    more.load_state_dict(more.official_state(plain.state_dict()))
    image, points = torch.rand(1, 3, 20, 40), torch.tensor([[[[20.0, 10.0], [3.0, 4.0]]]])
    labels = torch.tensor([[[1, 0]]])
    for mine, theirs in zip(
        more(image, points, labels), plain(image, points, labels.masked_fill(labels == 0, -1)), strict=True
    ):
        assert torch.equal(mine, theirs)
    fused = more.early_fusion(image, points, labels)
    assert fused.shape == (1, 9, 32, 32)
    assert (fused[0, 6:, 16:] == 0).all()
    assert (fused[0, 8, :16] != 0).any()
