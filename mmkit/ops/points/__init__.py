"""Point cloud operators: farthest point sampling, neighbours, grouping, interpolation, Chamfer distance.

Clouds are (B, N, 3); indices are int64. Backends: `cpu` (Numba, float32 coordinates), `torch` (any device and type). Both pick the
same indices, ties by the lowest one. Half-precision coordinates are computed in float32. Neighbours among float64 coordinates come
from scipy's kd-tree, which may choose another point among those that are equally far at the k-th place. Indices carry no gradient;
distances, gathered points, interpolated features and Chamfer distances do.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmkit.errors import InputError
from mmkit.ops.backends import choose_backend
from mmkit.ops.compiling import cpu_kernels
from mmkit.ops.points import reference

ORIGIN = 1e-3
"""Squared distance from the origin below which `skip_origin` never picks a point."""

_HAS_NUMBA = importlib.util.find_spec("numba") is not None


class PointGroups(NamedTuple):
    """What `group_points` returns.

    Attributes:
        neighborhood: (B, G, K, 3) points around each centre, minus the centre.
        center: (B, G, 3).
        idx: (B, G, K) which points. center_idx: (B, G).
    """

    neighborhood: Tensor
    center: Tensor
    idx: Tensor
    center_idx: Tensor


def farthest_point_sample(
    xyz: Tensor,
    m: int,
    start: int | Tensor = 0,
    *,
    mask: Tensor | None = None,
    skip_origin: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Choose m points, each the farthest from those before it.

    On the CPU the cloud is kept in the leaves of a tree and only those that a new sample can change are visited; the result is
    that of the plain algorithm to the last bit.

    Args:
        xyz: (B, N, 3), finite.
        m: how many; with m > N points repeat.
        start: index of the first one, or one per cloud (B,).
        mask: (B, N), true where a point may be picked. The first one is taken as given.
        skip_origin: never pick points with a squared norm of up to 1e-3, as the widespread CUDA extension of PointNet++ does; needed
            to reproduce what was computed with released checkpoints. Where nothing else is left, point 0 repeats.
        backend: "auto", "cpu" or "torch".

    Returns:
        Indices (B, m), without a gradient.

    Raises:
        InputError: wrong shapes, an empty cloud, NaN or infinite coordinates, a start outside the cloud.
    """
    xyz = _points("farthest_point_sample", xyz).detach()
    batch, n = xyz.shape[:2]
    first = torch.as_tensor(start, device=xyz.device, dtype=torch.long).expand(batch)
    if m < 1 or not 0 <= int(first.min()) <= int(first.max()) < n:
        raise InputError(f"farthest_point_sample: m must be at least 1 and start lie in 0..{n - 1}; got {m}, {start}.")
    never = torch.zeros(batch, n, dtype=torch.bool, device=xyz.device) if mask is None else ~mask.bool()
    if never.shape != (batch, n):
        raise InputError(f"farthest_point_sample: mask must be {(batch, n)}, not {tuple(never.shape)}.")
    if skip_origin:
        never = never | (reference.squared(xyz, torch.zeros_like(xyz[:, :1])) <= ORIGIN)
    if _chosen("farthest_point_sample", backend, xyz) == "cpu":
        return torch.from_numpy(_kernels().farthest_point_sample(_array(xyz), m, first.tolist(), never.numpy()))
    return reference.farthest_point_sample(xyz, m, first, never)


