"""The selective scan on the CPU: Numba kernels over blocks of 16 channels, states saved every `STEP` steps.

One job is one batch item and one block of channels; bias, softplus, skip and gate are part of it. A chunk of time steps lies in
flat rows `[step * LANES + channel]`, and every loop over such a row is one that LLVM turns into vector instructions; the
exponential is a polynomial for the same reason. Equations as in `mmkit.ops.selective_scan`; arrays are (B, L, D) in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import numba
import numpy as np
import torch
from torch import Tensor

from mmkit.ops.numba_kernels import FAST_MATH, kernel, run_jobs

LANES = 16
STEP = 64
"""Time steps between saved states; the backward pass recomputes the states in between."""

_ROW = STEP * LANES
_LOG2E, _LN2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
_LOWEST, _HIGHEST = np.float32(-126), np.float32(127)
_P1, _P2, _P3 = np.float32(0.6931471805599453), np.float32(0.24022650695910072), np.float32(0.05550410866482158)
_P4, _P5, _P6 = np.float32(0.009618129107628477), np.float32(0.0013333558146428443), np.float32(0.0001540353039338161)
_ONE, _TWO, _HALF, _ZERO = np.float32(1), np.float32(2), np.float32(0.5), np.float32(0)
_L3, _L5, _L7 = np.float32(1 / 3), np.float32(1 / 5), np.float32(1 / 7)
_L9, _L11, _L13 = np.float32(1 / 9), np.float32(1 / 11), np.float32(1 / 13)
_BIAS, _SHIFT = np.int32(127), np.int32(23)

_inline = numba.njit(inline="always", fastmath=FAST_MATH)
_row_loop = numba.njit(fastmath=FAST_MATH, error_model="numpy")


@_inline
def _exp2(x):
    """2**x in float32, relative error below 3e-7; NaN stays NaN."""
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    k = np.floor(x + _HALF)
    r = x - k
    p = _ONE + r * (_P1 + r * (_P2 + r * (_P3 + r * (_P4 + r * (_P5 + r * _P6)))))
    return p * np.int32((np.int32(k) + _BIAS) << _SHIFT).view(np.float32)


@_inline
def _sigmoid(x):
    return _ONE / (_ONE + _exp2(-x * _LOG2E))


@_inline
def _softplus(x):
    """max(x, 0) + log(1 + e), e = exp(-|x|), the logarithm as the series of 2 artanh(e / (2 + e))."""
    e = _exp2(-abs(x) * _LOG2E)
    s = e / (_TWO + e)
    q = s * s
    series = _ONE + q * (_L3 + q * (_L5 + q * (_L7 + q * (_L9 + q * (_L11 + q * _L13)))))
    return (x if x > _ZERO else _ZERO) + _TWO * s * series


@_row_loop
def _load(array, b, start, steps, d0, width, row):
    for i in range(steps):
        for c in range(width):
            row[i * LANES + c] = array[b, start + i, d0 + c]


@_row_loop
def _store(row, array, b, start, steps, d0, width):
    for i in range(steps):
        for c in range(width):
            array[b, start + i, d0 + c] = row[i * LANES + c]


@_row_loop
def _spread(array, b, start, steps, g, n, lanes, row):
    """B or C of state `n`: one value for all channels of a step. `lanes` is LANES, a number the compiler does not know:
    it would unroll such a short loop instead of using vector instructions."""
    for i in range(steps):
        value = array[b, start + i, g, n]
        for c in range(lanes):
            row[i * lanes + c] = value


@_row_loop
def _states(dt, x, a, bx, m, decay, h):
    """Decays of one state, and the state itself: h[LANES:] follows from h[:LANES], the value before the chunk."""
    for j in range(m):
        decay[j] = _exp2(dt[j] * a[j])
    for j in range(m):
        h[j + LANES] = decay[j] * h[j] + x[j] * bx[j]


@_row_loop
def _read_out(h, cx, m, y):
    for j in range(m):
        y[j] += h[j + LANES] * cx[j]


@_row_loop
def _reverse(g, cx, decay, m, r, q):
    """Gradient `q` of each state, and `r`, what of it reaches the state before; r[m:] comes from the next chunk."""
    for k in range(m):
        j = np.uint64(m - 1 - k)  # unsigned: a negative index would stand for the end, and the loop for scalar code
        q[j] = r[j + np.uint64(LANES)] + g[j] * cx[j]
        r[j] = decay[j] * q[j]


@_row_loop
def _collect(dt, a, bx, h, r, q, m, through_input, through_decay, ga):
    """Adds one state's part to the sums over states, and to the gradient of its A."""
    for j in range(m):
        through_input[j] += q[j] * bx[j]
        z = r[j] * h[j]
        through_decay[j] += z * a[j]
        ga[j] += z * dt[j]


