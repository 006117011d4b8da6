"""Which Gaussians each tile of 16 x 16 pixels composites, front to back, and the compact records they are read from.

A counting sort puts (Gaussian, tile) pairs into the tiles' lists, in the order of the rows, through which all runs in memory; then
each list is sorted by depth. A Gaussian enters a tile when the ellipse on which its alpha is 1/255 reaches a pixel centre of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba
import numpy as np

from mmkit.errors import InputError
from mmkit.ops.gaussian.settings import TILE, Settings
from mmkit.ops.numba_kernels import kernel, run_jobs

BLOCKS = 16
"""Parts of an image's Gaussians, and of its tiles, that are binned at the same time."""

HEAD = 9
"""Floats of a record before the features: mean x, y; conic times -log2(e): a/2, b, c/2; opacity; and the ellipse
(x + shear y)^2 <= width - bend y^2 as shear, width, bend."""

MAX_PAIRS = 2**28
"""More (Gaussian, tile) pairs than this are refused: their lists alone would take gigabytes."""

_LOG2E = 1.4426950408889634
_SLACK = 1.00002  # of the ellipse, for float32
_NEAR = 0.01  # pixels, likewise


@numba.njit(error_model="numpy")
def _first_tile(low):
    return math.ceil((low - (TILE - 0.5)) / TILE)


@numba.njit(error_model="numpy")
def _end_tile(high):
    return math.floor((high - 0.5) / TILE) + 1


@kernel(
    "void(i8, i8, i8, i4[:,::1], f4[:,::1], f4[:,::1], f4[::1], f4[::1], f4[:,::1], i8[::1], i8, i8, b1, f4[::1], i4[:,::1])"
)
def _record(
    base, first, last, radii, means2d, conics, opacities, depths, features, feature_ids, stride, down, with_depth, records, spans
):  # fmt: skip
    """Records `first` to `last`, of rows `base` further on, and the rows of tiles each reaches."""
    channels = features.shape[1]
    for j in range(first, last):
        row = base + j
        if radii[row, 0] <= 0 and radii[row, 1] <= 0:
            spans[j, 0], spans[j, 1] = 0, 0
            continue
        a, b, c = np.float64(conics[row, 0]), np.float64(conics[row, 1]), np.float64(conics[row, 2])
        o, y = np.float64(opacities[row]), np.float64(means2d[row, 1])
        reach = max(2 * math.log(255 * o), 0.0) * _SLACK
        at = j * stride
        records[at], records[at + 1] = means2d[row, 0], y
        records[at + 2], records[at + 3], records[at + 4] = -0.5 * _LOG2E * a, -_LOG2E * b, -0.5 * _LOG2E * c
        records[at + 5] = o
        det = max(a * c - b * b, 1e-30 * a * c)
        records[at + 6], records[at + 7], records[at + 8] = b / a, reach / a, det / (a * a)
        for channel in range(channels):
            records[at + HEAD + channel] = features[feature_ids[row], channel]
        if with_depth:
            records[at + HEAD + channels] = depths[row]
        tall = math.sqrt(reach * a / det) + _NEAR
        spans[j, 0] = min(max(_first_tile(y - tall), 0.0), down)
        spans[j, 1] = min(max(_end_tile(y + tall), spans[j, 0]), down)


@kernel("void(i8, i8, f4[::1], i8, i4[:,::1], i8[::1], i8, i2[:,::1], i8[::1], i8[::1])")
def _cover(first, last, records, stride, spans, range_starts, across, ranges, pairs, counts):
    """The tiles each record reaches in each of its rows of tiles; how many these are; and how many records each tile gets."""
    for j in range(first, last):
        pairs[j] = 0
        if spans[j, 0] == spans[j, 1]:
            continue
        at = j * stride
        x, y = np.float64(records[at]), np.float64(records[at + 1])
        shear, wide, bend = np.float64(records[at + 6]), np.float64(records[at + 7]), np.float64(records[at + 8])
        tall = math.sqrt(wide / bend)
        # height of the ellipse's rightmost point; that of the leftmost is its negative
        tip = -shear * math.sqrt(wide / (1 + shear * shear / bend)) / bend
        for ty in range(spans[j, 0], spans[j, 1]):
            top, bottom = ty * TILE + 0.5 - y - _NEAR, ty * TILE + (TILE - 0.5) - y + _NEAR
            top, bottom = min(max(top, -tall), tall), min(max(bottom, -tall), tall)
            right, left = min(max(tip, top), bottom), min(max(-tip, top), bottom)
            high = x - shear * right + math.sqrt(max(wide - bend * right * right, 0.0)) + _NEAR
            low = x - shear * left - math.sqrt(max(wide - bend * left * left, 0.0)) - _NEAR
            begin = int(min(max(_first_tile(low), 0.0), across))
            end = int(min(max(_end_tile(high), begin), across))
            place = range_starts[j] + ty - spans[j, 0]
            ranges[place, 0], ranges[place, 1] = begin, end
            pairs[j] += end - begin
            for tx in range(begin, end):
                counts[ty * across + tx] += 1


