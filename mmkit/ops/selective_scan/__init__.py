"""The selective scan of Mamba-1 (arXiv 2312.00752, section 3): one function, four backends.

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t          y_t = sum_n C_t[n] h_t[n] + D u_t

Backends: `cuda` (mamba-ssm's kernel), `cpu` (Numba, float32), `torch` (chunked, any device, float64), `reference` (a loop, for
tests). `cpu` and `torch` run behind custom operators, so `torch.compile` and `torch.export` see a single node.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkit.errors import InputError
from mmkit.ops.backends import choose_backend
from mmkit.ops.compiling import cpu_kernels
from mmkit.ops.selective_scan import cuda

_NAME = "selective_scan"
_HAS_NUMBA = importlib.util.find_spec("numba") is not None  # looked up here: dynamo cannot trace the lookup


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-1's selective state-space scan; arguments in the order of mamba_ssm's `selective_scan_fn`.

    Args:
        u: inputs (B, D, L), any floating dtype. The arithmetic is float32 (float64 when `u` is).
        delta: step sizes (B, D, L), before bias and softplus.
        A: (D, N) real; negative for a stable system.
        B, C: (B, N, L), or (B, G, N, L) with D divisible by G.
        D: skip weights (D,).
        z: gate (B, D, L): the result is multiplied by SiLU(z).
        delta_bias: (D,), added to delta.
        delta_softplus: apply softplus to delta (after the bias).
        return_last_state: also return h_L, (B, D, N), in the arithmetic's dtype.
        backend: "auto", "cuda", "cpu", "torch" or "reference". Auto takes mamba-ssm for CUDA tensors when it works, the Numba
            kernels for CPU tensors below float64, else the chunked torch version, and logs its choice once.

    Returns:
        (B, D, L) in `u`'s dtype, or that and the last state.

    Raises:
        InputError: shapes that do not fit together, complex A, an empty sequence.
        BackendUnavailableError: the requested backend cannot run here; the message names the pip command.
    """
    _check(u, delta, A, B, C, D, z, delta_bias)
    double = u.dtype == torch.float64
    if double and backend in ("cpu", "cuda"):
        raise InputError(f"{_NAME}: backend {backend!r} computes in float32; use backend='torch' for float64.")
    chosen = choose_backend(_NAME, backend, u.device, _DOUBLE if double else _PREFERENCE, _PROBLEMS)
    if chosen == "cuda":
        return cuda.kernels().selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    work = torch.float64 if double else torch.float32
    u_, delta, A, B, C = (t.to(work) for t in (u, delta, A, B, C))
    D, z, delta_bias = (None if t is None else t.to(work) for t in (D, z, delta_bias))
    B, C = (t.unsqueeze(1) if t.dim() == 3 else t for t in (B, C))
    if chosen == "cpu":
        y, last, _ = _cpu_op(u_, delta, A, B, C, D, z, delta_bias, delta_softplus)
    else:
        y, last = _in_parts(u_, delta, A, B, C, D, z, delta_bias, delta_softplus, chosen)
    return (y.to(u.dtype), last) if return_last_state else y.to(u.dtype)


