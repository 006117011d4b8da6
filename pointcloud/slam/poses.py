"""Poses: quaternions (wxyz, of any length) with translations, world to camera unless said otherwise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmkit.errors import InputError
from mmkit.pointcloud.gaussians import quaternion


def rotation_matrix(quat: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4) of any length."""
    w, x, y, z = torch.nn.functional.normalize(quat, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).view(*quat.shape[:-1], 3, 3)


def matrix(quat: Tensor, shift: Tensor) -> Tensor:
    """The transform (4, 4) of a quaternion (4,) and a translation (3,), differentiable."""
    top = torch.cat([rotation_matrix(quat), shift.unsqueeze(-1)], -1)
    return torch.cat([top, top.new_tensor([[0.0, 0.0, 0.0, 1.0]])], 0)


def split(pose: Tensor) -> tuple[Tensor, Tensor]:
    """The unit quaternion (4,) and translation (3,) of a transform (4, 4)."""
    return quaternion(pose[:3, :3]), pose[:3, 3].clone()


def inverse(pose: Tensor) -> Tensor:
    """The inverse of rigid transforms (..., 4, 4)."""
    turn = pose[..., :3, :3].transpose(-1, -2)
    out = pose.clone()
    out[..., :3, :3], out[..., :3, 3] = turn, -(turn @ pose[..., :3, 3:]).squeeze(-1)
    return out


def constant_velocity(
    quat: Tensor, shift: Tensor, quat_before: Tensor, shift_before: Tensor, *, align_signs: bool = True
) -> tuple[Tensor, Tensor]:
    """The next pose if the last motion goes on: q = |q1 + (q1 - q2)|, t = 2 t1 - t2.

    q and -q are one rotation. `align_signs` brings the earlier quaternion to the side of the later one, without which the guess is
    wild after a change of sign, as it is in the official code.
    """
    q1, q2 = (torch.nn.functional.normalize(q, dim=-1) for q in (quat, quat_before))
    if align_signs:
        q2 = torch.where((q1 * q2).sum(-1, keepdim=True) < 0, -q2, q2)
    return torch.nn.functional.normalize(2 * q1 - q2, dim=-1), 2 * shift - shift_before


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees between the rotations of two transforms."""
    turn = a[:3, :3].double().T @ b[:3, :3].double()
    sine = 0.5 * torch.stack([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]).norm()
    return math.degrees(math.atan2(float(sine), 0.5 * (float(turn.trace()) - 1)))


def rigid(pose: Tensor, what: str = "pose") -> Tensor:
    """The transform (4, 4) in float64 with its rotation made exact; poses of real data are rotations only nearly.

    Raises:
        InputError: other shapes, values that are not finite, or no rotation.
    """
    pose = torch.as_tensor(pose, dtype=torch.float64)
    if pose.shape not in ((4, 4), (3, 4)) or not pose.isfinite().all():
        raise InputError(f"The {what} must be 4 x 4 finite numbers.")
    determinant = float(torch.linalg.det(pose[:3, :3]))
    if abs(determinant - 1) > 0.05:
        raise InputError(f"The {what} is no rotation: its determinant is {determinant:.3g}.")
    u, _, vt = torch.linalg.svd(pose[:3, :3])
    out = torch.eye(4, dtype=torch.float64)
    out[:3, :3], out[:3, 3] = u @ vt, pose[:3, 3]
    return out


def relative(poses: Tensor) -> Tensor:
    """Camera-to-world poses (F, 4, 4) seen from the first camera."""
    return inverse(poses[:1]) @ poses
