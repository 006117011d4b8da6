"""SPZ (Niantic, MIT), versions 2 and 3: a gzip stream of a header of 16 bytes and one array per attribute.

Positions are 24-bit fixed point; scales are (log s + 10) * 16; colours 0.15 times the first harmonic around the middle; higher
harmonics 5 bits (degree 1) and 4 bits (others) of a byte. Axes are right, up, back: ours turned half around x.
"""

from __future__ import annotations

import gzip
import struct
import zlib

import numpy as np
import torch

from mmkit.errors import InputError
from mmkit.pointcloud.gaussians import GaussianModel
from mmkit.pointcloud.splat_arrays import as_arrays, as_model, check_count, logit, sigmoid, to_bytes

MAGIC = 0x5053474E
FRACTION_BITS = 12
_ANTIALIASED = 1
_TURN = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
_COLOR_SCALE = 0.15
_MAX_UNPACKED = 2_000_000_000


def _positions(means: np.ndarray) -> tuple[np.ndarray, int]:
    """24-bit integers as bytes, and the bits after the point: 12, fewer where the scene is wider than 4 km."""
    widest = float(np.abs(means).max(initial=0.0))
    bits = next((b for b in range(FRACTION_BITS, -1, -1) if widest * 2**b < 2**23 - 1), None)
    if bits is None:
        raise InputError(f"SPZ cannot hold positions as far out as {widest:g}; scale the scene down, or use .ply.")
    fixed = np.rint(means.astype(np.float64) * 2**bits).astype("<i4")
    return fixed.view(np.uint8).reshape(-1, 3, 4)[:, :, :3], bits


def _pack_rotations(quats: np.ndarray) -> np.ndarray:
    """wxyz -> 32 bits: two for the largest of x, y, z, w, and for each other a sign and 9 bits of its size over 1/sqrt(2)."""
    q = np.roll(quats, -1, axis=1).astype(np.float64)
    largest = np.abs(q).argmax(1)
    q = q * np.where(np.take_along_axis(q, largest[:, None], 1) < 0, -1, 1)
    packed = largest.astype(np.uint32)
    for i in range(4):
        size = np.minimum(np.floor(511 * np.abs(q[:, i]) / np.sqrt(0.5) + 0.5), 511).astype(np.uint32)
        shifted = (packed << np.uint32(10)) | ((q[:, i] < 0).astype(np.uint32) << np.uint32(9)) | size
        packed = np.where(largest == i, packed, shifted)
    return packed.astype("<u4")


def _unpack_rotations(packed: np.ndarray) -> np.ndarray:
    packed = packed.astype(np.uint32)
    largest = packed >> np.uint32(30)
    q = np.zeros((len(packed), 4))
    for i in (3, 2, 1, 0):
        value = (packed & np.uint32(511)) * np.sqrt(0.5) / 511
        value = np.where((packed >> np.uint32(9)) & np.uint32(1), -value, value)
        other = largest != i
        q[other, i] = value[other]
        packed = np.where(other, packed >> np.uint32(10), packed)
    q[np.arange(len(q)), largest] = np.sqrt(np.maximum(0, 1 - (q * q).sum(1)))
    return np.roll(q, 1, axis=1)


def _unpack_first_three(data: np.ndarray) -> np.ndarray:
    """Version 2: x, y and z as bytes, w positive."""
    xyz = data.reshape(-1, 3) / 127.5 - 1
    return np.concatenate([np.sqrt(np.maximum(0, 1 - (xyz * xyz).sum(1, keepdims=True))), xyz], 1)


def _quantize(values: np.ndarray, bits: int) -> np.ndarray:
    """-1..1 to a byte of which `bits` are used: the middle of the nearest bucket."""
    bucket = 1 << (8 - bits)
    whole = np.rint(values * 128) + 128
    return np.clip(np.floor((whole + bucket // 2) / bucket) * bucket, 0, 255).astype(np.uint8)


def write(model: GaussianModel) -> bytes:
    """Version 3."""
    arrays = as_arrays(model.transform(_TURN))
    positions, bits = _positions(arrays["means"])
    flags = _ANTIALIASED if model.rasterize_mode == "antialiased" else 0
    harmonics = [_quantize(arrays["shN"][:, :3], 5), _quantize(arrays["shN"][:, 3:], 4)]
    parts = [
        struct.pack("<IIIBBBB", MAGIC, 3, len(model), model.sh_degree, bits, flags, 0),
        positions.tobytes(), to_bytes(255 * sigmoid(arrays["opacities"])).tobytes(),
        to_bytes(255 * (_COLOR_SCALE * arrays["sh0"] + 0.5)).tobytes(), to_bytes((arrays["scales"] + 10) * 16).tobytes(),
        _pack_rotations(arrays["quats"]).tobytes(), np.concatenate(harmonics, 1).tobytes(),
    ]  # fmt: skip
    return gzip.compress(b"".join(parts), mtime=0)


def _unpacked(data: bytes) -> bytes:
    """The gzip stream's content, up to a limit."""
    stream = zlib.decompressobj(wbits=31)
    try:
        out = stream.decompress(data, _MAX_UNPACKED)
    except zlib.error as error:
        raise InputError(f"its gzip stream is damaged ({error}).") from error
    if stream.unconsumed_tail:
        raise InputError(f"it unpacks to more than {_MAX_UNPACKED / 1e9:.0f} GB.")
    if not stream.eof:
        raise InputError("its gzip stream ends early.")
    return out


def read(data: bytes) -> GaussianModel:
    """Versions 2 and 3 without extensions; version 4 is another container."""
    if data[:4] == struct.pack("<I", MAGIC):
        raise InputError("it is not a gzip stream (SPZ 4 is not read); write it as version 3.")
    content = _unpacked(data)
    if len(content) < 16:
        raise InputError(f"it has {len(content)} bytes, less than its header.")
    magic, version, n, degree, bits, flags, _ = struct.unpack_from("<IIIBBBB", content)
    if magic != MAGIC or version not in (2, 3) or degree > 3 or bits > 23:
        raise InputError(f"its header says magic {magic:#x}, version {version}, degree {degree}, {bits} fraction bits.")
    rest = (degree + 1) ** 2 - 1
    sizes = (9, 1, 3, 3, 4 if version == 3 else 3, 3 * rest)
    check_count(n, len(content) - 16, sum(sizes))
    arrays, at = [], 16
    for size in sizes:
        arrays.append(np.frombuffer(content, np.uint8, n * size, at))
        at += n * size
    positions, alphas, colors, scales, rotations, harmonics = arrays
    wide = np.zeros((n, 3, 4), np.uint8)
    wide[:, :, 1:] = positions.reshape(n, 3, 3)  # into the upper bytes, so that the sign is in place
    means = (wide.view("<i4")[..., 0] >> 8) / 2.0**bits
    quats = _unpack_rotations(rotations.view("<u4")) if version == 3 else _unpack_first_three(rotations)
    model = as_model(
        "antialiased" if flags & _ANTIALIASED else "classic", means=means, scales=scales.reshape(n, 3) / 16.0 - 10, quats=quats,
        opacities=logit(alphas / 255.0, 1 / 510), sh0=((colors.reshape(n, 1, 3) / 255.0 - 0.5) / _COLOR_SCALE),
        shN=(harmonics.reshape(n, rest, 3).astype(np.float32) - 128) / 128,
    )  # fmt: skip
    return model.transform(_TURN)
