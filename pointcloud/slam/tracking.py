"""Where the camera is: a guess, geometry, a few photometric steps, and whether the answer can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkit.pointcloud.slam.config import HierSLAMConfig
from mmkit.pointcloud.slam.frames import RGBDFrame
from mmkit.pointcloud.slam.losses import share, silhouette_mask, tracking_terms
from mmkit.pointcloud.slam.model import SemanticGaussians
from mmkit.pointcloud.slam.poses import constant_velocity, inverse, matrix, split


@dataclass
class Tracked:
    """A camera-to-world pose (4, 4) float64 with its loss per tracked pixel and the share of the picture that the map explains."""

    pose: Tensor
    loss: float
    share: float


def extrapolated(poses: list[Tensor], moving: bool = True) -> Tensor:
    """The next camera-to-world pose if the last motion goes on, extrapolated world to camera as the papers do."""
    if not poses:
        return torch.eye(4, dtype=torch.float64)
    if len(poses) < 2 or not moving:
        return poses[-1].clone()
    now, before = split(inverse(poses[-1])), split(inverse(poses[-2]))
    return inverse(matrix(*constant_velocity(*now, *before)))


def photometric(
    map_: SemanticGaussians, frame: RGBDFrame, guess: Tensor, config: HierSLAMConfig, backend: str = "auto",
    *, iterations: int | None = None, rates: tuple[float, float] | None = None, official_candidate: bool = False,
) -> Tracked:  # fmt: skip
    """Move the camera until the map looks like the frame, Gaussians frozen; the pose of the least loss wins.

    The loss is a sum over pixels where the map is solid. Its pose is the one that produced it; `official_candidate` takes the one
    after the step, as the official code does. `iterations` and `rates` (rotation, translation) replace those of the settings.
    """
    turning, shifting = rates or (config.lr_rotation, config.lr_translation)
    steps = config.track_iters if iterations is None else iterations
    quat, shift = (x.float().clone().requires_grad_() for x in split(inverse(guess)))
    optimizer = torch.optim.Adam([{"params": [quat], "lr": turning}, {"params": [shift], "lr": shifting}])
    want, best = frame.rgb(), Tracked(guess, float("inf"), 0.0)
    least = float("inf")
    frozen = _frozen(map_)
    for i in range(steps + 1):
        with torch.set_grad_enabled(i < steps):
            seen = frozen.render(
                matrix(quat, shift),
                frame.K,
                frame.width,
                frame.height,
                codes=False,
                depth_mode=config.depth_mode,
                backend=backend,
            )
            mask = silhouette_mask(seen.depth, frame.depth, seen.alpha, config.silhouette_track).detach()
            image, depth = tracking_terms(seen.rgb, seen.depth, want, frame.depth, mask)
            loss = config.image_weight * image + config.depth_weight * depth
        before = (quat.detach().clone(), shift.detach().clone())
        pixels = int(mask.sum())
        value = float(loss.detach())
        if i < steps and pixels:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if value < least and pixels:
            least = value
            q, t = (quat.detach(), shift.detach()) if official_candidate else before
            pose = guess if i == 0 and not official_candidate else inverse(matrix(q.double(), t.double()))
            best = Tracked(pose.clone(), value / pixels, share(mask, frame.depth))
        if not pixels:
            break
    return best


def _frozen(map_: SemanticGaussians) -> SemanticGaussians:
    """A view of the map whose values get no gradients."""
    still = SemanticGaussians(0)
    for name in ("means", "rgb", "opacities", "scales"):
        setattr(still, name, torch.nn.Parameter(getattr(map_, name).detach(), requires_grad=False))
    still.quats = map_.quats
    return still


class LostDetector:
    """Tracking is lost when the map explains too little of the picture, or explains it much worse than it used to."""

    def __init__(self, config: HierSLAMConfig):
        self.config = config
        self.losses: list[float] = []

    def lost(self, tracked: Tracked) -> bool:
        """Whether a pose cannot be trusted; what can be is remembered."""
        recent = sorted(self.losses[-20:])
        usual = recent[len(recent) // 2] if len(recent) >= 3 else None
        bad = tracked.share < self.config.lost_share or (
            usual is not None and tracked.loss > self.config.lost_factor * usual
        )
        if not bad:
            self.losses.append(tracked.loss)
        return bad