@_row_loop
def _sum_channels(x, y, steps, lanes, array, b, start, slot, n):
    """Sum of x * y over the channels of each step; `lanes` as above."""
    for i in range(steps):
        total = _ZERO
        for c in range(lanes):
            total += x[i * lanes + c] * y[i * lanes + c]
        array[b, start + i, slot, n] = total


@_row_loop
def _constants(A, bias, D, d0, width, a, shift, skip):
    """A in units of log 2, bias and skip weights, the same at every step of a chunk."""
    for i in range(STEP):
        for c in range(width):
            shift[i * LANES + c] = bias[d0 + c]
            skip[i * LANES + c] = D[d0 + c]
    for n in range(A.shape[1]):
        for c in range(width):
            a[n, c] = A[d0 + c, n] * _LOG2E
        for j in range(LANES, _ROW):
            a[n, j] = a[n, j - LANES]


@_row_loop
def _inputs(u, delta, shift, softplus, b, start, steps, d0, width, ur, raw, dt, x):
    """Chunk of u, of delta with its bias, of the step sizes dt, and x = dt u."""
    m = steps * LANES
    _load(u, b, start, steps, d0, width, ur)
    _load(delta, b, start, steps, d0, width, raw)
    for j in range(m):
        raw[j] += shift[j]
        dt[j] = raw[j]
    if softplus:
        for j in range(m):
            dt[j] = _softplus(raw[j])
    for j in range(m):
        x[j] = dt[j] * ur[j]


@_row_loop
def _channel_sum(row, c):
    total = _ZERO
    for i in range(STEP):
        total += row[i * LANES + c]
    return total


