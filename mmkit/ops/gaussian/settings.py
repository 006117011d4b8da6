"""What a rendering is asked for, apart from its tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Numerics:
    """The constants in which releases of gsplat differ."""

    alpha_max: float
    compensation_floor: float
    exact_tiles: bool


NUMERICS = {
    "gsplat-1.5": Numerics(alpha_max=0.999, compensation_floor=0.0, exact_tiles=False),
    "gsplat-1.6": Numerics(alpha_max=0.99, compensation_floor=0.005, exact_tiles=True),
}

ALPHA_MIN = 1.0 / 255.0
"""Weaker contributions are left out."""

T_STOP = 1e-4
"""A Gaussian that would let less light through than this is not blended, nor is anything behind it."""

TILE = 16

LARGEST_RADIUS = 2e9
"""Pixels that still fit int32."""

SHARPEST_CONIC = 1e30
"""What still fits float32 when it is multiplied by pixels."""

LONGEST_QUAT = 1e18
"""Quaternions longer than this, or shorter than its inverse, have no direction: their squares leave float32."""


@dataclass(frozen=True)
class Settings:
    """One rendering; see `mmkit.ops.gaussian.rasterization`."""

    width: int
    height: int
    near: float
    far: float
    radius_clip: float
    eps2d: float
    antialiased: bool
    ortho: bool
    packed: bool
    absgrad: bool
    depth: bool
    numerics: Numerics
    bounded: bool = True

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles across and down."""
        return -(-self.width // TILE), -(-self.height // TILE)
