"""The sampling step of deformable attention (arXiv 2010.04159, equation 3), without a compiled extension.

Every query reads each head's map at a few places between the cells and adds up what it finds. `multi_scale_deformable_attention` takes
places and weights, and is plain torch (grid_sample). `deformable_grid_attention` makes both itself for queries that form a grid, which
spares their tensors; its backends are `torch` (any device and dtype) and `cpu` (Numba kernels with their backward, float32).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mmkit.errors import InputError
from mmkit.ops.backends import choose_backend
from mmkit.ops.compiling import cpu_kernels
from mmkit.ops.deformable_attention.reference import located, sample_and_sum

_NAME = "deformable_grid_attention"
_HAS_NUMBA = importlib.util.find_spec("numba") is not None  # looked up here: dynamo cannot trace the lookup


def multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Bilinear samples of `value` at `sampling_locations`, summed with `attention_weights`; zeros outside the maps.

    Args:
        value: (B, S, M, D): the maps of all levels one after another, row by row, S = sum of H * W; M heads.
        spatial_shapes: (H, W) of each of the L levels.
        sampling_locations: (B, N, M, L, K, 2), K places (x, y) per query, head and level; 0..1 spans a map from edge to edge.
        attention_weights: (B, N, M, L, K), usually a softmax over L * K.

    Returns:
        (B, N, M * D) in the dtype of `value`. Half precision is computed in float32, as the authors of PIIP do.

    Raises `InputError` for shapes that do not fit together.
    """
    shapes = [(int(h), int(w)) for h, w in spatial_shapes]
    _check("multi_scale_deformable_attention", value, shapes, sampling_locations, attention_weights)
    value_, places, weights = (t.to(_work(value)) for t in (value, sampling_locations, attention_weights))
    return sample_and_sum(value_, shapes, places, weights).to(value.dtype)


def deformable_grid_attention(
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    query_grid: tuple[int, int],
    feature_grid: tuple[int, int],
    backend: str = "auto",
) -> Tensor:
    """Deformable attention of queries that form a grid on one map that covers the same picture.

    Args:
        value: (B, S, M, D), the map row by row; M heads.
        offsets: (B, N, M, K, 2), (x, y) of K places from the centre of each query's cell, in cells of the map.
        logits: (B, N, M, K); their softmax over K weighs the places.
        query_grid, feature_grid: (H, W) of the queries, N = H * W, and of the map, S = H * W.
        backend: "auto", "cpu" or "torch". Auto takes the Numba kernels for float32 on the CPU.

    Returns:
        (B, N, M * D) in the dtype of `value`. Half precision is computed in float32.

    Raises:
        InputError: shapes that do not fit together, or an unknown backend.
        BackendUnavailableError: the requested backend cannot run here.
    """
    _check(_NAME, value, [feature_grid], offsets[:, :, :, None], logits[:, :, :, None])
    if query_grid[0] * query_grid[1] != logits.shape[1]:
        raise InputError(f"{_NAME}: a grid of {query_grid} does not have the {logits.shape[1]} queries.")
    tensors = [t.to(_work(value)) for t in (value, offsets, logits)]
    if _chosen(backend, value) == "cpu":
        out = _cpu_op(*(t.contiguous() for t in tensors), [*query_grid, *feature_grid])
    else:
        places, weights = located(tensors[1], query_grid, feature_grid), tensors[2].softmax(-1)
        out = sample_and_sum(tensors[0], [feature_grid], places[:, :, :, None], weights[:, :, :, None])
    return out.to(value.dtype)


def _work(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _chosen(backend: str, value: Tensor) -> str:
    double = _work(value) == torch.float64
    if double and backend == "cpu":
        raise InputError(f"{_NAME}: backend 'cpu' computes in float32; use backend='torch' for float64.")
    plain = (
        double or value.device.type == "meta" or torch.compiler.is_exporting()
    )  # other programs have no kernels of ours
    preference = _PLAIN if plain else _PREFERENCE
    return choose_backend(_NAME, backend, value.device, preference, _PROBLEMS)


def _check(name: str, value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    if value.dim() != 4 or not value.is_floating_point():
        raise InputError(f"{name}: value must be floating (B, S, M, D); got {value.dtype} {tuple(value.shape)}.")
    batch, cells, heads, _ = value.shape
    if not shapes or min(min(s) for s in shapes) < 1 or sum(h * w for h, w in shapes) != cells:
        raise InputError(f"{name}: maps of {shapes} do not have the {cells} cells of value {tuple(value.shape)}.")
    wanted = (batch, heads, len(shapes))
    found = (weights.shape[0], *weights.shape[2:4]) if weights.dim() == 5 else None
    if found != wanted or tuple(locations.shape) != (*weights.shape, 2):
        raise InputError(
            f"{name}: with value {tuple(value.shape)} and {len(shapes)} levels, weights must be ({batch}, N, {heads}, "
            f"{len(shapes)}, K) and locations the same with a last axis of 2; got {tuple(weights.shape)}, {tuple(locations.shape)}."
        )


@functools.cache
def _kernels() -> ModuleType:
    return cpu_kernels("deformable_attention")


@torch.library.custom_op("mmkit::deformable_grid_attention_cpu", mutates_args=())
def _cpu_op(value: Tensor, offsets: Tensor, logits: Tensor, grids: list[int]) -> Tensor:
    return _kernels().forward(value, offsets, logits, grids)


@torch.library.custom_op("mmkit::deformable_grid_attention_cpu_backward", mutates_args=())
def _cpu_backward_op(
    grad: Tensor, value: Tensor, offsets: Tensor, logits: Tensor, grids: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels().backward(grad, value, offsets, logits, grids)


@_cpu_op.register_fake
def _(value, offsets, logits, grids):
    return value.new_empty(value.shape[0], logits.shape[1], value.shape[2] * value.shape[3])


@_cpu_backward_op.register_fake
def _(grad, value, offsets, logits, grids):
    return tuple(t.new_empty(t.shape) for t in (value, offsets, logits))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.grids = inputs[3]


def _differentiate(ctx, grad):
    return *_cpu_backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.grids), None


_cpu_op.register_autograd(_differentiate, setup_context=_save)


def _cpu_problem(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on CPU tensors, not on {device}"
    return None if _HAS_NUMBA else "numba is missing (pip install numba)"


_PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("torch",), "mps": ("torch",)}
_PLAIN = {"cpu": ("torch",)}
_PROBLEMS = {"cpu": _cpu_problem, "torch": lambda device: None}