@kernel("void(i8, i8, i4[:,::1], i8[::1], i8, i2[:,::1], i8[::1], i8[::1], i4[::1], i4[::1])")
def _fill(first, last, spans, range_starts, across, ranges, pair_starts, places, list_records, list_pairs):
    """Write records `first` to `last` and the numbers of their pairs into the tiles' lists; `places`: where each tile goes on."""
    for j in range(first, last):
        pair = pair_starts[j]
        for ty in range(spans[j, 0], spans[j, 1]):
            place = range_starts[j] + ty - spans[j, 0]
            for tx in range(ranges[place, 0], ranges[place, 1]):
                tile = ty * across + tx
                list_records[places[tile]] = j
                list_pairs[places[tile]] = pair
                places[tile] += 1
                pair += 1


@kernel("void(i8, f4[::1], i8, i8[::1], i4[::1], i4[::1])")
def _sort(first, depths, base, tile_starts, list_records, list_pairs):
    """Put the lists of tiles `first`, `first + BLOCKS`, ... in order, nearest first; equal depths stay in the order of the rows."""
    bits = depths.view(np.uint32)
    for tile in range(first, tile_starts.shape[0] - 1, BLOCKS):
        start, end = tile_starts[tile], tile_starts[tile + 1]
        records, pairs = list_records[start:end].copy(), list_pairs[start:end].copy()
        keys = np.empty(end - start, np.uint64)
        for i in range(end - start):
            key = bits[base + records[i]]
            key ^= (
                np.uint32(0xFFFFFFFF) if key >> np.uint32(31) else np.uint32(0x80000000)
            )  # floats in order of integers
            keys[i] = (np.uint64(key) << np.uint64(32)) | np.uint64(i)
        keys.sort()
        for i in range(end - start):
            old = np.int64(keys[i] & np.uint64(0xFFFFFFFF))
            list_records[start + i], list_pairs[start + i] = records[old], pairs[old]


@dataclass
class Bins:
    """One image's records, one for each of its rows, and the lists of its tiles."""

    first: int  # the row of record 0
    records: np.ndarray  # flat, `stride` floats each
    stride: int
    pair_starts: np.ndarray  # record -> first of its pairs, and the end
    tile_starts: np.ndarray  # tile -> place of its first entry in the lists, and the end
    list_records: np.ndarray
    list_pairs: np.ndarray


def parts(n: int) -> list[tuple[int, int]]:
    """The records of an image in `BLOCKS` parts."""
    return [(n * i // BLOCKS, n * (i + 1) // BLOCKS) for i in range(BLOCKS)]


def bin_image(
    radii: np.ndarray, means2d: np.ndarray, conics: np.ndarray, opacities: np.ndarray, depths: np.ndarray,
    features: np.ndarray, feature_ids: np.ndarray, first: int, last: int, s: Settings,
) -> Bins:  # fmt: skip
    """Sort and bin rows `first` to `last`, the Gaussians of one image.

    Raises:
        InputError: more than `MAX_PAIRS` pairs.
    """
    (across, down), n = s.tiles, last - first
    stride = -(-(HEAD + features.shape[1] + s.depth) // 16) * 16  # whole cache lines
    records, spans = np.empty(n * stride, np.float32), np.empty((n, 2), np.int32)
    given = (radii, means2d, conics, opacities, depths, features, feature_ids)
    run_jobs(_record, [(first, a, b, *given, stride, down, s.depth, records, spans) for a, b in parts(n)])
    range_starts = np.zeros(n + 1, np.int64)
    np.cumsum(spans[:, 1] - spans[:, 0], out=range_starts[1:])
    _limit(n, range_starts[-1])
    ranges, pair_starts = np.empty((range_starts[-1], 2), np.int16), np.zeros(n + 1, np.int64)
    counts = np.zeros((BLOCKS, across * down), np.int64)
    shared = (records, stride, spans, range_starts, across, ranges, pair_starts[1:])
    run_jobs(_cover, [(a, b, *shared, counts[i]) for i, (a, b) in enumerate(parts(n))])
    np.cumsum(pair_starts, out=pair_starts)
    _limit(n, pair_starts[-1])
    tile_starts = np.concatenate(([0], np.cumsum(counts.sum(0))))
    places = tile_starts[:-1] + np.cumsum(counts, 0) - counts  # where the part of each block begins in each list
    lists = np.empty((2, pair_starts[-1]), np.int32)
    spread = (spans, range_starts, across, ranges, pair_starts)
    run_jobs(_fill, [(a, b, *spread, places[i], *lists) for i, (a, b) in enumerate(parts(n))])
    run_jobs(_sort, [(i, depths, first, tile_starts, *lists) for i in range(min(BLOCKS, across * down))])
    return Bins(first, records, stride, pair_starts, tile_starts, lists[0], lists[1])


def _limit(n: int, pairs: int) -> None:
    if pairs > MAX_PAIRS:
        raise InputError(
            f"{n} Gaussians cover {pairs} tiles, more than {MAX_PAIRS}. Render a smaller picture, or look for Gaussians that "
            "are far too large (scales are lengths, not logarithms)."
        )
