"""Drawn microscopy pictures and volumes with their labels: samples for pages, training data, input for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sample_picture(seed: int, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """A drawn fluorescence picture for demos: uint8 (size, size) and its labels (1 inside nuclei)."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    image, labels = np.zeros((size, size)), np.zeros((size, size), np.uint8)
    for _ in range(size // 7):
        inside = _ellipsoid(rng, (size, size), rng.uniform(7, 13, 2)) < 1
        image[inside] = rng.uniform(60, 160)
        labels[inside] = 1
    image = 12 + gaussian_filter(image, 1.5) * (1 + 0.15 * gaussian_filter(rng.normal(size=image.shape), 3) * 10)
    return np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8), labels


def sample_volume(seed: int, size: Sequence[int] = (48, 48, 40)) -> tuple[np.ndarray, np.ndarray]:
    """A drawn volume for demos and training: float32 (X, Y, Z) and labels, 1 in bright and 2 in dark blobs.

    Blobs are ellipsoids of random size and contrast on a sloping, textured background with noise.
    """
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    grid = np.indices(size) / np.reshape(size, (3, 1, 1, 1)) - 0.5
    image = np.tensordot(rng.normal(0, 0.6, 3), grid, 1) + 6 * rng.uniform(0.5, 1) * gaussian_filter(
        rng.normal(size=size), 4
    )
    labels = np.zeros(size, np.uint8)
    for _ in range(rng.integers(3, 8)):
        kind = int(rng.integers(1, 3))
        inside = _ellipsoid(rng, size, rng.uniform(3, 9, 3)) < 1
        inside &= labels == 0
        image[inside] += rng.uniform(0.9, 1.8) * (1 if kind == 1 else -1)
        labels[inside] = kind
    noise = rng.normal(0, rng.uniform(0.2, 0.5), size)
    return (gaussian_filter(image, 0.6) + noise).astype(np.float32), labels


def _ellipsoid(rng: np.random.Generator, size: Sequence[int], radii: np.ndarray) -> np.ndarray:
    """Squared distance from a random centre in units of `radii`."""
    centre = [rng.uniform(0.08 * s, 0.92 * s) for s in size]
    offset = np.indices(size) - np.reshape(centre, (-1, *[1] * len(size)))
    return ((offset / np.reshape(radii, (-1, *[1] * len(size)))) ** 2).sum(0)
