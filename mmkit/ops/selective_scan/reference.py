"""The selective scan in plain torch: a chunked version for any device and float64, and the loop that tests trust.

The chunked version walks all chunks of a segment side by side: one pass gives each chunk's own end state, a short loop joins
them, a second pass repeats the steps from the right start states. No ratio of cumulative decays is ever formed (it would
overflow), and memory is one segment of states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 2048
"""Length of a segment: the states saved for the backward pass are this many steps apart."""


def _chunk(length: int) -> int:
    """Chunk length that makes the two passes plus the joining loop shortest."""
    return max(1, min(length, round((length / 2) ** 0.5)))


def _split(x: Tensor, size: int) -> Tensor:
    """(B, X, T) -> (size, B, chunks, X), padded with zeros: a step of zero length changes nothing."""
    x = F.pad(x, (0, -x.shape[-1] % size))
    return x.unflatten(-1, (-1, size)).permute(3, 0, 2, 1)


def _join(steps: list[Tensor], length: int) -> Tensor:
    """Inverse of `_split` on a list of (B, chunks, X)."""
    return torch.stack(steps, -1).permute(0, 2, 1, 3).flatten(2)[..., :length]


def _chain(first: Tensor, decay: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Start state of each chunk, and the state after the last one. decay, own: (B, chunks, D, N)."""
    starts, state = [], first
    for k in range(own.shape[1]):
        starts.append(state)
        state = decay[:, k] * state + own[:, k]
    return torch.stack(starts, 1), state


def forward(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence: `(y (B,D,L), last_state (B,D,N), states (B,ceil(L/STEP),D,N))`; B and C are (B,G,N,L)."""
    state = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    outputs, states = [], []
    for start in range(0, u.shape[2], STEP):
        part = slice(start, start + STEP)
        states.append(state)
        y, state = _segment(state, u[..., part], dt[..., part], A, B[..., part], C[..., part])
        outputs.append(y)
    return torch.cat(outputs, -1), state.clone(), torch.stack(states, 1)


def _steps(u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """u, dt as (T, B, chunks, D) and B, C as (T, B, chunks, G, N), T the chunk length."""
    size = _chunk(u.shape[-1])
    groups, n = B.shape[1:3]
    b, c = (_split(x.flatten(1, 2), size).unflatten(-1, (groups, n)) for x in (B, C))
    return _split(u, size), _split(dt, size), b, c, size


def _spread(x: Tensor, dim: int) -> Tensor:
    """(..., G, N) -> (..., D, N): every channel of a group sees the same values."""
    return x.repeat_interleave(dim // x.shape[-2], -2) if x.shape[-2] > 1 else x


def _segment(state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    dim, length = u.shape[1:]
    us, ts, bs, cs, size = _steps(u, dt, B, C)
    own = torch.zeros_like(ts[0].unsqueeze(-1) * A)
    for t in range(size):
        own = torch.exp(ts[t].unsqueeze(-1) * A) * own + (ts[t] * us[t]).unsqueeze(-1) * _spread(bs[t], dim)
    h, state = _chain(state, torch.exp(ts.sum(0).unsqueeze(-1) * A), own)
    outputs = []
    for t in range(size):
        h = torch.exp(ts[t].unsqueeze(-1) * A) * h + (ts[t] * us[t]).unsqueeze(-1) * _spread(bs[t], dim)
        outputs.append((h * _spread(cs[t], dim)).sum(-1))
    return _join(outputs, length), state


def backward(
    gy: Tensor, glast: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C: the reverse recurrence, segment by segment from the end."""
    carry, dA, parts = glast, torch.zeros_like(A), []
    for k in reversed(range(states.shape[1])):
        part = slice(k * STEP, (k + 1) * STEP)
        given = [x[..., part] for x in (gy, u, dt, B, C)]
        *grads, ga, carry = _segment_backward(carry, states[:, k], A, *given)
        dA = dA + ga
        parts.append(grads)
    du, ddt, dB, dC = (torch.cat([p[i] for p in reversed(parts)], -1) for i in range(4))
    return du, ddt, dA, dB, dC


def _segment_backward(
    carry: Tensor, state: Tensor, A: Tensor, gy: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, ...]:
    (batch, dim, length), groups = u.shape, B.shape[1]
    us, ts, bs, cs, size = _steps(u, dt, B, C)
    gs = _split(gy, size)
    decays = [torch.exp(ts[t].unsqueeze(-1) * A) for t in range(size)]
    whole = torch.exp(ts.sum(0).unsqueeze(-1) * A)

    def inputs(t: int) -> Tensor:
        return (ts[t] * us[t]).unsqueeze(-1) * _spread(bs[t], dim)

    own = torch.zeros_like(whole)
    for t in range(size):
        own = decays[t] * own + inputs(t)
    h = [_chain(state, whole, own)[0]]
    for t in range(size):
        h.append(decays[t] * h[-1] + inputs(t))

    own = torch.zeros_like(whole)  # what reaches the step before the chunk from inside the chunk
    for t in reversed(range(size)):
        own = decays[t] * (own + gs[t].unsqueeze(-1) * _spread(cs[t], dim))
    carries, carry = _chain(carry, whole.flip(1), own.flip(1))
    r = carries.flip(1)

    du, ddt, dB, dC = [], [], [], []
    dA = torch.zeros_like(A)
    for t in reversed(range(size)):
        q = gs[t].unsqueeze(-1) * _spread(cs[t], dim) + r
        r = decays[t] * q
        through_decay = r * h[t]
        through_input = (q * _spread(bs[t], dim)).sum(-1)
        du.append(ts[t] * through_input)
        ddt.append(us[t] * through_input + (through_decay * A).sum(-1))
        dA = dA + (through_decay * ts[t].unsqueeze(-1)).sum((0, 1))
        dB.append(((ts[t] * us[t]).unsqueeze(-1) * q).unflatten(2, (groups, -1)).sum(3).flatten(2))
        dC.append((gs[t].unsqueeze(-1) * h[t + 1]).unflatten(2, (groups, -1)).sum(3).flatten(2))
    grads = [_join(x[::-1], length) for x in (du, ddt, dB, dC)]
    grads[2:] = [x.view(batch, groups, -1, length) for x in grads[2:]]
    return (*grads, dA, carry)


def reference(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written in the paper, one step at a time, differentiated by autograd: slow, for tests."""
    dim = u.shape[1]
    h = u.new_zeros(u.shape[0], dim, A.shape[1])
    outputs = []
    for t in range(u.shape[2]):
        b, c = (_spread(x[..., t], dim) for x in (B, C))
        h = torch.exp(dt[..., t, None] * A) * h + (dt[..., t] * u[..., t])[..., None] * b
        outputs.append((h * c).sum(-1))
    return torch.stack(outputs, -1), h
