"""The CPU backend: projection and compositing as two differentiable functions over rows, around Numba kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkit.ops.gaussian import raster
from mmkit.ops.gaussian.projection import Project
from mmkit.ops.gaussian.settings import Settings
from mmkit.ops.gaussian.tiles import Bins, bin_image, parts
from mmkit.ops.numba_kernels import run_jobs


def project(
    means: Tensor, quats: Tensor | None, scales: Tensor | None, covars: Tensor | None, opacities: Tensor, viewmats: Tensor,
    ks: Tensor, s: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows of the Gaussians (B, N) seen by the cameras (B, C): radii, means2d, depths, conics, opacities, ids, image starts."""
    return Project.apply(means, quats, scales, covars, opacities, viewmats, ks, s)


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


def _tile_jobs(bins: Bins, channels: int, s: Settings, *arrays: Any) -> list[tuple[Any, ...]]:
    across, _ = s.tiles
    shared = (
        bins.records,
        bins.stride,
        channels,
        bins.tile_starts,
        bins.list_records,
        bins.list_pairs,
        s.width,
        s.height,
        across,
    )
    alpha_max = np.float32(s.numerics.alpha_max)
    return [
        (*shared, first, raster.JOBS, alpha_max, *arrays)
        for first in range(min(raster.JOBS, len(bins.tile_starts) - 1))
    ]


class Composite(torch.autograd.Function):
    """Rows -> colours (I, H, W, X) and alphas (I, H, W), X: the features' channels, and the depth behind them if asked for.

    `shown` holds the tensor whose `absgrad` callers read.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, means2d, conics, opacities, depths, features, backgrounds, radii, feature_ids, starts, shown: list[Tensor],
        s: Settings,
    ):  # fmt: skip
        channels = features.shape[1] + s.depth
        out = torch.empty(len(starts) - 1, s.height, s.width, channels)
        alphas = torch.empty(len(starts) - 1, s.height, s.width)
        rows = (
            _numpy(radii), _numpy(means2d), _numpy(conics), _numpy(opacities), _numpy(depths), _numpy(features), _numpy(feature_ids)
        )  # fmt: skip
        ground = np.zeros((len(out), channels), np.float32)
        if backgrounds is not None:
            ground[:, : backgrounds.shape[1]] = _numpy(backgrounds)
        ctx.bins = []
        for i, (first, last) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
            bins = bin_image(*rows, first, last, s)
            run_jobs(raster.forward, _tile_jobs(bins, channels, s, ground[i], out[i].numpy(), alphas[i].numpy()))
            if any(ctx.needs_input_grad):
                ctx.bins.append(bins)
        ctx.shown = shown
        ctx.save_for_backward(features, backgrounds, feature_ids, out, alphas)
        ctx.settings = s
        return out, alphas

    @staticmethod
    def backward(ctx, g_out, g_alphas):  # type: ignore[override]
        features, backgrounds, feature_ids, out, alphas = ctx.saved_tensors
        s, channels, rows = ctx.settings, out.shape[3], len(feature_ids)
        g_out, g_alphas = g_out.contiguous(), g_alphas.contiguous()
        grads = [
            np.zeros(shape, np.float32) for shape in ((rows, 2), (rows * s.absgrad, 2), (rows, 3), (rows,), (rows,))
        ]
        g_features = np.zeros(tuple(features.shape), np.float32)
        for i, bins in enumerate(ctx.bins):
            g_pairs = np.empty((len(bins.list_pairs), raster.MOMENTS + channels), np.float32)
            arrays = [x[i].detach().numpy() for x in (out, alphas, g_out, g_alphas)]
            run_jobs(raster.backward, _tile_jobs(bins, channels, s, *arrays, s.absgrad, g_pairs))
            shared = (
                bins.records,
                bins.stride,
                bins.pair_starts,
                g_pairs,
                channels,
                s.absgrad,
                feature_ids.numpy(),
                *grads,
            )
            n = len(bins.pair_starts) - 1
            run_jobs(raster.collect, [(bins.first, a, b, *shared, g_features) for a, b in parts(n)])
        g_means2d, absolute, g_conics, g_opacities, g_depths = (torch.from_numpy(g) for g in grads)
        if s.absgrad:
            ctx.shown[0].absgrad = absolute.view_as(ctx.shown[0])
        g_backgrounds = None
        if ctx.needs_input_grad[5]:
            colours = _numpy(g_out[..., : backgrounds.shape[1]])
            light = 1 - _numpy(alphas)[..., None]
            g_backgrounds = torch.from_numpy((colours * light).sum((1, 2), dtype=np.float64).astype(np.float32))
        return (
            g_means2d,
            g_conics,
            g_opacities,
            g_depths,
            torch.from_numpy(g_features),
            g_backgrounds,
            None,
            None,
            None,
            None,
            None,
        )


def strongest(rows: list[Tensor], starts: Tensor, k: int, s: Settings) -> tuple[Tensor, Tensor]:
    """For every pixel the rows of the `k` largest weights (-1: none), and the weights: (I, H, W, k) each."""
    radii, means2d, conics, opacities, depths = (_numpy(x) for x in rows)
    images = len(starts) - 1
    ids = np.full((images, s.height, s.width, k), -1, np.int32)
    weights = np.zeros((images, s.height, s.width, k), np.float32)
    features, feature_ids = np.empty((0, 0), np.float32), np.empty(len(radii), np.int64)
    for i, (first, last) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        bins = bin_image(radii, means2d, conics, opacities, depths, features, feature_ids, first, last, s)
        run_jobs(raster.strongest, _tile_jobs(bins, 0, s, ids[i], weights[i]))
        ids[i][ids[i] >= 0] += first
    return torch.from_numpy(ids).long(), torch.from_numpy(weights)
