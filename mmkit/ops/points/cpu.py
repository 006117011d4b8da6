"""CPU kernels of the point operators (Numba): farthest point sampling and neighbours that skip what cannot matter.

Distances are (dx*dx + dy*dy) + dz*dz in float32, without fused or reordered arithmetic, so that every backend picks the same
indices.

Both keep the points in the leaves of a kd-tree, each with its box. A new sample can only bring points nearer that lie in a leaf
whose box is nearer to it than the leaf's farthest point is to the samples so far (QuickFPS, Han et al., IEEE TCAD 2023); a
neighbour only lies in a leaf whose box is not farther than the k-th one found. Rounding is monotone, so the distance to a box never
exceeds the computed distance to a point in it, and the result equals that of the plain algorithm to the last bit, ties included.
Every cloud, and every query, is answered by itself: the number of threads does not matter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from mmkit.ops.numba_kernels import kernel, run_jobs

_EXACT = {"nnan", "nsz"}  # the wrapper refuses NaN; sums keep their order
_SEARCHED = 512  # points in a leaf that is searched for neighbours
_COARSE = 1 << 18  # larger clouds are first sorted into a coarse grid, whose cells fit the processor's cache
_CELLS = 8  # along each axis of that grid
_INF_BITS = 0x7F800000  # of the float32 infinity; the bits of numbers from 0 on are ordered as the numbers are


@kernel("void(f4[:, ::1], f4[:, ::1], i4[::1], i4[::1])", _EXACT)
def _sort_by_cell(xyz: Any, columns: Any, order: Any, ends: Any) -> None:
    """Write the points into `columns` (3, N), one cell of the coarse grid after the other; `ends`: where each cell ends."""
    n = order.size
    low, scale = np.empty(3), np.empty(3)
    for axis in range(3):
        least = most = xyz[0, axis]
        for i in range(n):
            least, most = min(least, xyz[i, axis]), max(most, xyz[i, axis])
        low[axis] = least
        scale[axis] = 0.999 * _CELLS / max(np.float64(most) - np.float64(least), 1e-300)
    cell = np.empty(n, np.int16)
    for c in range(ends.size):
        ends[c] = 0
    for i in range(n):
        u = np.int64((xyz[i, 0] - low[0]) * scale[0])
        v = np.int64((xyz[i, 1] - low[1]) * scale[1])
        w = np.int64((xyz[i, 2] - low[2]) * scale[2])
        cell[i] = (u * _CELLS + v) * _CELLS + w
        ends[cell[i]] += 1
    total = np.int32(0)
    for c in range(ends.size):
        count = ends[c]
        ends[c] = total
        total += count
    x, y, z = columns[0], columns[1], columns[2]
    for i in range(n):
        j = ends[cell[i]]
        ends[cell[i]] = j + 1
        x[j], y[j], z[j], order[j] = xyz[i, 0], xyz[i, 1], xyz[i, 2], i


@kernel("i8(f4[:, ::1], f4[:, ::1], i4[::1], i4[:, ::1], i8)", _EXACT)
def _plant(xyz: Any, columns: Any, order: Any, leaves: Any, size: Any) -> Any:
    """Sort the points of `xyz` (N, 3) so that every leaf, `size` points at most, is one run; returns the number of leaves."""
    n = order.size
    x, y, z = columns[0], columns[1], columns[2]
    if n > _COARSE:
        ends = np.empty(_CELLS * _CELLS * _CELLS, np.int32)
        _sort_by_cell(xyz, columns, order, ends)
    else:
        ends = np.empty(1, np.int32)
        ends[0] = n
        for i in range(n):
            x[i], y[i], z[i], order[i] = xyz[i, 0], xyz[i, 1], xyz[i, 2], i
    stack = np.empty((64, 2), np.int64)
    found, begin = 0, 0
    for part in range(ends.size):
        end = int(ends[part])
        stack[0, 0], stack[0, 1] = begin, end
        begin, top = end, int(end > begin)
        while top:
            top -= 1
            lo, hi = stack[top, 0], stack[top, 1]
            if hi - lo <= size:
                leaves[found, 0], leaves[found, 1] = lo, hi
                found += 1
                continue
            key, mean, spread = x, np.float32(0), np.float32(-1)
            for axis in range(3):
                values = columns[axis]
                low = high = values[lo]
                total, seen = 0.0, 0
                for i in range(lo, hi, 1 + (hi - lo) // 512):  # a glance is enough to choose where to cut
                    v = values[i]
                    low, high = min(low, v), max(high, v)
                    total += v
                    seen += 1
                if high - low > spread:
                    key, mean, spread = values, np.float32(total / seen), high - low
            cut = lo
            for i in range(lo, hi):  # without a branch that cannot be foretold
                below = key[i] < mean
                a, b, c, o = x[i], y[i], z[i], order[i]
                x[i], y[i], z[i], order[i] = x[cut], y[cut], z[cut], order[cut]
                x[cut], y[cut], z[cut], order[cut] = a, b, c, o
                cut += below
            if cut in (lo, hi):  # equal points
                cut = (lo + hi) // 2
            large, small = (lo, cut), (cut, hi)
            if cut - lo < hi - cut:
                large, small = small, large
            stack[top, 0], stack[top, 1] = large  # the smaller part is cut first, so the stack stays short
            stack[top + 1, 0], stack[top + 1, 1] = small
            top += 2
    return found


@kernel("f4[:, ::1](f4[:, ::1], i4[:, ::1])", _EXACT)
def _boxes(columns: Any, leaves: Any) -> Any:
    """(6, leaves): the least x, y, z of each leaf and the largest."""
    box = np.empty((6, leaves.shape[0]), np.float32)
    for axis in range(3):
        for l in range(leaves.shape[0]):
            part = columns[axis, leaves[l, 0] : leaves[l, 1]]
            low = high = part[0]
            for i in range(part.size):
                low, high = min(low, part[i]), max(high, part[i])
            box[axis, l], box[axis + 3, l] = low, high
    return box


@kernel("void(f4[:, ::1], f4, f4, f4, f4[::1])", _EXACT)
def _gaps(box: Any, cx: Any, cy: Any, cz: Any, gap: Any) -> None:
    """The squared distance of a point to each box."""
    x0, y0, z0, x1, y1, z1 = box[0], box[1], box[2], box[3], box[4], box[5]
    zero = np.float32(0)
    for l in range(gap.size):
        dx = max(max(x0[l] - cx, cx - x1[l]), zero)
        dy = max(max(y0[l] - cy, cy - y1[l]), zero)
        dz = max(max(z0[l] - cz, cz - z1[l]), zero)
        gap[l] = (dx * dx + dy * dy) + dz * dz


@kernel("void(f4[:, ::1], f4[:, ::1], i4[::1], i4[:, ::1], f4[::1], i8, i8[::1])", _EXACT)
def _sample(xyz: Any, columns: Any, order: Any, leaves: Any, d: Any, start: Any, out: Any) -> None:
    """Farthest points of `xyz` (N, 3); `d`, in the order of the leaves, starts at infinity, or -1 for what is never picked."""
    count, far_away = leaves.shape[0], np.int32(2147483647)
    x, y, z, box = columns[0], columns[1], columns[2], _boxes(columns, leaves)
    gap, far = np.empty(count, np.float32), np.empty(count, np.float32)
    first = np.zeros(count, np.int32)  # the lowest index among a leaf's farthest points
    for l in range(count):
        far[l] = -1
        for i in range(leaves[l, 0], leaves[l, 1]):
            far[l] = max(far[l], d[i])
    last = start
    for step in range(out.size):
        out[step] = last
        cx, cy, cz = xyz[last, 0], xyz[last, 1], xyz[last, 2]
        _gaps(box, cx, cy, cz, gap)
        for l in range(count):
            if gap[l] < far[l]:
                lo, hi = leaves[l, 0], leaves[l, 1]
                xs, ys, zs, ds, who = x[lo:hi], y[lo:hi], z[lo:hi], d[lo:hi], order[lo:hi]
                most, index = np.float32(-1), far_away
                for i in range(ds.size):
                    dx, dy, dz = xs[i] - cx, ys[i] - cy, zs[i] - cz
                    ds[i] = min(ds[i], (dx * dx + dy * dy) + dz * dz)
                    most = max(most, ds[i])
                for i in range(ds.size):
                    index = min(index, who[i] if ds[i] == most else far_away)
                far[l], first[l] = most, index
        best, pick = np.float32(-1), far_away
        for l in range(count):
            best = max(best, far[l])
        for l in range(count):
            pick = min(pick, first[l] if far[l] == best else far_away)
        last = pick if best >= 0 else np.int32(0)


@kernel("i4(i4[::1], i4[::1], i8)", _EXACT)
def _bound(bits: Any, lanes: Any, k: Any) -> Any:
    """A little above the k-th least of `bits`: k of the `lanes`, each the least of its own share, do not exceed it."""
    size = lanes.size
    if bits.size < size:
        return np.int32(_INF_BITS)
    for i in range(size):
        lanes[i] = bits[i]
    for start in range(size, bits.size - size + 1, size):
        part = bits[start : start + size]
        for i in range(size):
            lanes[i] = min(lanes[i], part[i])
    low = high = np.int32(0)
    for i in range(size):
        high = max(high, lanes[i])
    for _ in range(12):
        middle = np.int32(low + (high - low) // 2)
        inside = np.int32(0)
        for i in range(size):
            inside += np.int32(lanes[i] <= middle)
        if inside >= k:
            high = middle
        else:
            low = np.int32(middle + 1)
    return high


@kernel("void(f4[:, ::1], i4[::1], i4[:, ::1], f4[:, ::1], i8[:, ::1])", _EXACT)
def _nearest(columns: Any, order: Any, leaves: Any, query: Any, out: Any) -> None:
    """The nearest points to each of `query`, ascending, ties by index."""
    count, k = leaves.shape[0], out.shape[1]
    x, y, z, box = columns[0], columns[1], columns[2], _boxes(columns, leaves)
    gap, d = np.empty(count, np.float32), np.empty(_SEARCHED, np.float32)
    gap_bits, d_bits = gap.view(np.int32), d.view(np.int32)
    near, lanes = np.empty(_SEARCHED + 1, np.int32), np.empty(max(4 * k, 16), np.int32)
    best = np.empty(k + 1, np.int64)  # bits of the distance, then the index; from 1 on
    best[0], one = -1, np.uint64(1)
    for q in range(query.shape[0]):
        cx, cy, cz = query[q, 0], query[q, 1], query[q, 2]
        _gaps(box, cx, cy, cz, gap)
        least, home = np.int32(_INF_BITS), 0
        for l in range(count):
            least = min(least, gap_bits[l])
        while gap_bits[home] != least:
            home += 1
        worst, found = np.int32(_INF_BITS), 0
        for step in range(count):
            l = home + step - (count if home + step >= count else 0)
            if gap_bits[l] > worst:
                continue
            lo, hi = leaves[l, 0], leaves[l, 1]
            xs, ys, zs, who, bits = x[lo:hi], y[lo:hi], z[lo:hi], order[lo:hi], d_bits[: hi - lo]
            for i in range(xs.size):
                dx, dy, dz = xs[i] - cx, ys[i] - cy, zs[i] - cz
                d[i] = (dx * dx + dy * dy) + dz * dz
            if step == 0:
                worst = _bound(bits, lanes, k)
            count_near = 0
            for i in range(bits.size):
                near[count_near] = i
                count_near += bits[i] <= worst
            for n in range(count_near):
                i = near[n]
                key = (np.int64(bits[i]) << 32) | np.int64(who[i])
                if found < k:
                    found += 1
                elif key > best[k]:
                    continue
                j = np.uint64(found)  # unsigned: never counted from the end
                while best[j - one] > key:
                    best[j] = best[j - one]
                    j -= one
                best[j] = key
                if found == k:
                    worst = np.int32(best[k] >> 32)
        for i in range(k):
            out[q, i] = best[i + 1] & 0x7FFFFFFF


@kernel("void(f4[:, ::1], f4[:, ::1], f4, i8[:, ::1])", _EXACT)
def _ball(ref: Any, query: Any, radius: Any, out: Any) -> None:
    k, limit = out.shape[1], radius * radius
    for q in range(query.shape[0]):
        cx, cy, cz = query[q, 0], query[q, 1], query[q, 2]
        count = 0
        for i in range(ref.shape[0]):
            dx, dy, dz = ref[i, 0] - cx, ref[i, 1] - cy, ref[i, 2] - cz
            if (dx * dx + dy * dy) + dz * dz < limit:
                out[q, count] = i
                count += 1
                if count == k:
                    break
        for j in range(count, k):
            out[q, j] = out[q, 0] if count else 0


class _Tree(NamedTuple):
    columns: Any
    order: Any
    leaves: Any


def _tree(xyz: Any, size: int) -> _Tree:
    """The points of a cloud (N, 3) in leaves of up to `size`."""
    n = len(xyz)
    columns, order, leaves = np.empty((3, n), np.float32), np.empty(n, np.int32), np.empty((n, 2), np.int32)
    return _Tree(columns, order, leaves[: _plant(xyz, columns, order, leaves, size)])


def farthest_point_sample(xyz: Any, m: int, start: Any, never: Any) -> Any:
    """See the operator: (B, N, 3) float32, (B,) int64 starts, (B, N) bool of points that are never picked -> (B, m) int64."""
    out = np.empty((len(xyz), m), np.int64)
    run_jobs(_sample_cloud, [(xyz[b], start[b], never[b], out[b]) for b in range(len(xyz))])
    return out


def _sample_cloud(xyz: Any, start: int, never: Any, out: Any) -> None:
    n = len(xyz)
    tree = _tree(xyz, min(max(int((n / 2) ** 0.5), 128), 2048))  # balances boxes against points per step
    d = np.full(n, np.inf, np.float32)
    if never.any():
        d[never[tree.order]] = -1
    _sample(xyz, *tree, d, start, out)


def knn(ref: Any, query: Any, k: int) -> Any:
    """(B, N, 3), (B, M, 3) float32 -> indices (B, M, k) int64."""
    out = np.empty((len(ref), query.shape[1], k), np.int64)
    trees: list[Any] = [None] * len(ref)
    run_jobs(_keep_tree, [(trees, b, ref[b]) for b in range(len(ref))])
    step = -(-len(ref) * query.shape[1] // torch.get_num_threads())  # one cloud's queries are shared among the threads
    run_jobs(
        _nearest,
        [
            (*trees[b], query[b, i : i + step], out[b, i : i + step])
            for b in range(len(ref))
            for i in range(0, query.shape[1], step)
        ],
    )
    return out


def _keep_tree(trees: list[Any], b: int, xyz: Any) -> None:
    trees[b] = _tree(xyz, _SEARCHED)


def ball_query(ref: Any, query: Any, radius: float, k: int) -> Any:
    """(B, N, 3), (B, M, 3) float32 -> indices (B, M, k) int64."""
    out = np.empty((len(ref), query.shape[1], k), np.int64)
    run_jobs(_ball, [(ref[b], query[b], np.float32(radius), out[b]) for b in range(len(ref))])
    return out
