"""Real spherical harmonics up to degree 3, as 3D Gaussian splatting orders and signs them (arXiv 2308.04079)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkit.errors import InputError

C0 = 0.28209479177387814
MAX_DEGREE = 3


def basis(degree: int, directions: Tensor) -> Tensor:
    """The (degree + 1)^2 functions at unit vectors (..., 3): (..., K)."""
    x, y, z = directions.unbind(-1)
    values = [torch.full_like(x, C0)]
    if degree > 0:
        c = 0.48860251190291987
        values += [-c * y, c * z, -c * x]
    if degree > 1:
        xx, yy, zz = x * x, y * y, z * z
        a, b, c = 1.0925484305920792, 0.31539156525252005, 0.5462742152960396
        values += [a * x * y, -a * y * z, b * (2 * zz - xx - yy), -a * x * z, c * (xx - yy)]
    if degree > 2:
        a, b, c, d, e = 0.5900435899266435, 2.890611442640554, 0.4570457994644658, 0.3731763325901154, 1.445305721320277
        values += [
            -a * y * (3 * xx - yy), b * x * y * z, -c * y * (4 * zz - xx - yy), d * z * (2 * zz - 3 * xx - 3 * yy),
            -c * x * (4 * zz - xx - yy), e * z * (xx - yy), -a * x * (xx - 3 * yy),
        ]  # fmt: skip
    return torch.stack(values, -1)


def spherical_harmonics(degree: int, directions: Tensor, coefficients: Tensor) -> Tensor:
    """Sum of basis functions times coefficients.

    Args:
        degree: 0 to 3.
        directions: (..., 3), of any length but zero.
        coefficients: (..., K, 3) with K >= (degree + 1)^2.

    Returns:
        (..., 3), before 0.5 is added.
    """
    if not 0 <= degree <= MAX_DEGREE or coefficients.shape[-2] < (degree + 1) ** 2:
        raise InputError(
            f"sh_degree must be 0 to {MAX_DEGREE} and colors (..., K, 3) with K >= (sh_degree + 1)^2; got degree {degree} and "
            f"{tuple(coefficients.shape)}."
        )
    if degree == 0:
        return C0 * coefficients[..., 0, :]
    values = basis(degree, torch.nn.functional.normalize(directions, dim=-1))
    return (values.unsqueeze(-1) * coefficients[..., : (degree + 1) ** 2, :]).sum(-2)


class _FromCamera(torch.autograd.Function):
    """Vectors from camera centres (I, 3) to points (I, N, 3), whose gradient is summed the same way on any number of threads."""

    @staticmethod
    def forward(ctx, points: Tensor, centres: Tensor) -> Tensor:  # type: ignore[override]
        return points - centres[:, None]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if grad.is_cuda:
            return grad, -grad.sum(1)
        return grad, -torch.from_numpy(grad.detach().numpy().sum(1, dtype="float64")).to(grad.dtype)


def seen_colors(degree: int, means: Tensor, viewmats: Tensor, coefficients: Tensor) -> Tensor:
    """Colours (B, C, N, 3) of Gaussians (B, N, 3) from cameras (B, C, 4, 4): harmonics plus 0.5, not below 0.

    `coefficients`: (B, N, K, 3), or (B, C, N, K, 3).
    """
    batch, cameras = viewmats.shape[:2]
    if coefficients.dim() == 4:
        coefficients = coefficients[:, None].expand(-1, cameras, -1, -1, -1)
    if degree == 0:  # the same from everywhere
        return spherical_harmonics(0, means, coefficients).add(0.5).clamp_min(0.0)
    inverse, singular = torch.linalg.inv_ex(viewmats)
    if singular.any():
        raise InputError("rasterization: a view matrix has no inverse, so that there is no place to look from.")
    centres = inverse[..., :3, 3].reshape(-1, 3)
    points = means.masked_fill(~means.isfinite(), 0)  # not seen: these may not spoil the cameras' gradients
    points = points[:, None].expand(-1, cameras, -1, -1).reshape(batch * cameras, -1, 3)
    directions = _FromCamera.apply(points, centres).view(batch, cameras, -1, 3)
    return spherical_harmonics(degree, directions, coefficients).add(0.5).clamp_min(0.0)