def knn(ref: Tensor, query: Tensor, k: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The k nearest points of `ref` to each point of `query`, ascending.

    Args:
        ref: (B, N, 3). query: (B, M, 3); a point that is in `ref` finds itself first.
        k: 1..N.
        backend: "auto", "cpu" or "torch".

    Returns:
        Euclidean distances (B, M, k), differentiable, with gradient 0 where a distance is 0; indices (B, M, k).

    Raises `InputError` for wrong shapes, empty or non-finite clouds, or k outside 1..N.
    """
    idx = knn_indices(ref, query, k, backend=backend)
    ref, query = _points("knn", ref), _points("knn", query)
    d = reference.squared(query.unsqueeze(2), gather_points(ref, idx))
    return _root(d), idx


def knn_indices(ref: Tensor, query: Tensor, k: int, *, backend: str = "auto") -> Tensor:
    """The indices of `knn` alone."""
    ref, query = _points("knn", ref).detach(), _points("knn", query).detach()
    _same_batch("knn", ref, query)
    if not 1 <= k <= ref.shape[1]:
        raise InputError(f"knn: k must lie in 1..{ref.shape[1]}, the number of points; got {k}.")
    if _chosen("knn", backend, ref, query) != "cpu":
        return reference.knn(ref, query, k)
    if ref.dtype == query.dtype == torch.float32:
        return torch.from_numpy(_kernels().knn(_array(ref), _array(query), k))
    return torch.stack([_tree_search(r, q, k) for r, q in zip(ref, query, strict=True)])


def ball_query(ref: Tensor, query: Tensor, radius: float, k: int, *, backend: str = "auto") -> Tensor:
    """The first k points of `ref`, by index, that are nearer than `radius` to each point of `query`: indices (B, M, k).

    Missing ones repeat the first, all are 0 where there is none, as in PointNet++. Raises `InputError` as `knn` does.
    """
    ref, query = _points("ball_query", ref).detach(), _points("ball_query", query).detach()
    _same_batch("ball_query", ref, query)
    if k < 1 or not radius > 0:
        raise InputError(f"ball_query: radius must be above 0 and k at least 1; got {radius}, {k}.")
    if _chosen("ball_query", backend, ref, query) == "cpu" and ref.dtype == torch.float32:
        return torch.from_numpy(_kernels().ball_query(_array(ref), _array(query), radius, k))
    return reference.ball_query(ref, query, radius, k)


def gather_points(x: Tensor, idx: Tensor) -> Tensor:
    """Rows of `x` (B, N, C) at `idx` (B, ...) -> (B, ..., C), differentiable in `x`."""
    flat = idx.reshape(len(idx), -1, 1)
    return x.gather(1, flat.expand(-1, -1, x.shape[-1])).reshape(*idx.shape, x.shape[-1])


def group_points(
    xyz: Tensor, num_groups: int, group_size: int, *, skip_origin: bool = False, backend: str = "auto"
) -> PointGroups:
    """Cut clouds into overlapping groups: farthest point centres and their nearest neighbours, as Point-BERT and Point-MAE do.

    Args:
        xyz: (B, N, 3); the first point is the first centre. Gradients reach the returned coordinates.
        num_groups: G; with G > N centres repeat. group_size: K, up to N.
        skip_origin: see `farthest_point_sample`.

    Raises `InputError` as `farthest_point_sample` and `knn` do.
    """
    xyz = _points("group_points", xyz)
    center_idx = farthest_point_sample(xyz, num_groups, skip_origin=skip_origin, backend=backend)
    center = gather_points(xyz, center_idx)
    idx = knn_indices(xyz, center, group_size, backend=backend)
    return PointGroups(gather_points(xyz, idx) - center.unsqueeze(2), center, idx, center_idx)


def three_interpolate(
    xyz1: Tensor, xyz2: Tensor, feat2: Tensor, k: int = 3, *, eps: float = 1e-8, backend: str = "auto"
) -> Tensor:
    """Carry features from the points `xyz2` (B, S, 3) to the points `xyz1` (B, N, 3) by inverse squared distance.

    Args:
        feat2: (B, S, C).
        k: how many nearest points count; S takes all of them without a search, more than S is S.
        eps: added to the squared distances.

    Returns:
        (B, N, C), differentiable in coordinates and features.
    """
    xyz1, xyz2 = _points("three_interpolate", xyz1), _points("three_interpolate", xyz2)
    _same_batch("three_interpolate", xyz1, xyz2)
    if k < 1 or feat2.shape[:2] != xyz2.shape[:2]:
        raise InputError(
            f"three_interpolate: needs k >= 1 and features (B, {xyz2.shape[1]}, C); got {k}, {tuple(feat2.shape)}."
        )
    if k >= xyz2.shape[1]:
        return inverse_distance_weights(xyz1, xyz2, eps).to(feat2.dtype) @ feat2
    idx = knn_indices(xyz2, xyz1, k, backend=backend)
    weights = 1 / (reference.squared(xyz1.unsqueeze(2), gather_points(xyz2, idx)) + eps)
    weights = (weights / weights.sum(-1, keepdim=True)).to(feat2.dtype)
    return (weights.unsqueeze(-1) * gather_points(feat2, idx)).sum(2)


def inverse_distance_weights(xyz1: Tensor, xyz2: Tensor, eps: float = 1e-8) -> Tensor:
    """Weights (B, N, S), each row summing to 1, of all points `xyz2` for each of `xyz1`: 1 / (squared distance + eps)."""
    weights = 1 / (reference.squared(xyz1.unsqueeze(2), xyz2.unsqueeze(1)) + eps)
    return weights / weights.sum(-1, keepdim=True)


def chamfer_distance(
    a: Tensor, b: Tensor, norm: str = "l2", reduction: str = "mean", *, backend: str = "auto"
) -> Tensor:
    """How far two clouds are from each other: each point against the nearest of the other cloud.

    Args:
        a: (B, N, 3). b: (B, M, 3).
        norm: "l2": mean squared distance, both directions added; "l1": mean distance, both directions averaged.
        reduction: "mean" over the batch, or "none" for (B,).

    Raises `InputError` for other words, and as `knn` does.
    """
    if norm not in ("l1", "l2") or reduction not in ("mean", "none"):
        raise InputError(
            f"chamfer_distance: norm is 'l1' or 'l2', reduction 'mean' or 'none'; got {norm!r}, {reduction!r}."
        )
    a, b = _points("chamfer_distance", a), _points("chamfer_distance", b)
    _same_batch("chamfer_distance", a, b)
    forth, back = (_nearest_squared(x, y, backend) for x, y in ((a, b), (b, a)))
    if norm == "l1":
        forth, back = _root(forth) / 2, _root(back) / 2
    each = forth.mean(1) + back.mean(1)
    return each.mean() if reduction == "mean" else each


def _nearest_squared(x: Tensor, y: Tensor, backend: str) -> Tensor:
    """(B, N): squared distance of each point of x to the nearest of y, differentiable."""
    if x.shape[1] * y.shape[1] <= 4096 and backend == "auto":  # many tiny clouds: all pairs at once
        with torch.no_grad():
            idx = reference.squared(x.unsqueeze(2), y.unsqueeze(1)).argmin(-1)
    else:
        idx = knn_indices(y, x, 1, backend=backend).squeeze(-1)
    return reference.squared(x, gather_points(y, idx))


def _root(d: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0."""
    positive = d > 0
    return torch.where(positive, torch.where(positive, d, 1).sqrt(), d)


def _tree_search(ref: Tensor, query: Tensor, k: int) -> Tensor:
    from scipy.spatial import cKDTree

    d, idx = cKDTree(ref.numpy()).query(query.numpy(), k, workers=torch.get_num_threads())
    d, idx = d.reshape(len(query), k), idx.reshape(len(query), k)
    return torch.from_numpy(np.take_along_axis(idx, np.lexsort((idx, d), axis=-1), -1).astype(np.int64))


def _points(op: str, xyz: Any) -> Tensor:
    """A checked cloud, in float32 at least."""
    if not isinstance(xyz, Tensor) or xyz.dim() != 3 or xyz.shape[-1] != 3 or not xyz.is_floating_point():
        found = f"{xyz.dtype} {tuple(xyz.shape)}" if isinstance(xyz, Tensor) else type(xyz).__name__
        raise InputError(f"{op}: points are a floating tensor (B, N, 3); got {found}.")
    if 0 in xyz.shape:
        raise InputError(f"{op}: the cloud is empty: {tuple(xyz.shape)}.")
    if not torch.compiler.is_compiling() and not torch.isfinite(xyz.detach().sum()) and not torch.isfinite(xyz).all():
        raise InputError(f"{op}: the cloud has NaN or infinite coordinates; remove those points first.")
    return xyz.float() if xyz.dtype in (torch.float16, torch.bfloat16) else xyz


def _same_batch(op: str, a: Tensor, b: Tensor) -> None:
    if len(a) != len(b):
        raise InputError(f"{op}: {len(a)} clouds do not fit {len(b)}.")


def _array(xyz: Tensor) -> np.ndarray:
    return np.ascontiguousarray(xyz.numpy())


def _chosen(op: str, backend: str, *clouds: Tensor) -> str:
    double = any(c.dtype == torch.float64 for c in clouds)
    if double and backend == "cpu" and op == "farthest_point_sample":
        raise InputError(f"{op}: backend 'cpu' computes in float32; use backend='torch' for float64.")
    if double and op == "farthest_point_sample":
        return choose_backend(op, backend, clouds[0].device, {"cpu": ("torch",)}, _PROBLEMS)
    return choose_backend(op, backend, clouds[0].device, _PREFERENCE, _PROBLEMS)


@functools.cache
def _kernels() -> ModuleType:
    return cpu_kernels("points")


def _cpu_problem(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the CPU kernels take CPU tensors only, not {device.type}."
    return None if _HAS_NUMBA else "numba is missing: pip install numba."


_PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("torch",), "mps": ("torch",)}
_PROBLEMS = {"cpu": _cpu_problem, "torch": lambda device: None}
