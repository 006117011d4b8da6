"""How good a run was: trajectories, pictures, depths and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkit.errors import InputError
from mmkit.pointcloud.similarity import ssim as _ssim
from mmkit.pointcloud.slam.poses import angle, inverse


@dataclass(frozen=True)
class Alignment:
    """estimate -> scale * turn @ estimate + shift."""

    turn: Tensor
    shift: Tensor
    scale: float

    def __call__(self, points: Tensor) -> Tensor:
        return self.scale * points @ self.turn.T + self.shift


def align(estimate: Tensor, truth: Tensor, *, with_scale: bool = False) -> Alignment:
    """The rigid motion (with scale if asked) that brings points (F, 3) nearest to others (Umeyama, 1991)."""
    a, b = estimate.double(), truth.double()
    ma, mb = a.mean(0), b.mean(0)
    u, s, vt = torch.linalg.svd((b - mb).T @ (a - ma) / len(a))
    sign = torch.ones(3, dtype=torch.float64)
    sign[2] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vt))
    turn = u @ torch.diag(sign) @ vt
    spread = float((a - ma).square().sum(1).mean())
    scale = float((s * sign).sum()) / max(spread, 1e-300) if with_scale else 1.0
    return Alignment(turn, mb - scale * turn @ ma, scale)


def _centres(estimate: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    if estimate.shape != truth.shape or estimate.dim() != 3 or estimate.shape[1:] != (4, 4):
        raise InputError(f"Trajectories must both be (F, 4, 4); got {tuple(estimate.shape)} and {tuple(truth.shape)}.")
    known = (estimate.isfinite() & truth.isfinite()).flatten(1).all(1)
    if not known.any():
        raise InputError("No frame has both an estimated and a true pose.")
    return estimate[known, :3, 3].double(), truth[known, :3, 3].double()


def ate_rmse(estimate: Tensor, truth: Tensor, *, aligned: bool = True, with_scale: bool = False) -> float:
    """Root mean square distance of camera centres, in metres, after a rigid alignment.

    Args:
        estimate, truth: camera-to-world poses (F, 4, 4); frames with values that are not finite are left out.
        aligned: `False` compares as they are.
        with_scale: for monocular runs, whose scale is not known.
    """
    a, b = _centres(estimate, truth)
    if aligned and len(a) > 2:
        a = align(a, b, with_scale=with_scale)(a)
    return float((a - b).square().sum(1).mean().sqrt())


def ate_official(estimate: Tensor, truth: Tensor) -> float:
    """What the official code prints as "ATE RMSE": the MEAN distance of aligned translations of the WORLD-TO-CAMERA matrices (F, 4, 4)."""
    a, b = _centres(estimate, truth)
    return float((align(a, b)(a) - b).norm(dim=1).mean())


def rpe(estimate: Tensor, truth: Tensor, delta: int = 1) -> dict[str, float]:
    """Relative pose error over `delta` frames: RMSE of translation in metres and of rotation in degrees."""
    if not 1 <= delta < len(estimate):
        raise InputError(f"delta must be 1 to {len(estimate) - 1} for {len(estimate)} frames, not {delta}.")
    shifts, turns = [], []
    for i in range(len(estimate) - delta):
        parts = [p[j].double() for p in (estimate, truth) for j in (i, i + delta)]
        if not all(p.isfinite().all() for p in parts):
            continue
        moved, should = inverse(parts[0]) @ parts[1], inverse(parts[2]) @ parts[3]
        error = inverse(should) @ moved
        shifts.append(float(error[:3, 3].norm()))
        turns.append(angle(should, moved))
    if not shifts:
        raise InputError("No two frames at that distance have known poses.")
    return {"translation": _rms(shifts), "rotation": _rms(turns)}


def path_length(poses: Tensor) -> float:
    """Metres along the camera centres (F, 3 of F, 4, 4)."""
    places = poses[poses.isfinite().flatten(1).all(1), :3, 3].double()
    return float(places.diff(dim=0).norm(dim=1).sum())


def psnr(image: Tensor, reference: Tensor) -> float:
    """dB of pictures in 0..1; at most 100."""
    return -10 * math.log10(max(float((image - reference).square().mean()), 1e-10))


def ssim(image: Tensor, reference: Tensor) -> float:
    """Structural similarity of pictures (H, W, 3) in 0..1."""
    return float(_ssim(image.permute(2, 0, 1), reference.permute(2, 0, 1)))


def depth_l1(depth: Tensor, reference: Tensor) -> float:
    """Mean absolute difference in metres where the reference is known; NaN where nothing is."""
    known = reference > 0
    return float((depth - reference)[known].abs().mean()) if bool(known.any()) else float("nan")


def miou(
    predicted: Sequence[Tensor], truth: Sequence[Tensor], num_classes: int, *, mode: str = "dataset", scores: Sequence[Tensor] | None = None
) -> float:  # fmt: skip
    """Mean intersection over union of class pictures; pixels whose truth is -1 do not count.

    Args:
        predicted, truth: class numbers (H, W), frame by frame.
        mode: "dataset" sums over frames before dividing and averages over classes that occur in the truth; "per_frame" averages over
            classes of a frame, then over frames (the official protocol); "visible_subset" is that with predictions limited to classes
            of the frame's truth, which flatters: published tables use it.
        scores: (H, W, K) of each frame, for "visible_subset"; without them predictions of other classes count as wrong.
    """
    if len(predicted) != len(truth) or not len(truth):
        raise InputError(f"{len(predicted)} predictions and {len(truth)} true label pictures cannot be compared.")
    if mode not in ("dataset", "per_frame", "visible_subset"):
        raise InputError(f"mode must be 'dataset', 'per_frame' or 'visible_subset', not {mode!r}.")
    counts = []
    for i, (p, t) in enumerate(zip(predicted, truth, strict=True)):
        known = t >= 0
        if not bool(known.any()):
            continue
        if mode == "visible_subset" and scores is not None:
            present = t[known].unique()
            p = present[scores[i][..., present].argmax(-1)]
        counts.append(_counts(p[known], t[known], num_classes))
    if not counts:
        return float("nan")
    if mode == "dataset":
        both, said, there = (torch.stack(x).sum(0) for x in zip(*counts, strict=True))
        occurs = there > 0
        return float((both / (said + there - both).clamp_min(1))[occurs].mean())
    means = []
    for both, said, there in counts:
        union = said + there - both
        occurs = there > 0 if mode == "visible_subset" else union > 0
        means.append(float((both / union.clamp_min(1))[occurs].mean()))
    return sum(means) / len(means)


def _counts(p: Tensor, t: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    both = torch.bincount(t[p == t], minlength=k).double()
    return both, torch.bincount(p[p >= 0], minlength=k).double(), torch.bincount(t, minlength=k).double()


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))
