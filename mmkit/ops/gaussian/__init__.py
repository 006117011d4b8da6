"""3D Gaussians to pictures, differentiably (arXiv 2308.04079), in gsplat's words (arXiv 2409.06765): one function, three backends.

    C = sum_i c_i alpha_i prod_{j<i} (1 - alpha_j)          alpha_i = o_i exp(-d^T Sigma_i^-1 d / 2)

Backends: `gsplat` (CUDA), `cpu` (Numba, float32; the same bits on any number of threads, camera gradients included, which gsplat's
atomic sums do not give), `reference` (dense torch, any dtype). Written from the published formulas.
"""

from __future__ import annotations

from mmkit.ops.gaussian.api import fully_fused_projection, rasterization, top_contributors, warmup
from mmkit.ops.gaussian.harmonics import spherical_harmonics

__all__ = ["fully_fused_projection", "rasterization", "spherical_harmonics", "top_contributors", "warmup"]
