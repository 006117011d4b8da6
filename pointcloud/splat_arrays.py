"""Between scenes and the arrays that files hold: counts checked, activations undone."""

from __future__ import annotations

import numpy as np
import torch

from mmkit.errors import InputError
from mmkit.pointcloud.gaussians import GaussianModel

MAX_GAUSSIANS = 20_000_000
"""Files that claim more are refused before memory is asked for."""


def check_count(n: int, available: int, each: int) -> None:
    """Refuse a count that the file cannot hold, before anything of that size is made."""
    if not 0 <= n <= MAX_GAUSSIANS:
        raise InputError(f"it claims {n} Gaussians; the limit is {MAX_GAUSSIANS}.")
    if n * each > available:
        raise InputError(f"it claims {n} Gaussians of {each} bytes but holds {available} bytes of them.")


def as_model(mode: str = "classic", **arrays: np.ndarray) -> GaussianModel:
    """A model of arrays under the parameters' names; (N, K - 1, 3) harmonics may be left out."""
    n = len(arrays["means"])
    arrays.setdefault("shN", np.zeros((n, 0, 3), np.float32))
    return GaussianModel.from_tensors(
        {k: torch.from_numpy(np.array(v, np.float32)) for k, v in arrays.items()}, rasterize_mode=mode
    )


def as_arrays(model: GaussianModel) -> dict[str, np.ndarray]:
    """The parameters as float32 arrays, rotations normalised."""
    arrays = {k: v.float().numpy() for k, v in model.tensors().items()}
    length = np.linalg.norm(arrays["quats"], axis=1, keepdims=True)
    arrays["quats"] = np.where(
        length > 0, arrays["quats"] / np.maximum(length, 1e-30), np.array([1, 0, 0, 0], np.float32)
    )
    return arrays


def deviations(scales: np.ndarray) -> np.ndarray:
    """Standard deviations as float32 of their logarithms; `InputError` where that cannot hold them."""
    with np.errstate(over="ignore"):
        found = np.exp(scales.astype(np.float64)).astype(np.float32)
    if not np.isfinite(found).all():
        raise InputError(
            f"scales reach {scales.max():g}, the logarithm of more than this format holds; remove those Gaussians with `select` "
            "first, or use .ply."
        )
    return found


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def logit(p: np.ndarray, smallest: float) -> np.ndarray:
    """The inverse, with p kept at least `smallest` away from 0 and 1."""
    p = np.clip(p.astype(np.float64), smallest, 1 - smallest)
    return np.log(p / (1 - p))


def to_bytes(x: np.ndarray) -> np.ndarray:
    """Rounded and kept in 0..255."""
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)
