"""Compositing on the CPU, front to back, forward and backward: tiles of 16 x 16 pixels as 32 groups of eight pixels of a row.

Group g < 16 is the left half of row g, group g + 16 its right half. For each Gaussian of a tile's list one vector computation finds
the groups its ellipse reaches; only those are touched, and only while one of their pixels still lets light through (a pixel that
does not has its transmittance stored negative). The backward pass walks front to back a second time: what lies behind a Gaussian
is the whole less what has been passed. Each (Gaussian, tile) pair has its own row of gradients, summed per Gaussian afterwards in
a fixed order, so that results do not depend on the number of threads.
"""

from __future__ import annotations

import numba
import numpy as np

from mmkit.ops.gaussian.settings import ALPHA_MIN, T_STOP, TILE
from mmkit.ops.gaussian.simd import (
    bits,
    both,
    exp2,
    fma,
    load,
    lowest_bit,
    prefetch,
    ramp,
    select,
    splat,
    spread,
    store,
    total,
    vabs,
    vmin,
    vsqrt,
)  # fmt: skip
from mmkit.ops.gaussian.tiles import HEAD
from mmkit.ops.numba_kernels import kernel

JOBS = 48
"""Parts into which an image's tiles are dealt."""

MOMENTS = 8
"""Floats of a pair's gradients before those of its features: sums over pixels of s, s x, s x^2, s y, s x y, s y^2 (s: gradient of
alpha times alpha; x, y: from the mean to the pixel) and of the absolute gradients of the mean."""

_GROUPS, _LANES = 32, 8
_AHEAD = 6  # entries of a list between asking for a record and using it
_F = np.float32
_HALF, _ZERO, _ONE = _F(0.5), _F(0), _F(1)
_ALPHA_MIN, _T_STOP = _F(ALPHA_MIN), _F(T_STOP)
_NEAR = _F(0.01)
_LN4 = _F(1.3862943611198906)  # -2 / -log2(e): from half a scaled conic back to the conic

_inline = numba.njit(error_model="numpy")


@_inline
def _half_groups(shear, wide, bend, mx, my, row):
    """Bits of the left and right groups of eight rows from `row` on that the ellipse reaches."""
    y = ramp(_F(row) + _HALF - my)
    room = splat(wide) - splat(bend) * (y * y)
    root = vsqrt(room)
    middle = splat(mx) - splat(shear) * y
    low, high = middle - root, middle + root
    there = room >= splat(_ZERO)
    left = both(there, both(high >= splat(_HALF - _NEAR), low <= splat(_F(7.5) + _NEAR)))
    right = both(there, both(high >= splat(_F(8.5) - _NEAR), low <= splat(_F(15.5) + _NEAR)))
    return (bits(left) | (bits(right) << 16)) << row


@_inline
def _groups(records, at, mx, my):
    """One bit for each group the Gaussian reaches."""
    shear, wide, bend = records[at + 6], records[at + 7], records[at + 8]
    return _half_groups(shear, wide, bend, mx, my, 0) | _half_groups(shear, wide, bend, mx, my, 8)


@_inline
def _alpha(records, at, x, y):
    """Opacity times density in eight pixels at (x, y) from the mean, two vectors."""
    steep = fma(spread(records, at + 2), x, spread(records, at + 3) * y)
    exponent = fma(steep, x, spread(records, at + 4) * (y * y))
    return spread(records, at + 5) * exp2(exponent)


@_inline
def _blend(alpha, before):
    """Weights, the light left, negative where this Gaussian would leave too little, and where it is blended.

    Light that stays as it is is written as a difference: LLVM would make a masked store of a choice, which is slow.
    """
    weight = alpha * before
    seen = alpha >= splat(_ALPHA_MIN)
    after = before - weight
    blended = both(seen, after > splat(_T_STOP))
    weight = select(blended, weight, splat(_ZERO))
    shut = both(seen, after <= splat(_T_STOP))
    return weight, select(shut, splat(_ZERO) - vabs(before), before - weight), blended