def _in_parts(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Bias, softplus, skip and gate as torch operations around the recurrence of "torch" or "reference"."""
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = dt.contiguous()  # a compiled softplus_backward mistakes the strides of mixed layouts
    if delta_softplus:
        dt = F.softplus(dt)
    if backend == "reference":
        y, last = _implementation("torch").reference(u, dt, A, B, C)
    else:
        y, last, _ = _torch_op(u, dt, A, B, C)
    if D is not None:
        y = torch.addcmul(y, D[:, None], u)
    if z is not None:
        y = y * F.silu(z)
    return y, last


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.dim() != 3 or u.numel() == 0 or not u.is_floating_point():
        raise InputError(f"{_NAME}: u must be a floating tensor (B, D, L), not empty; got {u.dtype} {tuple(u.shape)}.")
    batch, dim, length = u.shape
    if A.dim() != 2 or A.shape[0] != dim or A.is_complex():
        raise InputError(f"{_NAME}: A must be real (D, N) with D = {dim}; got {A.dtype} {tuple(A.shape)}.")
    n = A.shape[1]
    for name, value in (("delta", delta), ("z", z)):
        if value is not None and value.shape != u.shape:
            raise InputError(f"{_NAME}: {name} must have u's shape {tuple(u.shape)}; got {tuple(value.shape)}.")
    for name, value in (("D", D), ("delta_bias", delta_bias)):
        if value is not None and value.shape != (dim,):
            raise InputError(f"{_NAME}: {name} must be ({dim},); got {tuple(value.shape)}.")
    for name, value in (("B", B), ("C", C)):
        shape = tuple(value.shape)
        plain = shape == (batch, n, length)
        grouped = value.dim() == 4 and (shape[0], *shape[2:]) == (batch, n, length) and dim % max(shape[1], 1) == 0
        if not plain and not grouped:
            raise InputError(
                f"{_NAME}: {name} must be ({batch}, {n}, {length}) or ({batch}, G, {n}, {length}) with {dim} channels "
                f"divisible by G; got {shape}."
            )
    if (B.shape[1] if B.dim() == 4 else 1) != (C.shape[1] if C.dim() == 4 else 1):
        raise InputError(f"{_NAME}: B and C must have the same number of groups; got {B.shape} and {C.shape}.")


@functools.cache
def _implementation(backend: str) -> ModuleType:
    """The module behind "cpu" or "torch"; importing the CPU one compiles its kernels."""
    if backend == "torch":
        return importlib.import_module("mmkit.ops.selective_scan.reference")
    return cpu_kernels("selective_scan")


_STEPS = {"cpu": 64, "torch": 2048}  # distance of saved states; the modules' STEP, known here without importing them


def _chunks(length: int, backend: str) -> int:
    return (length + _STEPS[backend] - 1) // _STEPS[backend]


@torch.library.custom_op("mmkit::selective_scan_torch", mutates_args=())
def _torch_op(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation("torch").forward(u, dt, A, B, C)


@torch.library.custom_op("mmkit::selective_scan_torch_backward", mutates_args=())
def _torch_backward_op(
    gy: Tensor, glast: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _implementation("torch").backward(gy, glast, u, dt, A, B, C, states)


@_torch_op.register_fake
def _(u, dt, A, B, C):
    batch, dim, length = u.shape
    last = u.new_empty(batch, dim, A.shape[1])
    return u.new_empty(u.shape), last, u.new_empty(batch, _chunks(length, "torch"), dim, A.shape[1])


@_torch_backward_op.register_fake
def _(gy, glast, u, dt, A, B, C, states):
    return tuple(x.new_empty(x.shape) for x in (u, dt, A, B, C))


def _save_torch(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[2])
    ctx.mark_non_differentiable(output[2])


def _differentiate_torch(ctx, gy, glast, _):
    return _torch_backward_op(gy.contiguous(), glast.contiguous(), *ctx.saved_tensors)


_torch_op.register_autograd(_differentiate_torch, setup_context=_save_torch)


@torch.library.custom_op("mmkit::selective_scan_cpu", mutates_args=())
def _cpu_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],  # noqa: UP045  the schema is read from this annotation
    z: Optional[Tensor],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation("cpu").forward(u, delta, A, B, C, D, z, bias, softplus)


@torch.library.custom_op("mmkit::selective_scan_cpu_backward", mutates_args=())
def _cpu_backward_op(
    gout: Tensor,
    glast: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],  # noqa: UP045
    z: Optional[Tensor],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    softplus: bool,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _implementation("cpu").backward(gout, glast, u, delta, A, B, C, D, z, bias, softplus, states)


def _empty_tokens(u: Tensor) -> Tensor:
    """(B, D, L) with the channels next to each other in memory, the layout of the CPU kernels."""
    return u.new_empty(u.shape[0], u.shape[2], u.shape[1]).transpose(1, 2)


@_cpu_op.register_fake
def _(u, delta, A, B, C, D, z, bias, softplus):
    batch, dim, length = u.shape
    n = A.shape[1]
    return _empty_tokens(u), u.new_empty(batch, dim, n), u.new_empty(batch, _chunks(length, "cpu"), n, dim)


@_cpu_backward_op.register_fake
def _(gout, glast, u, delta, A, B, C, D, z, bias, softplus, states):
    batch, groups, n, length = B.shape
    gb, gc = (u.new_empty(batch, length, groups, n).permute(0, 2, 3, 1) for _ in range(2))
    dz = u.new_empty(0, 0, 0) if z is None else _empty_tokens(u)
    vectors = [u.new_empty(u.shape[1]) for _ in range(2)]
    return _empty_tokens(u), _empty_tokens(u), A.new_empty(A.shape), gb, gc, vectors[0], dz, vectors[1]


def _save_cpu(ctx, inputs, output):
    *tensors, ctx.softplus = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])


def _differentiate_cpu(ctx, gout, glast, _):
    *tensors, states = ctx.saved_tensors
    grads = _cpu_backward_op(gout, glast, *tensors, ctx.softplus, states)
    return (*(g if t is not None else None for g, t in zip(grads, tensors, strict=True)), None)


_cpu_op.register_autograd(_differentiate_cpu, setup_context=_save_cpu)


def _cpu_problem(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the Numba kernels run on CPU tensors only, not on {device.type}."
    return None if _HAS_NUMBA else "numba is missing: pip install numba."


_PREFERENCE = {"cuda": ("cuda", "torch"), "cpu": ("cpu", "torch"), "mps": ("torch",)}
_DOUBLE = {"cpu": ("torch",)}
_PROBLEMS = {
    "cuda": cuda.problem,
    "cpu": _cpu_problem,
    "torch": lambda device: None,
    "reference": lambda device: None,
}