@kernel(
    "void(f4[:,:,::1], f4[:,:,::1], f4[:,::1], f4[:,:,:,::1], f4[:,:,:,::1], f4[::1], f4[:,:,::1], f4[::1], b1, b1, "
    "f4[:,:,::1], f4[:,:,::1], f4[:,:,:,::1], i8, i8, i8, i8, i8)"
)
def _forward(u, delta, A, B, C, D, z, bias, softplus, gated, out, last, states, lanes, b, g, d0, width):
    """One batch item and block of channels: fills `out`, `last` and `states` for channels d0 .. d0 + width."""
    L, N = u.shape[1], A.shape[1]
    a, end = np.zeros((N, _ROW), np.float32), np.zeros((N, LANES), np.float32)
    rows = np.zeros((11, _ROW), np.float32)
    shift, skip, ur, raw, dt, x, zr, y, bx, cx, decay = (
        rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7], rows[8], rows[9], rows[10]
    )  # fmt: skip
    h = np.zeros(_ROW + LANES, np.float32)
    _constants(A, bias, D, d0, width, a, shift, skip)
    for start in range(0, L, STEP):
        steps = min(STEP, L - start)
        m = steps * LANES
        _inputs(u, delta, shift, softplus, b, start, steps, d0, width, ur, raw, dt, x)
        for j in range(m):
            y[j] = skip[j] * ur[j]
        for n in range(N):
            for c in range(LANES):
                h[c] = end[n, c]
            for c in range(width):
                states[b, start // STEP, n, d0 + c] = h[c]
            _spread(B, b, start, steps, g, n, lanes, bx)
            _spread(C, b, start, steps, g, n, lanes, cx)
            _states(dt, x, a[n], bx, m, decay, h)
            _read_out(h, cx, m, y)
            for c in range(LANES):
                end[n, c] = h[m + c]
        if gated:
            _load(z, b, start, steps, d0, width, zr)
            for j in range(m):
                y[j] *= zr[j] * _sigmoid(zr[j])
        _store(y, out, b, start, steps, d0, width)
    for c in range(width):
        for n in range(N):
            last[b, d0 + c, n] = end[n, c]


@kernel(
    "void(f4[:,:,::1], f4[:,:,::1], f4[:,::1], f4[:,:,:,::1], f4[:,:,:,::1], f4[::1], f4[:,:,::1], f4[::1], b1, b1, "
    "f4[:,:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,:,:,::1], f4[:,:,:,::1], "
    "f4[:,::1], f4[:,:,::1], f4[:,::1], i8, i8, i8, i8, i8, i8)"
)
def _backward(
    u, delta, A, B, C, D, z, bias, softplus, gated, states, gout, glast, du, ddelta, dA, dB, dC, dD, dz, dbias,
    lanes, b, g, d0, width, slot,
):  # fmt: skip
    """One batch item and block of channels: fills its part of the gradients, and row `slot` of `dB` and `dC`."""
    L, N = u.shape[1], A.shape[1]
    a, ga = np.zeros((N, _ROW), np.float32), np.zeros((N, _ROW), np.float32)
    carry = np.zeros((N, LANES), np.float32)  # decay of step t+1 times the gradient of state t+1
    for n in range(N):
        for c in range(width):
            carry[n, c] = glast[b, d0 + c, n]
    rows = np.zeros((18, _ROW), np.float32)
    shift, skip, ur, raw, dt, x, zr, y, bx = (
        rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7], rows[8]
    )  # fmt: skip
    cx, decay, gy, through_input, through_decay, gD, gbias, q, go = (
        rows[9], rows[10], rows[11], rows[12], rows[13], rows[14], rows[15], rows[16], rows[17]
    )  # fmt: skip
    h, r = np.zeros(_ROW + LANES, np.float32), np.zeros(_ROW + LANES, np.float32)
    _constants(A, bias, D, d0, width, a, shift, skip)
    for chunk in range((L - 1) // STEP, -1, -1):
        start = chunk * STEP
        steps = min(STEP, L - start)
        m = steps * LANES
        _inputs(u, delta, shift, softplus, b, start, steps, d0, width, ur, raw, dt, x)
        _load(gout, b, start, steps, d0, width, go)
        for j in range(m):
            gy[j] = go[j]
        if gated:
            _load(z, b, start, steps, d0, width, zr)
            for j in range(m):
                gy[j] *= zr[j] * _sigmoid(zr[j])
        for j in range(m):
            y[j] = skip[j] * ur[j]
            through_input[j] = _ZERO
            through_decay[j] = _ZERO
        for n in range(N):
            for c in range(width):
                h[c] = states[b, chunk, n, d0 + c]
            for c in range(LANES):
                r[m + c] = carry[n, c]
            _spread(B, b, start, steps, g, n, lanes, bx)
            _spread(C, b, start, steps, g, n, lanes, cx)
            _states(dt, x, a[n], bx, m, decay, h)
            _reverse(gy, cx, decay, m, r, q)
            _collect(dt, a[n], bx, h, r, q, m, through_input, through_decay, ga[n])
            if gated:
                _read_out(h, cx, m, y)
            _sum_channels(x, q, steps, lanes, dB, b, start, slot, n)
            _sum_channels(gy, h[LANES:], steps, lanes, dC, b, start, slot, n)
            for c in range(LANES):
                carry[n, c] = r[c]
        if gated:
            for j in range(m):
                s = _sigmoid(zr[j])
                zr[j] = go[j] * y[j] * s * (_ONE + zr[j] * (_ONE - s))
            _store(zr, dz, b, start, steps, d0, width)
        for j in range(m):
            gD[j] += gy[j] * ur[j]
            slope = _sigmoid(raw[j]) if softplus else _ONE
            raw[j] = (ur[j] * through_input[j] + through_decay[j] * _LN2) * slope
            gbias[j] += raw[j]
            ur[j] = dt[j] * through_input[j] + gy[j] * skip[j]
        _store(ur, du, b, start, steps, d0, width)
        _store(raw, ddelta, b, start, steps, d0, width)
    for c in range(width):
        dD[b, d0 + c] = _channel_sum(gD, c)
        dbias[b, d0 + c] = _channel_sum(gbias, c)
        for n in range(N):
            dA[b, d0 + c, n] = _channel_sum(ga[n], c)


def _blocks(batch: int, dim: int, groups: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(batch item, group, first channel, channels, slot): blocks of at most `LANES` channels that share B and C."""
    per_group = dim // groups
    per_block = -(-per_group // LANES)
    for b in range(batch):
        for g in range(groups):
            for k in range(per_block):
                yield b, g, g * per_group + k * LANES, min(LANES, per_group - k * LANES), g * per_block + k


def _arrays(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None
) -> list[np.ndarray]:
    """The kernels' arguments: time before channels, zeros for the vectors and nothing for the gate that are not given."""
    nothing = u.new_zeros(u.shape[1])
    z = u.new_empty(0, 0, 0) if z is None else z
    tokens = [_tokens(x) for x in (u, delta)]
    parts = [x.permute(0, 3, 1, 2).contiguous().numpy() for x in (B.detach(), C.detach())]
    D, bias = (nothing if x is None else x.detach().contiguous() for x in (D, bias))
    return [*tokens, A.detach().contiguous().numpy(), *parts, D.numpy(), _tokens(z), bias.numpy()]


def _tokens(x: Tensor) -> np.ndarray:
    return x.detach().transpose(1, 2).contiguous().numpy()


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole operator in float32, B and C (B,G,N,L): `(out (B,D,L), last_state (B,D,N), states (B,ceil(L/STEP),N,D))`."""
    batch, dim, length = u.shape
    n = A.shape[1]
    out, last = torch.empty(batch, length, dim), torch.empty(batch, dim, n)
    states = torch.empty(batch, -(-length // STEP), n, dim)
    arrays = [*_arrays(u, delta, A, B, C, D, z, bias), softplus, z is not None]
    arrays += [x.numpy() for x in (out, last, states)]
    run_jobs(_forward, [(*arrays, LANES, *block[:4]) for block in _blocks(batch, dim, B.shape[1])])
    return out.transpose(1, 2), last, states


def backward(
    gout: Tensor,
    glast: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    states: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z (empty when not given) and bias, in float32."""
    batch, dim, length = u.shape
    n, groups = A.shape[1], B.shape[1]
    blocks = list(_blocks(batch, dim, groups))
    slots = len(blocks) // batch
    du, ddelta = torch.empty(batch, length, dim), torch.empty(batch, length, dim)
    dz = torch.empty(batch, length, dim) if z is not None else torch.empty(0, 0, 0)
    dA, dD, dbias = torch.empty(batch, dim, n), torch.empty(batch, dim), torch.empty(batch, dim)
    dB, dC = torch.empty(batch, length, slots, n), torch.empty(batch, length, slots, n)
    arrays = [*_arrays(u, delta, A, B, C, D, z, bias), softplus, z is not None]
    arrays += [states.numpy(), _tokens(gout), glast.contiguous().numpy()]
    arrays += [x.numpy() for x in (du, ddelta, dA, dB, dC, dD, dz, dbias)]
    run_jobs(_backward, [(*arrays, LANES, *block) for block in blocks])
    dB, dC = (x.view(batch, length, groups, -1, n).sum(3).permute(0, 2, 3, 1) for x in (dB, dC))
    du, ddelta, dz = (x.transpose(1, 2) for x in (du, ddelta, dz))
    return du, ddelta, dA.sum(0), dB, dC, dD.sum(0), dz, dbias.sum(0)
