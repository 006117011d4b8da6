"""Old places seen again: lost cameras are found among the keyframes, and drift is spread over a graph of poses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkit.pointcloud.slam.frames import RGBDFrame
from mmkit.pointcloud.slam.gicp import between
from mmkit.pointcloud.slam.keyframes import Keyframe, KeyframeSelector
from mmkit.pointcloud.slam.poses import angle, inverse, matrix, rigid
from mmkit.pointcloud.slam.state import SlamState
from mmkit.pointcloud.slam.tracking import Tracked, photometric

CANDIDATES = 5
APART = 30
"""Frames between which a place counts as an old one."""


def thumbnail(color: Tensor) -> Tensor:
    """A picture (H, W, 3) as 16 x 12 grey levels of mean 0 and length 1, to compare places by."""
    grey = color.float().mean(-1)[None, None]
    small = torch.nn.functional.interpolate(grey, (12, 16), mode="area").flatten()
    small = small - small.mean()
    return small / small.norm().clamp_min(1e-6)


def relocalised(slam: SlamState, small: Any, points: Any) -> Tracked | None:
    """The pose of a lost camera: from the keyframes that look most alike, aligned and accepted only if the map explains the picture."""
    if not slam.keyframes:
        return None
    own = thumbnail(small.color)
    alike = torch.stack([thumbnail(k.frame.color) @ own for k in slam.keyframes])
    best: Tracked | None = None
    for i in alike.argsort(descending=True, stable=True)[:CANDIDATES].tolist():
        guess = rigid(inverse(slam.keyframes[i].view.double()))
        if points is not None:
            guess, _ = slam.scans.align(points, guess, 5 * slam.config.gicp_reach)
            guess, found = slam.scans.align(points, guess)
            if found < 0.5:
                continue
        c = slam.config
        if points is None:
            tracked = photometric(slam.map, small, guess, c, slam.backend, iterations=max(c.track_iters, 60))
        else:
            rates = (c.refine_lr_rotation, c.refine_lr_translation)
            tracked = photometric(slam.map, small, guess, c, slam.backend, iterations=c.refine_iters, rates=rates)
        if tracked.share > 0.4 and (best is None or tracked.loss < best.loss):
            best = tracked
    usual = slam.detector.losses[-20:]
    if best is None or (usual and best.loss > slam.config.lost_factor * sorted(usual)[len(usual) // 2]):
        return None
    return best


YAWS, AHEAD, BESIDE = (0.0, -15.0, 15.0, -30.0, 30.0), (0.0, 0.5, -0.5), 0.25


def searched(
    slam: SlamState, small: RGBDFrame, points: np.ndarray, starts: list[Tensor]
) -> tuple[Tensor, float] | None:
    """The pose of a camera that moved far: scans are aligned from many places, and the map's picture decides between them.

    Geometry alone is often as content with a wrong place. A second round starts beside the best of the first. The pose (4, 4) and the
    share of the picture that the map explains, or `None` where no place shows what the frame does.
    """
    reach, best = slam.config.gicp_reach, None
    places = [start @ _moved(yaw, 0.0, ahead) for start in starts for yaw in YAWS for ahead in AHEAD]
    for _ in range(2):
        for place in places:
            pose = place
            for width in (8, 3, 1):
                pose, _ = slam.scans.align(points, pose, width * reach)
            seen = photometric(slam.map, small, pose, slam.config, slam.backend, iterations=0)
            if seen.share > 0.3 and (best is None or seen.loss < best[0]):
                best = (seen.loss, pose, seen.share)
        if best is None:
            return None
        sides = ((BESIDE, 0.0), (-BESIDE, 0.0), (0.0, BESIDE), (0.0, -BESIDE))
        places = [best[1] @ _moved(0.0, x, z) for x, z in sides]
    return None if best is None else (best[1], best[2])


def _moved(yaw: float, x: float, z: float) -> Tensor:
    """A step of the camera: turned by `yaw` degrees, moved to the right and ahead in metres."""
    turn = torch.tensor([1.0, 0.0, math.tan(math.radians(yaw) / 2), 0.0], dtype=torch.float64)
    return matrix(turn, torch.tensor([x, 0.0, z], dtype=torch.float64))


def close_loop(slam: SlamState, present: Keyframe, points: np.ndarray) -> bool:
    """Look for an old place in the present keyframe; if drift is found, move poses, keyframes, scans and map. Whether it was."""
    old = [k for k in slam.keyframes if present.index - k.index >= APART]
    if not old:
        return False
    seen = KeyframeSelector(slam.config.window, torch.Generator().manual_seed(present.index)).overlap(
        present.frame, present.view, old
    )
    best = int(np.argmax(seen))
    scans = {i: (p, pose) for i, p, pose in slam.scans.scans}
    near = min(scans, key=lambda i: abs(i - old[best].index), default=None)
    if seen[best] < 0.3 or near is None or present.index - near < APART:
        return False
    target, target_pose = scans[near]
    pose = slam.poses[present.index]
    guess = inverse(target_pose) @ pose
    reach = slam.config.gicp_reach
    measured, _ = between(points, target, guess, slam.config.gicp_voxel, 5 * reach)
    measured, found = between(points, target, measured, slam.config.gicp_voxel, reach)
    drift = inverse(guess) @ measured
    if found < 0.5 or float(drift[:3, 3].norm()) > 1.0 or angle(torch.eye(4), drift) > 30:
        return False
    if float(drift[:3, 3].norm()) < 0.01 and angle(torch.eye(4), drift) < 0.3:
        return False
    slam.loops.append((near, present.index))
    corrected = optimise(torch.stack(slam.poses), [(near, present.index, measured)])
    move(slam, corrected)
    return True


def optimise(poses: Tensor, loops: list[tuple[int, int, Tensor]], weight: float = 20.0) -> Tensor:
    """Poses (F, 4, 4) that keep the steps between neighbours and meet loops (i, j, transform from camera j to camera i), least squares.

    The first pose stays. Rotations are vectors on both sides of an edge; scipy's sparse solver does the rest.
    """
    from scipy.optimize import least_squares
    from scipy.sparse import lil_matrix
    from scipy.spatial.transform import Rotation

    n = len(poses)
    turns, shifts = Rotation.from_matrix(poses[:, :3, :3].numpy()), poses[:, :3, 3].numpy()
    first = np.array([*range(n - 1), *(i for i, _, _ in loops)])
    second = np.array([*range(1, n), *(j for _, j, _ in loops)])
    edges = [inverse(poses[a]) @ poses[b] for a, b in zip(range(n - 1), range(1, n), strict=True)] + [
        m for _, _, m in loops
    ]
    measured = torch.stack(edges).numpy()
    should_turn, should_shift = Rotation.from_matrix(measured[:, :3, :3]), measured[:, :3, 3]
    weights = np.array([1.0] * (n - 1) + [weight] * len(loops))[:, None]

    def unpack(x: np.ndarray) -> tuple[Any, np.ndarray]:
        x = np.concatenate([np.zeros(6), x]).reshape(n, 6)
        return turns * Rotation.from_rotvec(x[:, :3]), shifts + x[:, 3:]

    def residual(x: np.ndarray) -> np.ndarray:
        turn, shift = unpack(x)
        back = turn[first].inv()
        turn_error = (should_turn.inv() * back * turn[second]).as_rotvec()
        shift_error = back.apply(shift[second] - shift[first]) - should_shift
        return (np.concatenate([turn_error, shift_error], 1) * weights).ravel()

    pattern = lil_matrix((6 * len(first), 6 * n), dtype=int)
    for row, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        for k in (a, b):
            pattern[6 * row : 6 * row + 6, 6 * k : 6 * k + 6] = 1
    solved = least_squares(
        residual, np.zeros(6 * (n - 1)), jac_sparsity=pattern[:, 6:], method="trf", max_nfev=30, x_scale=1.0
    )
    turn, shift = unpack(solved.x)
    out = torch.eye(4, dtype=torch.float64).repeat(n, 1, 1)
    out[:, :3, :3], out[:, :3, 3] = torch.from_numpy(turn.as_matrix()), torch.from_numpy(shift)
    return out


def move(slam: SlamState, corrected: Tensor) -> None:
    """Give the system corrected poses: every Gaussian moves with the frame that added it."""
    change = corrected @ inverse(torch.stack(slam.poses))
    with torch.no_grad():
        own = change[slam.map.birth].float()
        slam.map.means.copy_((own[:, :3, :3] @ slam.map.means.unsqueeze(-1)).squeeze(-1) + own[:, :3, 3])
    slam.poses = [p.clone() for p in corrected]
    for k in slam.keyframes:
        k.view = inverse(slam.poses[k.index]).float()
    slam.scans.scans = [(i, points, slam.poses[i].clone()) for i, points, _ in slam.scans.scans]
    slam.scans.rebuild()
