"""The renderer as plain torch, every Gaussian at every pixel: any dtype and device, autograd, for tests and small scenes."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkit.errors import InputError
from mmkit.ops.gaussian.settings import ALPHA_MIN, LARGEST_RADIUS, LONGEST_QUAT, SHARPEST_CONIC, T_STOP, Settings

MAX_WORK = 5 * 10**7
"""More Gaussians times pixels than this are refused: several tensors of that size are kept for the gradients."""


def rotation(quats: Tensor) -> Tensor:
    """(..., 4) wxyz -> (..., 3, 3); NaN for lengths outside 1 / LONGEST_QUAT to LONGEST_QUAT."""
    length = quats.norm(dim=-1, keepdim=True)
    usable = (length >= 1 / LONGEST_QUAT) & (length <= LONGEST_QUAT)
    w, x, y, z = (quats / torch.where(usable, length, torch.nan)).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def covariance(quats: Tensor, scales: Tensor) -> Tensor:
    """Rq diag(s^2) Rq^T, (..., 3, 3)."""
    axes = rotation(quats) * scales.unsqueeze(-2)
    return axes @ axes.transpose(-1, -2)


def project(
    means: Tensor, covars: Tensor, opacities: Tensor, viewmats: Tensor, ks: Tensor, s: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Radii, means2d, depths, conics and opacities of Gaussians (..., ) seen by cameras (..., ), whose dimensions broadcast."""
    turn, shift = viewmats[..., :3, :3], viewmats[..., :3, 3]
    upper = covars.triu()
    covars = upper + upper.triu(1).transpose(-1, -2)
    x, y, z = ((turn * means.unsqueeze(-2)).sum(-1) + shift).unbind(-1)
    fx, fy, cx, cy = (ks[..., i, j] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    near = (z >= s.near) & (z <= s.far) & opacities.isfinite()
    zero, front = torch.zeros_like(z), torch.where(near, z, torch.ones_like(z))
    if s.ortho:
        j00, j02, j11, j12 = fx + zero, zero, fy + zero, zero
        means2d = torch.stack([fx * x + cx, fy * y + cy], -1)
    else:
        mx, my = 0.15 * s.width / fx, 0.15 * s.height / fy
        u = (x / front).clamp(-(cx / fx + mx), (s.width - cx) / fx + mx)
        v = (y / front).clamp(-(cy / fy + my), (s.height - cy) / fy + my)
        j00, j02, j11, j12 = fx / front, -fx * u / front, fy / front, -fy * v / front
        means2d = torch.stack([fx * x / front + cx, fy * y / front + cy], -1)
    jacobian = torch.stack([j00, zero, j02, zero, j11, j12], -1).unflatten(-1, (2, 3))
    t = jacobian @ turn
    flat = t @ covars @ t.transpose(-1, -2)
    xx, xy, yy = flat[..., 0, 0], flat[..., 0, 1], flat[..., 1, 1]
    cxx, cyy = xx + s.eps2d, yy + s.eps2d
    det = cxx * cyy - xy * xy
    near = near & (det > 0) & (torch.maximum(cxx, cyy) < SHARPEST_CONIC * det)
    det = torch.where(near, det, torch.ones_like(det))
    conics = torch.stack([cyy, -xy, cxx], -1) / det.unsqueeze(-1)
    row_opacities = opacities.expand_as(z)
    if s.antialiased:
        ratio = (xx * yy - xy * xy) / det
        floor = s.numerics.compensation_floor**2
        row_opacities = row_opacities * torch.where(ratio > floor, ratio, torch.ones_like(ratio)).sqrt().where(
            ratio > floor, floor**0.5
        )
    with torch.no_grad():
        extent = (2 * (255 * row_opacities).clamp_min(1.0).log()).sqrt().clamp_max(3.33)
        extent = torch.where(row_opacities >= ALPHA_MIN, extent, 0.0) if s.bounded else torch.full_like(det, 3.33)
        reach = torch.stack([cxx, cyy], -1).clamp_min(0).sqrt().mul(extent.unsqueeze(-1)).ceil()
        size = torch.tensor([s.width, s.height], device=z.device)
        inside = ((means2d + reach > 0) & (means2d - reach < size)).all(-1)
        seen = near & inside & (extent > 0) & (reach > s.radius_clip).any(-1) & (reach < LARGEST_RADIUS).all(-1)
        radii = torch.where(seen.unsqueeze(-1), reach, 0.0).to(torch.int32)
    return radii, means2d, z, conics, row_opacities


def composite(
    radii: Tensor, means2d: Tensor, depths: Tensor, conics: Tensor, opacities: Tensor, features: Tensor, s: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One image from its N rows: colours (H, W, D) without background, light left (H, W), the order and its weights (M, H*W)."""
    seen = (radii > 0).any(-1).nonzero().squeeze(-1)
    order = seen[depths.detach()[seen].argsort(stable=True)]
    if len(order) * s.width * s.height > MAX_WORK:
        raise InputError(
            f"rasterization: backend 'reference' would need {len(order)} Gaussians x {s.width * s.height} pixels, more than {MAX_WORK}. "
            "Use backend='cpu' with float32, or a smaller scene."
        )
    ys, xs = torch.meshgrid(
        torch.arange(s.height, dtype=means2d.dtype, device=means2d.device) + 0.5,
        torch.arange(s.width, dtype=means2d.dtype, device=means2d.device) + 0.5,
        indexing="ij",
    )
    x = means2d[order, 0, None] - xs.flatten()
    y = means2d[order, 1, None] - ys.flatten()
    a, b, c = conics[order].unsqueeze(-1).unbind(1)
    sigma = 0.5 * (a * x * x + c * y * y) + b * x * y
    alpha = (opacities[order, None] * torch.exp(-sigma)).clamp_max(s.numerics.alpha_max)
    alpha = torch.where((sigma >= 0) & (alpha >= ALPHA_MIN), alpha, 0.0)
    with torch.no_grad():  # the first Gaussian that would leave too little light ends a pixel
        left = torch.cumprod(1 - alpha, 0)
        going = ((left <= T_STOP) & (alpha > 0)).cumsum(0) == 0
    alpha = torch.where(going, alpha, 0.0)
    light = (
        torch.cat([torch.ones_like(alpha[:1]), torch.cumprod(1 - alpha, 0)])
        if len(order)
        else alpha.new_ones(1, x.shape[1])
    )
    weights = alpha * light[:-1]
    image = (weights.transpose(0, 1) @ features[order]).view(s.height, s.width, -1)
    return image, light[-1].view(s.height, s.width), order, weights
