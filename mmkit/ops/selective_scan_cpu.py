"""The selective scan on the CPU: Numba kernels over blocks of 16 channels, states saved every `STEP` steps.

Inside a block the channels are the innermost loop, of constant length, so LLVM turns every line into vector instructions;
the exponential is a polynomial for the same reason. Equations as in `mmkit.ops.selective_scan`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numba
import numpy as np
import torch
from torch import Tensor

from mmkit.ops.numba_kernels import FAST_MATH, kernel, run_jobs

LANES = 16
STEP = 32
"""Time steps between saved states; the backward pass recomputes the states in between."""

_LOG2E = np.float32(1.4426950408889634)
_LN2_HI, _LN2_LO = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LOWEST, _HIGHEST = np.float32(-87.3), np.float32(88.3)
_C2, _C3, _C4 = np.float32(0.5), np.float32(1 / 6), np.float32(1 / 24)
_C5, _C6 = np.float32(1 / 120), np.float32(1 / 720)
_ONE, _HALF = np.float32(1.0), np.float32(0.5)
_BIAS, _SHIFT = np.int32(127), np.int32(23)


@numba.njit(inline="always", fastmath=FAST_MATH)
def _exp(x):
    """float32 exponential, relative error below 3e-7; NaN stays NaN."""
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    k = np.floor(x * _LOG2E + _HALF)
    r = x - k * _LN2_HI
    r = r - k * _LN2_LO
    p = _ONE + r * (_ONE + r * (_C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))))
    return p * np.int32((np.int32(k) + _BIAS) << _SHIFT).view(np.float32)


@kernel(
    "void(f4[:,:,::1], f4[:,:,::1], f4[:,::1], f4[:,:,:,::1], f4[:,:,:,::1], f4[:,:,::1], f4[:,:,::1], "
    "f4[:,:,:,::1], i8, i8, i8, i8)"
)
def _forward(u, dt, A, B, C, y, last, states, b, g, d0, width):
    """One batch item and block of channels: fills `y`, `last` and `states` for channels d0 .. d0 + width."""
    L, N = u.shape[2], A.shape[1]
    h = np.zeros((N, LANES), np.float32)
    a_block = np.zeros((N, LANES), np.float32)
    for c in range(width):
        for n in range(N):
            a_block[n, c] = A[d0 + c, n]
    u_block = np.zeros((STEP, LANES), np.float32)
    t_block = np.zeros((STEP, LANES), np.float32)
    y_block = np.zeros((STEP, LANES), np.float32)
    b_block = np.zeros((STEP, N), np.float32)
    c_block = np.zeros((STEP, N), np.float32)
    for start in range(0, L, STEP):
        steps = min(STEP, L - start)
        for c in range(width):
            for n in range(N):
                states[b, start // STEP, d0 + c, n] = h[n, c]
            for i in range(steps):
                t_block[i, c] = dt[b, d0 + c, start + i]
                u_block[i, c] = t_block[i, c] * u[b, d0 + c, start + i]
        for n in range(N):
            for i in range(steps):
                b_block[i, n] = B[b, g, n, start + i]
                c_block[i, n] = C[b, g, n, start + i]
        for i in range(steps):
            for c in range(LANES):
                y_block[i, c] = np.float32(0)
            for n in range(N):
                bn, cn = b_block[i, n], c_block[i, n]
                for c in range(LANES):
                    h[n, c] = _exp(t_block[i, c] * a_block[n, c]) * h[n, c] + u_block[i, c] * bn
                    y_block[i, c] += h[n, c] * cn
        for c in range(width):
            for i in range(steps):
                y[b, d0 + c, start + i] = y_block[i, c]
    for c in range(width):
        for n in range(N):
            last[b, d0 + c, n] = h[n, c]


@kernel(
    "void(f4[:,:,::1], f4[:,:,::1], f4[:,::1], f4[:,:,:,::1], f4[:,:,:,::1], f4[:,:,:,::1], f4[:,:,::1], f4[:,:,::1], "
    "f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,:,:,::1], f4[:,:,:,::1], i8, i8, i8, i8, i8)"
)
def _backward(u, dt, A, B, C, states, gy, glast, du, ddt, dA, dB, dC, b, g, d0, width, slot):
    """One batch item and block of channels: fills its part of `du`, `ddt`, `dA` and row `slot` of `dB` and `dC`."""
    L, N = u.shape[2], A.shape[1]
    a_block = np.zeros((N, LANES), np.float32)
    ga_block = np.zeros((N, LANES), np.float32)
    carry = np.zeros((N, LANES), np.float32)  # decay of step t+1 times the gradient of state t+1
    for c in range(width):
        for n in range(N):
            a_block[n, c] = A[d0 + c, n]
            carry[n, c] = glast[b, d0 + c, n]
    h = np.zeros((STEP + 1, N, LANES), np.float32)
    decay = np.zeros((STEP, N, LANES), np.float32)
    u_block = np.zeros((STEP, LANES), np.float32)
    t_block = np.zeros((STEP, LANES), np.float32)
    g_block = np.zeros((STEP, LANES), np.float32)
    b_block = np.zeros((STEP, N), np.float32)
    c_block = np.zeros((STEP, N), np.float32)
    gb_block = np.zeros((STEP, N), np.float32)
    gc_block = np.zeros((STEP, N), np.float32)
    s_u = np.zeros(LANES, np.float32)
    s_a = np.zeros(LANES, np.float32)
    for chunk in range((L - 1) // STEP, -1, -1):
        start = chunk * STEP
        steps = min(STEP, L - start)
        for c in range(width):
            for n in range(N):
                h[0, n, c] = states[b, chunk, d0 + c, n]
            for i in range(steps):
                u_block[i, c] = u[b, d0 + c, start + i]
                t_block[i, c] = dt[b, d0 + c, start + i]
                g_block[i, c] = gy[b, d0 + c, start + i]
        for n in range(N):
            for i in range(steps):
                b_block[i, n] = B[b, g, n, start + i]
                c_block[i, n] = C[b, g, n, start + i]
        for i in range(steps):
            for n in range(N):
                bn = b_block[i, n]
                for c in range(LANES):
                    decay[i, n, c] = _exp(t_block[i, c] * a_block[n, c])
                    h[i + 1, n, c] = decay[i, n, c] * h[i, n, c] + t_block[i, c] * u_block[i, c] * bn
        for i in range(steps - 1, -1, -1):
            for c in range(LANES):
                s_u[c] = np.float32(0)
                s_a[c] = np.float32(0)
            for n in range(N):
                bn, cn = b_block[i, n], c_block[i, n]
                sum_b, sum_c = np.float32(0), np.float32(0)
                for c in range(LANES):
                    q = carry[n, c] + g_block[i, c] * cn
                    sum_c += g_block[i, c] * h[i + 1, n, c]
                    sum_b += t_block[i, c] * u_block[i, c] * q
                    s_u[c] += q * bn
                    carry[n, c] = q * decay[i, n, c]
                    z = carry[n, c] * h[i, n, c]
                    s_a[c] += z * a_block[n, c]
                    ga_block[n, c] += z * t_block[i, c]
                gb_block[i, n] = sum_b
                gc_block[i, n] = sum_c
            for c in range(width):
                du[b, d0 + c, start + i] = t_block[i, c] * s_u[c]
                ddt[b, d0 + c, start + i] = u_block[i, c] * s_u[c] + s_a[c]
        for n in range(N):
            for i in range(steps):
                dB[b, slot, n, start + i] = gb_block[i, n]
                dC[b, slot, n, start + i] = gc_block[i, n]
    for c in range(width):
        for n in range(N):
            dA[b, d0 + c, n] = ga_block[n, c]


def _blocks(batch: int, dim: int, groups: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(batch item, group, first channel, channels, slot): blocks of at most `LANES` channels that share B and C."""
    per_group = dim // groups
    per_block = -(-per_group // LANES)
    for b in range(batch):
        for g in range(groups):
            for k in range(per_block):
                yield b, g, g * per_group + k * LANES, min(LANES, per_group - k * LANES), g * per_block + k


def _array(x: Tensor) -> np.ndarray:
    return x.detach().to(torch.float32).contiguous().numpy()


def forward(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence in float32: `(y (B,D,L), last_state (B,D,N), states (B,ceil(L/STEP),D,N))`."""
    batch, dim, length = u.shape
    n = A.shape[1]
    y = torch.empty(batch, dim, length)
    last = torch.empty(batch, dim, n)
    states = torch.empty(batch, -(-length // STEP), dim, n)
    arrays = [_array(x) for x in (u, dt, A, B, C)] + [x.numpy() for x in (y, last, states)]
    run_jobs(_forward, [(*arrays, *block[:4]) for block in _blocks(batch, dim, B.shape[1])])
    return y, last, states


def backward(
    gy: Tensor, glast: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C in float32."""
    batch, dim, length = u.shape
    n, groups = A.shape[1], B.shape[1]
    blocks = list(_blocks(batch, dim, groups))
    slots = len(blocks) // batch
    du, ddt = torch.empty(batch, dim, length), torch.empty(batch, dim, length)
    dA = torch.empty(batch, dim, n)
    dB, dC = torch.empty(batch, slots, n, length), torch.empty(batch, slots, n, length)
    inputs = [_array(x) for x in (u, dt, A, B, C, states, gy, glast)]
    outputs = [x.numpy() for x in (du, ddt, dA, dB, dC)]
    run_jobs(_backward, [(*inputs, *outputs, *block) for block in blocks])
    dB, dC = (x.view(batch, groups, -1, n, length).sum(2) for x in (dB, dC))
    return du, ddt, dA.sum(0), dB, dC
