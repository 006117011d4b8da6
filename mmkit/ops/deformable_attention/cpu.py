"""Deformable attention's sampling on the CPU: Numba kernels that read the D numbers of a head where they lie side by side.

One job is a share of the queries (forward) or of the heads (backward: only their gradients are written, so no two jobs meet).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from mmkit.ops.numba_kernels import kernel, run_jobs

_ONE, _ZERO, _HALF = np.float32(1), np.float32(0), np.float32(0.5)


@numba.njit(inline="always")
def _centre(n, grids):
    """Where query `n` lies, in cells of the map."""
    query_height, query_width, height, width = grids
    x = (np.float32(n % query_width) + _HALF) / np.float32(query_width) * np.float32(width) - _HALF
    return x, (np.float32(n // query_width) + _HALF) / np.float32(query_height) * np.float32(height) - _HALF


@numba.njit(inline="always")
def _softmax(weights, logits):
    peak, total = logits[0], _ZERO
    for k in range(1, logits.shape[0]):
        peak = max(peak, logits[k])
    for k in range(logits.shape[0]):
        weights[k] = np.exp(logits[k] - peak)
        total += weights[k]
    for k in range(logits.shape[0]):
        weights[k] /= total


@numba.njit(inline="always")
def _corners(x, y, height, width):
    """The four cells around (x, y), their shares along x and along y; what is outside counts nothing, and its cell is one inside."""
    x0, y0 = int(np.floor(x)), int(np.floor(y))
    right, down = x - np.float32(x0), y - np.float32(y0)
    in_x = (_ONE if x0 >= 0 else _ZERO, _ONE if x0 + 1 < width else _ZERO)
    in_y = (_ONE if y0 >= 0 else _ZERO, _ONE if y0 + 1 < height else _ZERO)
    left_cell, right_cell = max(x0, 0), min(x0 + 1, width - 1)
    upper, lower = max(y0, 0) * width, min(y0 + 1, height - 1) * width
    cells = (upper + left_cell, upper + right_cell, lower + left_cell, lower + right_cell)
    return cells, ((_ONE - right) * in_x[0], right * in_x[1]), ((_ONE - down) * in_y[0], down * in_y[1]), in_x, in_y


@kernel("void(f4[:,:,:,::1], f4[:,:,:,:,::1], f4[:,:,:,::1], i8[::1], f4[:,:,:,::1], i8, i8, i8)")
def _forward(value, offsets, logits, grids, out, b, first, last):
    (height, width), dim = grids[2:], value.shape[3]
    weights = np.empty(logits.shape[3], np.float32)
    for n in range(first, last):
        centre_x, centre_y = _centre(n, grids)
        for m in range(value.shape[2]):
            _softmax(weights, logits[b, n, m])
            for d in range(dim):
                out[b, n, m, d] = _ZERO
            for k in range(weights.shape[0]):
                x, y = centre_x + offsets[b, n, m, k, 0], centre_y + offsets[b, n, m, k, 1]
                if x > -_ONE and y > -_ONE and x < width and y < height:
                    (c0, c1, c2, c3), (left, right), (up, down), _, _ = _corners(x, y, height, width)
                    up, down = up * weights[k], down * weights[k]
                    s0, s1, s2, s3 = left * up, right * up, left * down, right * down
                    for d in range(dim):
                        upper = s0 * value[b, c0, m, d] + s1 * value[b, c1, m, d]
                        out[b, n, m, d] += upper + (s2 * value[b, c2, m, d] + s3 * value[b, c3, m, d])
                elif x != x or y != y:
                    for d in range(dim):
                        out[b, n, m, d] = np.float32(np.nan)


@kernel(
    "void(f4[:,:,:,::1], f4[:,:,:,::1], f4[:,:,:,:,::1], f4[:,:,:,::1], i8[::1], f4[:,:,:,::1], f4[:,:,:,:,::1], f4[:,:,:,::1],"
    " i8, i8, i8)"
)
def _backward(grad, value, offsets, logits, grids, g_value, g_offsets, g_logits, b, first, last):
    (height, width), dim = grids[2:], value.shape[3]
    row, weights = np.empty(dim, np.float32), np.empty(logits.shape[3], np.float32)
    for n in range(grad.shape[1]):
        centre_x, centre_y = _centre(n, grids)
        for m in range(first, last):
            _softmax(weights, logits[b, n, m])
            for d in range(dim):
                row[d] = grad[b, n, m, d]
            mean = _ZERO
            for k in range(weights.shape[0]):
                weight, found, slope_x, slope_y = weights[k], _ZERO, _ZERO, _ZERO
                x, y = centre_x + offsets[b, n, m, k, 0], centre_y + offsets[b, n, m, k, 1]
                if x > -_ONE and y > -_ONE and x < width and y < height:
                    (c0, c1, c2, c3), (left, right), (up, down), in_x, in_y = _corners(x, y, height, width)
                    s0, s1, s2, s3 = (
                        left * up * weight,
                        right * up * weight,
                        left * down * weight,
                        right * down * weight,
                    )
                    d0 = d1 = d2 = d3 = _ZERO
                    for d in range(dim):
                        d0 += row[d] * value[b, c0, m, d]
                        d1 += row[d] * value[b, c1, m, d]
                        d2 += row[d] * value[b, c2, m, d]
                        d3 += row[d] * value[b, c3, m, d]
                    for d in range(dim):  # cells outside share one inside: one after the other
                        g_value[b, c0, m, d] += s0 * row[d]
                        g_value[b, c1, m, d] += s1 * row[d]
                        g_value[b, c2, m, d] += s2 * row[d]
                        g_value[b, c3, m, d] += s3 * row[d]
                    upper, lower = left * d0 + right * d1, left * d2 + right * d3
                    found = up * upper + down * lower
                    slope_x = in_x[1] * (up * d1 + down * d3) - in_x[0] * (up * d0 + down * d2)
                    slope_y = in_y[1] * lower - in_y[0] * upper
                g_offsets[b, n, m, k, 0], g_offsets[b, n, m, k, 1] = weight * slope_x, weight * slope_y
                g_logits[b, n, m, k] = found
                mean += weight * found
            for k in range(weights.shape[0]):
                g_logits[b, n, m, k] = weights[k] * (g_logits[b, n, m, k] - mean)


def forward(value: Tensor, offsets: Tensor, logits: Tensor, grids: list[int]) -> Tensor:
    """(B, N, M * D); contiguous float32 tensors, `grids` the sides of the query grid and of the map."""
    out = value.new_empty(*logits.shape[:3], value.shape[3])
    _in_shares(_forward, logits.shape[1], (value, offsets, logits, grids, out))
    return out.flatten(2)


def backward(
    grad: Tensor, value: Tensor, offsets: Tensor, logits: Tensor, grids: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, offsets and logits."""
    grads = torch.zeros_like(value), torch.empty_like(offsets), torch.empty_like(logits)
    grad = grad.view(*logits.shape[:3], value.shape[3])
    _in_shares(_backward, value.shape[2], (grad, value, offsets, logits, grids, *grads))
    return grads


def _in_shares(function: Any, count: int, tensors: tuple[Any, ...]) -> None:
    """Run a kernel on every picture, every thread on a share of its queries or heads."""
    arrays = [t.detach().numpy() if isinstance(t, Tensor) else np.array(t, np.int64) for t in tensors]
    share = -(-count // max(torch.get_num_threads(), 1)) or 1
    parts = [(first, min(first + share, count)) for first in range(0, count, share)]
    run_jobs(function, [(*arrays, b, *part) for b in range(tensors[0].shape[0]) for part in parts])
