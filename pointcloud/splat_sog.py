"""SOG version 2 (PlayCanvas): a zip of meta.json and lossless WebP pictures, one pixel per Gaussian.

Positions are 16 bits per axis of sign(x) log(1 + |x|); scales, colours and harmonics are indices into codebooks of 256 values;
rotations are the three smaller components in bytes; higher harmonics are lines of a palette. Axes stay as they are, as in files
that PlayCanvas's own tool writes from PLY.
"""

from __future__ import annotations

import io
import json
import math
import warnings
import zipfile
from typing import Any

import numpy as np
from PIL import Image

from mmkit.errors import InputError
from mmkit.pointcloud.gaussians import GaussianModel
from mmkit.pointcloud.splat_arrays import as_arrays, as_model, check_count, logit, sigmoid, to_bytes

MAX_PALETTE = 4096
"""Lines of the palette that are written; the format allows 65536."""

_PER_ROW = 64
_MAX_MEMBER = 1_000_000_000


def _morton(means: np.ndarray) -> np.ndarray:
    """An order along a space-filling curve: neighbours in space become neighbours in the pictures, which then pack better."""
    low, high = means.min(0, initial=0.0), means.max(0, initial=1.0)
    grid = ((means - low) / np.maximum(high - low, 1e-12) * 1023).astype(np.uint32)
    key = np.zeros(len(means), np.uint32)
    for bit in range(10):
        for axis in range(3):
            key |= ((grid[:, axis] >> np.uint32(bit)) & np.uint32(1)) << np.uint32(3 * bit + axis)
    return np.argsort(key, kind="stable")


def _codebook(values: np.ndarray) -> tuple[list[float], np.ndarray]:
    """256 levels that a few rounds of one-dimensional k-means choose, and the level of each value."""
    flat = values.reshape(-1).astype(np.float64)
    if not len(flat):
        return [0.0] * 256, np.zeros(values.shape, np.uint8)
    levels = np.unique(flat)
    if len(levels) > 256:
        levels = np.quantile(flat, (np.arange(256) + 0.5) / 256)
        levels[0], levels[-1] = flat.min(), flat.max()
        for _ in range(8):
            nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, flat)
            count = np.bincount(nearest, minlength=256)
            sums = np.bincount(nearest, flat, minlength=256)
            levels = np.sort(np.where(count > 0, sums / np.maximum(count, 1), levels))
    levels = np.concatenate([levels, np.full(256 - len(levels), levels[-1])]).astype(np.float32)
    index = np.searchsorted((levels[1:].astype(np.float64) + levels[:-1]) / 2, flat)
    return levels.tolist(), index.astype(np.uint8).reshape(values.shape)


