"""From a mask to single objects: touching ones are parted by a watershed on the distance to the background."""

from __future__ import annotations

import itertools

import numpy as np

from mmkit.errors import InputError


def split_touching(mask: np.ndarray, *, smooth: float = 3.0, min_pixels: int = 12) -> np.ndarray:
    """Objects of a binary mask: int32 numbers from 1, 0 outside, same shape.

    Every pixel climbs the smoothed distance to the background; those that end at the same summit are one object, so that the borders run
    along the valleys.

    Args:
        mask: (H, W) or (X, Y, Z); every value above 0 is inside.
        smooth: standard deviation in pixels of the Gaussian over the distances; more joins more.
        min_pixels: smaller objects are dropped.

    Raises:
        InputError: a mask that is neither 2D nor 3D.
    """
    from scipy.ndimage import distance_transform_edt, gaussian_filter

    if mask.ndim not in (2, 3):
        raise InputError(f"A mask has 2 or 3 axes, not shape {mask.shape}.")
    inside = np.pad(mask > 0, 1)
    distance = np.where(inside, gaussian_filter(distance_transform_edt(inside), smooth), -1.0).ravel()
    places = np.flatnonzero(inside)
    strides = np.cumprod([1, *inside.shape[:0:-1]])[::-1]
    best = places.copy()
    for step in itertools.product((-1, 0, 1), repeat=mask.ndim):
        near = places + int(np.dot(step, strides))
        higher = distance[near] > distance[best]
        best[higher] = near[higher]
    up = np.arange(inside.size)
    up[places] = best
    while not np.array_equal(up, up[up]):  # each round doubles how far a pixel has climbed
        up = up[up]
    _, numbers, sizes = np.unique(up[places], return_inverse=True, return_counts=True)
    large = sizes >= min_pixels
    found = np.zeros(inside.size, np.int32)
    found[places] = np.where(large, np.cumsum(large), 0)[numbers]
    return found.reshape(inside.shape)[(slice(1, -1),) * mask.ndim]
