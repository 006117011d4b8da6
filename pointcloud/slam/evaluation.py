"""All figures of a run on a sequence whose poses, pictures and labels are known, or as many of them as are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkit.pointcloud.slam.frames import Frames, RGBDFrame
from mmkit.pointcloud.slam.metrics import align, ate_official, ate_rmse, depth_l1, miou, path_length, psnr, rpe, ssim
from mmkit.pointcloud.slam.poses import inverse
from mmkit.pointcloud.slam.state import SlamState


def trajectory_figures(estimate: Tensor, truth: Tensor, *, with_scale: bool = False) -> dict[str, float]:
    """Errors of camera-to-world poses (F, 4, 4) in metres and degrees; true poses may hold NaN."""
    known = truth.isfinite().flatten(1).all(1)
    if int(known.sum()) < 2:
        return {}
    first = int(known.nonzero()[0])
    own, true = inverse(estimate[first : first + 1]) @ estimate, inverse(truth[first : first + 1]) @ truth
    last = int(known.nonzero()[-1])
    relative = rpe(own, true)
    return {
        "ate_rmse": ate_rmse(own, true, with_scale=with_scale), "ate_unaligned": ate_rmse(own, true, aligned=False),
        "ate_official": ate_official(inverse(own)[known], inverse(true)[known]),
        "end_error": float((own[last, :3, 3] - true[last, :3, 3]).norm()), "rpe_translation": relative["translation"],
        "rpe_rotation": relative["rotation"], "path_length": path_length(true),
        **({"scale": align(own[known, :3, 3], true[known, :3, 3], with_scale=True).scale} if with_scale else {}),
    }  # fmt: skip


@torch.no_grad()
def evaluate(
    slam: SlamState, sequence: Frames, *, every: int = 1, reference: Callable[[int], RGBDFrame] | None = None, with_scale: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Figures of a run: trajectory, and PSNR (dB), SSIM, depth L1 (metres) and mIoU of the map seen from the estimated poses.

    Args:
        every: judge every so many frames.
        reference: gives the frames to judge by, for example without noise; default the sequence's own, at the map's resolution.
        with_scale: of a monocular run.

    Returns:
        Figures by name; those for which the truth is not known are missing.
    """
    frames = [i for i in range(0, min(len(slam), len(sequence)), every) if slam.tracked[i]]
    get = reference or (lambda i: sequence[i])
    out: dict[str, Any] = {"frames": len(slam), "lost": slam.tracked.count(False), "gaussians": len(slam.map)}
    shown: dict[str, list[float]] = {"psnr": [], "ssim": [], "depth_l1": []}
    said: dict[str, list[Tensor]] = {"head": [], "argmax": [], "truth": [], "scores": []}
    truth: list[Tensor] = []
    for i in frames:
        frame = get(i).resized(slam.config.resolution)
        view = slam.render(slam.poses[i], frame.K, (frame.width, frame.height))
        want = frame.rgb()
        shown["psnr"].append(psnr(view.rgb, want))
        shown["ssim"].append(ssim(view.rgb, want))
        shown["depth_l1"].append(depth_l1(view.depth, frame.depth))
        if slam.tree is not None and slam.code_tree is not None and frame.labels is not None:
            said["truth"].append(slam.tree.leaf_of(frame.labels))
            said["head"].append(slam.classes(view.code))
            said["argmax"].append(slam.classes(view.code, "argmax"))
            said["scores"].append(slam.scores(view.code))
    for name, values in shown.items():
        good = [v for v in values if math.isfinite(v)]
        if good:
            out[name] = sum(good) / len(good)
    if shown["psnr"]:
        out["psnr_min"] = min(shown["psnr"])
    if said["truth"] and slam.tree is not None:
        k = slam.tree.num_classes
        out["miou"] = miou(said["head"], said["truth"], k)
        out["miou_per_frame"] = miou(said["head"], said["truth"], k, mode="per_frame")
        out["miou_visible_subset"] = miou(said["head"], said["truth"], k, mode="visible_subset", scores=said["scores"])
        out["miou_level_argmax"] = miou(said["argmax"], said["truth"], k)
    truth = [
        p if p is not None else torch.full((4, 4), math.nan, dtype=torch.float64) for p in _poses(sequence, len(slam))
    ]
    if truth:
        out |= trajectory_figures(slam.trajectory(), torch.stack(truth), with_scale=with_scale)
    return out


def _poses(sequence: Frames, count: int) -> list[Tensor | None]:
    known = getattr(sequence, "poses", None)
    if known is None:
        known = [sequence[i].pose for i in range(count)]
    return list(known[:count])