def _picture(channels: np.ndarray, width: int) -> bytes:
    """(N, 3 or 4) bytes as rows of a lossless WebP."""
    height = max(1, -(-len(channels) // width))
    pixels = np.zeros((height * width, channels.shape[1]), np.uint8)
    pixels[: len(channels)] = channels
    buffer = io.BytesIO()
    image = Image.fromarray(pixels.reshape(height, width, -1))
    image.save(buffer, "WEBP", lossless=True, exact=True, quality=60, method=2)
    return buffer.getvalue()


def _rotations(quats: np.ndarray) -> np.ndarray:
    """wxyz: the other three components over 1/sqrt(2) in 0..255, and 252 + the largest one's place."""
    largest = np.abs(quats).argmax(1)
    q = quats * np.where(np.take_along_axis(quats, largest[:, None], 1) < 0, -1, 1)
    others = np.array([[j for j in range(4) if j != i] for i in range(4)])[largest]
    small = np.take_along_axis(q, others, 1)
    return np.concatenate([to_bytes((small / math.sqrt(2) + 0.5) * 255), (252 + largest[:, None]).astype(np.uint8)], 1)


def write(model: GaussianModel) -> bytes:
    """A bundle, whose palette has a line for each Gaussian up to `MAX_PALETTE`, cluster means beyond."""
    arrays = as_arrays(model)
    order = _morton(arrays["means"])
    arrays = {k: v[order] for k, v in arrays.items()}
    n, rest = arrays["shN"].shape[:2]
    width = max(4, 4 * math.ceil(math.sqrt(n) / 4))
    logs = np.sign(arrays["means"]) * np.log1p(np.abs(arrays["means"].astype(np.float64)))
    low, high = (logs.min(0), logs.max(0)) if n else (np.zeros(3), np.zeros(3))
    q = np.rint((logs - low) / np.maximum(high - low, 1e-12) * 65535).astype(np.uint16)
    scale_levels, scales = _codebook(arrays["scales"])
    color_levels, colors = _codebook(arrays["sh0"][:, 0])
    alphas = to_bytes(255 * sigmoid(arrays["opacities"]))[:, None]
    files = {
        "means_l.webp": _picture((q & 255).astype(np.uint8), width), "means_u.webp": _picture((q >> 8).astype(np.uint8), width),
        "scales.webp": _picture(scales, width), "quats.webp": _picture(_rotations(arrays["quats"]), width),
        "sh0.webp": _picture(np.concatenate([colors, alphas], 1), width),
    }  # fmt: skip
    meta: dict[str, Any] = {
        "version": 2, "asset": {"generator": "mmkit"}, "count": n, "antialias": model.rasterize_mode == "antialiased",
        "means": {"mins": low.tolist(), "maxs": high.tolist(), "files": ["means_l.webp", "means_u.webp"]},
        "scales": {"codebook": scale_levels, "files": ["scales.webp"]}, "quats": {"files": ["quats.webp"]},
        "sh0": {"codebook": color_levels, "files": ["sh0.webp"]},
    }  # fmt: skip
    if rest and n:
        palette, labels = _palette(arrays["shN"].reshape(n, 3 * rest))
        levels, index = _codebook(palette)
        rows = -(-len(palette) // _PER_ROW)
        grid = np.zeros((rows * _PER_ROW, rest, 3), np.uint8)
        grid[: len(palette)] = index.reshape(len(palette), rest, 3)
        files["shN_centroids.webp"] = _picture(grid.reshape(-1, 3), _PER_ROW * rest)
        split = np.stack([labels & 255, labels >> 8, np.zeros_like(labels)], 1).astype(np.uint8)
        files["shN_labels.webp"] = _picture(split, width)
        meta["shN"] = {
            "count": len(palette), "bands": model.sh_degree, "codebook": levels, "files": ["shN_centroids.webp", "shN_labels.webp"]
        }  # fmt: skip
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as bundle:
        for name, content in {"meta.json": json.dumps(meta).encode(), **files}.items():
            bundle.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return buffer.getvalue()


def _palette(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lines that stand for all, and the one that stands for each."""
    distinct, labels = np.unique(lines, axis=0, return_inverse=True)
    if len(distinct) <= MAX_PALETTE:
        return distinct, labels.reshape(-1)
    from sklearn.cluster import MiniBatchKMeans

    means = MiniBatchKMeans(MAX_PALETTE, batch_size=8192, n_init=1, max_iter=20, random_state=0).fit(lines)
    return means.cluster_centers_.astype(np.float32), means.labels_


class _Bundle:
    """A zip whose members are read by the names meta.json gives, with limits."""

    def __init__(self, data: bytes):
        try:
            self.zip = zipfile.ZipFile(io.BytesIO(data))
            self.meta = json.loads(self._member("meta.json", 50_000_000))
        except (zipfile.BadZipFile, ValueError, RecursionError, NotImplementedError, EOFError) as error:
            raise InputError(f"it is not a zip with a meta.json ({error}).") from error

    def _member(self, name: Any, limit: int = _MAX_MEMBER) -> bytes:
        try:
            info = self.zip.getinfo(str(name))
        except KeyError:
            raise InputError(f"it has no {str(name)[:60]!r}.") from None
        if info.file_size > limit:
            raise InputError(f"{info.filename[:60]!r} would unpack to {info.file_size} bytes.")
        return self.zip.read(info)

    def picture(self, key: str, which: int, channels: str) -> np.ndarray:
        """Pixels (H, W, C) of a file of one attribute."""
        try:
            data = self._member(self.meta[key]["files"][which])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(data), formats=("WEBP", "PNG")) as image:
                    return np.asarray(image.convert(channels))
        except InputError:
            raise
        except Exception as error:  # a damaged picture or table fails anywhere
            raise InputError(f"its {key} cannot be read ({type(error).__name__}: {error}).") from error

    def pixels(self, key: str, which: int, n: int, channels: str = "RGB") -> np.ndarray:
        """One pixel for each of `n` Gaussians."""
        pixels = self.picture(key, which, channels)
        flat = pixels.reshape(-1, pixels.shape[-1])
        if len(flat) < n:
            raise InputError(f"it claims {n} Gaussians but its {key} have {len(flat)} pixels.")
        return flat[:n]

    def numbers(self, key: str, name: str, count: int) -> np.ndarray:
        """A list of `count` finite numbers of meta.json."""
        try:
            values = np.asarray(self.meta[key][name], np.float64)
        except (KeyError, TypeError, ValueError):
            values = np.empty(0)
        if values.shape != (count,) or not np.isfinite(values).all():
            raise InputError(f"its {key}.{name} are not {count} numbers.")
        return values


def read(data: bytes) -> GaussianModel:
    """A bundle of version 2."""
    bundle = _Bundle(data)
    meta = bundle.meta
    if not isinstance(meta, dict) or meta.get("version") != 2 or type(meta.get("count")) is not int:
        version = meta.get("version", 1) if isinstance(meta, dict) else "?"
        raise InputError(f"its version is {version!s:.20}; only 2 is read.")
    n = meta["count"]
    check_count(n, len(data) * 4096, 1)  # constant pictures pack very well
    q = bundle.pixels("means", 0, n).astype(np.int64) + 256 * bundle.pixels("means", 1, n).astype(np.int64)
    low, high = bundle.numbers("means", "mins", 3), bundle.numbers("means", "maxs", 3)
    logs = low + (high - low) * q / 65535
    packed = bundle.pixels("quats", 0, n, "RGBA")
    largest = packed[:, 3].astype(np.int64) - 252
    if n and not (largest.min() >= 0 and largest.max() <= 3):
        raise InputError("its rotations have alpha outside 252..255: lossy, or another layout.")
    small = (packed[:, :3] / 255 - 0.5) * math.sqrt(2)
    quats = np.empty((n, 4))
    np.put_along_axis(quats, np.array([[j for j in range(4) if j != i] for i in range(4)])[largest], small, 1)
    np.put_along_axis(quats, largest[:, None], np.sqrt(np.maximum(0, 1 - (small * small).sum(1, keepdims=True))), 1)
    colors = bundle.pixels("sh0", 0, n, "RGBA")
    arrays = {
        "means": np.sign(logs) * np.expm1(np.abs(logs)), "quats": quats,
        "scales": bundle.numbers("scales", "codebook", 256)[bundle.pixels("scales", 0, n)],
        "sh0": bundle.numbers("sh0", "codebook", 256)[colors[:, None, :3]], "opacities": logit(colors[:, 3] / 255, 1 / 510),
    }  # fmt: skip
    if meta.get("shN"):
        arrays["shN"] = _harmonics(bundle, n)
    return as_model("antialiased" if meta.get("antialias") is True else "classic", **arrays)


def _harmonics(bundle: _Bundle, n: int) -> np.ndarray:
    bands = bundle.meta["shN"].get("bands") if isinstance(bundle.meta["shN"], dict) else None
    if bands not in (1, 2, 3):
        raise InputError(f"its harmonics have {bands!s:.20} bands; 1 to 3 are possible.")
    rest = (bands + 1) ** 2 - 1
    grid = bundle.picture("shN", 0, "RGB")
    split = bundle.pixels("shN", 1, n).astype(np.int64)
    labels = split[:, 0] + 256 * split[:, 1]
    if grid.shape[1] != _PER_ROW * rest or (n and labels.max() >= grid.shape[0] * _PER_ROW):
        raise InputError("its labels point outside the palette of harmonics.")
    palette = grid.reshape(-1, _PER_ROW, rest, 3).reshape(-1, rest, 3)
    return bundle.numbers("shN", "codebook", 256)[palette[labels]]