@_inline
def _pixel_centres():
    """x of each pixel and y of each group, from the corner of a tile."""
    xs, ys = np.empty(_GROUPS * _LANES, np.float32), np.empty(_GROUPS, np.float32)
    for g in range(_GROUPS):
        ys[g] = (g & 15) + 0.5
        for lane in range(_LANES):
            xs[g * _LANES + lane] = (g >> 4) * _LANES + lane + 0.5
    return xs, ys


@_inline
def _start_tile(light, wide, high):
    """All light in the `wide` x `high` pixels of the image, done elsewhere; returns the bits of groups with pixels."""
    alive = 0
    for g in range(_GROUPS):
        inside = min(max(wide - (g >> 4) * _LANES, 0), _LANES) if (g & 15) < high else 0
        for lane in range(_LANES):
            light[g * _LANES + lane] = _ONE if lane < inside else -_ONE
        if inside > 0:
            alive |= 1 << g
    return alive


_TILE_ARGUMENTS = "f4[::1], i8, i8, i8[::1], i4[::1], i4[::1], i8, i8, i8, i8, i8, f4"


@kernel(f"void({_TILE_ARGUMENTS}, f4[::1], f4[:,:,::1], f4[:,::1])")
def forward(
    records, stride, channels, tile_starts, list_records, list_pairs, width, height, across, first, step, alpha_max,
    background, out, alphas,
):  # fmt: skip
    """Tiles `first`, `first + step`, ... of one image: colours over `background` and alphas."""
    xs, ys = _pixel_centres()
    light = np.empty(_GROUPS * _LANES, np.float32)
    sums = np.empty(_GROUPS * _LANES * channels, np.float32)
    for tile in range(first, tile_starts.shape[0] - 1, step):
        ox, oy = (tile % across) * TILE, (tile // across) * TILE
        wide, high = min(width - ox, TILE), min(height - oy, TILE)
        alive = _start_tile(light, wide, high)
        sums[:] = 0
        ahead = tile_starts[tile + 1] - 1
        for place in range(tile_starts[tile], tile_starts[tile + 1]):
            prefetch(records, list_records[min(place + _AHEAD, ahead)] * stride)
            at = list_records[place] * stride
            mx, my = records[at] - _F(ox), records[at + 1] - _F(oy)
            todo = _groups(records, at, mx, my) & alive
            while todo != 0:
                g = lowest_bit(todo)
                todo &= todo - 1
                x, y = load(xs, g * _LANES) - splat(mx), spread(ys, g) - splat(my)
                alpha = vmin(_alpha(records, at, x, y), splat(alpha_max))
                before = load(light, g * _LANES)
                weight, left, _ = _blend(alpha, before)
                store(light, g * _LANES, left)
                for channel in range(channels):
                    here = (g * channels + channel) * _LANES
                    store(sums, here, fma(weight, spread(records, at + HEAD + channel), load(sums, here)))
                if bits(left > splat(_ZERO)) == 0:
                    alive &= ~(1 << g)
            if alive == 0:
                break
        for row in range(high):
            for column in range(wide):
                g, lane = row + (column >> 3) * 16, column & 7
                rest = abs(light[g * _LANES + lane])
                alphas[oy + row, ox + column] = _ONE - rest
                for channel in range(channels):
                    value = sums[(g * channels + channel) * _LANES + lane]
                    out[oy + row, ox + column, channel] = value + rest * background[channel]


@kernel(f"void({_TILE_ARGUMENTS}, f4[:,:,::1], f4[:,::1], f4[:,:,::1], f4[:,::1], b1, f4[:,::1])")
def backward(
    records, stride, channels, tile_starts, list_records, list_pairs, width, height, across, first, step, alpha_max,
    out, alphas, g_out, g_alphas, absolute, g_pairs,
):  # fmt: skip
    """Tiles `first`, `first + step`, ...: one row of `g_pairs` per (Gaussian, tile), `MOMENTS` + channels floats."""
    xs, ys = _pixel_centres()
    light = np.empty(_GROUPS * _LANES, np.float32)
    rest = np.empty(_GROUPS * _LANES, np.float32)
    slopes = np.empty(_GROUPS * _LANES * channels, np.float32)
    of_features = np.empty(_LANES * channels, np.float32)
    zero = splat(_ZERO)
    for tile in range(first, tile_starts.shape[0] - 1, step):
        ox, oy = (tile % across) * TILE, (tile // across) * TILE
        wide, high = min(width - ox, TILE), min(height - oy, TILE)
        alive = _start_tile(light, wide, high)
        slopes[:] = 0
        rest[:] = 0
        for row in range(high):
            for column in range(wide):
                g, lane = row + (column >> 3) * 16, column & 7
                py, px = oy + row, ox + column
                whole = _ZERO
                for channel in range(channels):
                    slope = g_out[py, px, channel]
                    slopes[(g * channels + channel) * _LANES + lane] = slope
                    whole += slope * out[py, px, channel]
                rest[g * _LANES + lane] = whole - g_alphas[py, px] * (_ONE - alphas[py, px])
        place, end = tile_starts[tile], tile_starts[tile + 1]
        ahead = end - 1
        while place < end and alive != 0:
            prefetch(records, list_records[min(place + _AHEAD, ahead)] * stride)
            at = list_records[place] * stride
            pair = list_pairs[place]
            place += 1
            mx, my = records[at] - _F(ox), records[at + 1] - _F(oy)
            todo = _groups(records, at, mx, my) & alive
            s0, sx, sxx, sy, sxy, syy, ax, ay = zero, zero, zero, zero, zero, zero, zero, zero
            of_features[:] = 0
            while todo != 0:
                g = lowest_bit(todo)
                todo &= todo - 1
                x, y = load(xs, g * _LANES) - splat(mx), spread(ys, g) - splat(my)
                full = _alpha(records, at, x, y)
                alpha = vmin(full, splat(alpha_max))
                before = load(light, g * _LANES)
                weight, left, blended = _blend(alpha, before)
                store(light, g * _LANES, left)
                dot = zero
                for channel in range(channels):
                    slope = load(slopes, (g * channels + channel) * _LANES)
                    dot = fma(slope, spread(records, at + HEAD + channel), dot)
                    here = channel * _LANES
                    store(of_features, here, fma(weight, slope, load(of_features, here)))
                behind = load(rest, g * _LANES) - weight * dot
                store(rest, g * _LANES, behind)
                g_alpha = before * dot - behind / (splat(_ONE) - alpha)
                s = select(both(blended, full <= splat(alpha_max)), alpha * g_alpha, zero)
                x1, y1 = s * x, s * y
                s0 = s0 + s
                sx = sx + x1
                sxx = fma(x1, x, sxx)
                sy = sy + y1
                sxy = fma(x1, y, sxy)
                syy = fma(y1, y, syy)
                if absolute:
                    a, b, c = records[at + 2] * _LN4, records[at + 3] * _LN4 * _HALF, records[at + 4] * _LN4
                    ax = ax + vabs(fma(splat(a), x1, splat(b) * y1))
                    ay = ay + vabs(fma(splat(b), x1, splat(c) * y1))
                if bits(left > zero) == 0:
                    alive &= ~(1 << g)
            moments = g_pairs[pair]
            moments[0], moments[1], moments[2] = total(s0), total(sx), total(sxx)
            moments[3], moments[4], moments[5] = total(sy), total(sxy), total(syy)
            if absolute:
                moments[6], moments[7] = total(ax), total(ay)
            for channel in range(channels):
                moments[MOMENTS + channel] = total(load(of_features, channel * _LANES))
        while place < end:  # hidden behind what came before
            g_pairs[list_pairs[place]] = 0
            place += 1


@kernel(
    "void(i8, i8, i8, f4[::1], i8, i8[::1], f4[:,::1], i8, b1, i8[::1], "
    "f4[:,::1], f4[:,::1], f4[:,::1], f4[::1], f4[::1], f4[:,::1])"
)
def collect(
    base, first, last, records, stride, pair_starts, g_pairs, channels, absolute, feature_ids,
    g_means2d, g_absolute, g_conics, g_opacities, g_depths, g_features,
):  # fmt: skip
    """Sum the pairs of records `first` to `last`, of rows `base` further on. A channel beyond those of `g_features` is the depth."""
    sums = np.empty(MOMENTS + channels, np.float32)
    for j in range(first, last):
        if pair_starts[j] == pair_starts[j + 1]:
            continue
        sums[:] = 0
        for pair in range(pair_starts[j], pair_starts[j + 1]):
            for i in range(MOMENTS + channels):
                sums[i] += g_pairs[pair, i]
        at, row = j * stride, base + j
        a, b, c = -records[at + 2] * _LN4, -records[at + 3] * _LN4 * _HALF, -records[at + 4] * _LN4
        g_means2d[row, 0] = a * sums[1] + b * sums[3]
        g_means2d[row, 1] = b * sums[1] + c * sums[3]
        g_conics[row, 0], g_conics[row, 1], g_conics[row, 2] = -_HALF * sums[2], -sums[4], -_HALF * sums[5]
        g_opacities[row] = sums[0] / records[at + 5]
        if absolute:
            g_absolute[row, 0], g_absolute[row, 1] = sums[6], sums[7]
        colours = g_features.shape[1]
        for channel in range(colours):
            g_features[feature_ids[row], channel] += sums[MOMENTS + channel]
        if channels > colours:
            g_depths[row] = sums[MOMENTS + colours]


@kernel(f"void({_TILE_ARGUMENTS}, i4[:,:,::1], f4[:,:,::1])")
def strongest(
    records, stride, channels, tile_starts, list_records, list_pairs, width, height, across, first, step, alpha_max,
    ids, weights,
):  # fmt: skip
    """For each pixel of tiles `first`, `first + step`, ...: the records of the largest weights, in falling order."""
    k = ids.shape[2]
    xs, ys = _pixel_centres()
    alphas = np.empty(_LANES, np.float32)
    for tile in range(first, tile_starts.shape[0] - 1, step):
        ox, oy = (tile % across) * TILE, (tile // across) * TILE
        light = np.empty(_GROUPS * _LANES, np.float32)
        alive = _start_tile(light, min(width - ox, TILE), min(height - oy, TILE))
        for place in range(tile_starts[tile], tile_starts[tile + 1]):
            record = list_records[place]
            at = record * stride
            mx, my = records[at] - _F(ox), records[at + 1] - _F(oy)
            todo = _groups(records, at, mx, my) & alive
            while todo != 0:
                g = lowest_bit(todo)
                todo &= todo - 1
                x, y = load(xs, g * _LANES) - splat(mx), spread(ys, g) - splat(my)
                store(alphas, 0, vmin(_alpha(records, at, x, y), splat(alpha_max)))
                for lane in range(_LANES):
                    alpha, before = alphas[lane], light[g * _LANES + lane]
                    if alpha < _ALPHA_MIN or before <= 0:
                        continue
                    weight = alpha * before
                    if before - weight <= _T_STOP:
                        light[g * _LANES + lane] = -before
                        continue
                    light[g * _LANES + lane] = before - weight
                    py, px = oy + (g & 15), ox + (g >> 4) * _LANES + lane
                    slot = k
                    while slot > 0 and weight > weights[py, px, slot - 1]:
                        slot -= 1
                    for other in range(k - 1, slot, -1):
                        ids[py, px, other], weights[py, px, other] = ids[py, px, other - 1], weights[py, px, other - 1]
                    if slot < k:
                        ids[py, px, slot], weights[py, px, slot] = record, weight
