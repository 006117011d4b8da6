"""Mapping: Gaussians are added where the map lacks them, then fitted to a window of frames, with no change to poses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmkit.pointcloud.slam.config import HierSLAMConfig
from mmkit.pointcloud.slam.frames import RGBDFrame
from mmkit.pointcloud.slam.keyframes import Keyframe
from mmkit.pointcloud.slam.losses import densify_mask, mapping_terms
from mmkit.pointcloud.slam.model import SemanticGaussians, adam, new_gaussians, thinned
from mmkit.pointcloud.slam.semantics import HierarchicalSemanticLoss, SemanticHead


def add_gaussians(
    map_: SemanticGaussians, frame: RGBDFrame, view: Tensor, index: int, config: HierSLAMConfig, generator: torch.Generator,
    backend: str = "auto",
) -> int:  # fmt: skip
    """Give the map what it lacks of a frame (all of it when empty), within its bounds; how many were added."""
    mask = frame.depth > 0
    if len(map_):
        with torch.no_grad():
            seen = map_.render(
                view, frame.K, frame.width, frame.height, codes=False, depth_mode=config.depth_mode, backend=backend
            )
        mask = densify_mask(seen.alpha, seen.depth, frame.depth, config.silhouette_add)
    mask = mask & (frame.depth <= config.depth_max)
    wanted = int(mask.sum())
    mask = thinned(mask, min(config.max_new, config.max_gaussians - len(map_)), generator)
    n = int(mask.sum())
    if n:
        rgb = frame.rgb()
        made = new_gaussians(rgb, frame.depth, frame.K, view, mask, map_.code_dim, index=index, generator=generator)
        made["scales"] += 0.5 * math.log(wanted / n)  # those that were left stand in for the others
        map_.append(made)
    return n


def fit_window(
    map_: SemanticGaussians, window: list[Keyframe], config: HierSLAMConfig, generator: torch.Generator, iterations: int,
    scene_radius: float, semantic: HierarchicalSemanticLoss | None, head: SemanticHead | None,
    head_optimizer: torch.optim.Optimizer | None, backend: str = "auto",
) -> float:  # fmt: skip
    """Adam over the map from rest, one frame of the window an iteration; the mean of the last losses.

    Frames' labels are class numbers. Transparent and huge Gaussians are removed after the iterations `prune_at`; their neighbours'
    moments stay, so unlike in the official code no iteration is lost to it.
    """
    c = config
    rates = {"means": c.lr_means, "rgb": c.lr_rgb, "opacities": c.lr_opacity, "scales": c.lr_scale, "codes": c.lr_code}
    groups = [{"params": [getattr(map_, n)], "lr": lr} for n, lr in rates.items() if getattr(map_, n).numel()]
    optimizer = adam(groups, eps=1e-15)
    losses = []
    for i in range(iterations):
        chosen = window[int(torch.randint(len(window), (), generator=generator))]
        loss = _loss(map_, chosen, config, semantic, head, i, backend)
        optimizer.zero_grad()
        if head_optimizer is not None:
            head_optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if head_optimizer is not None:
            head_optimizer.step()
        losses.append(float(loss.detach()))
        if i in config.prune_at:
            kept = map_.prune_mask(scene_radius)
            if not bool(kept.all()) and bool(kept.any()):
                map_.select(kept, optimizer)
    last = losses[-10:]
    return sum(last) / len(last) if last else float("nan")


def _loss(
    map_: SemanticGaussians, chosen: Keyframe, config: HierSLAMConfig, semantic: HierarchicalSemanticLoss | None,
    head: SemanticHead | None, iteration: int, backend: str,
) -> Tensor:  # fmt: skip
    frame = chosen.frame
    labelled = semantic is not None and frame.labels is not None
    seen = map_.render(
        chosen.view, frame.K, frame.width, frame.height, codes=labelled, depth_mode=config.depth_mode,
        detach_geometry=config.detach_geometry, backend=backend,
    )  # fmt: skip
    image, depth = mapping_terms(seen.rgb, seen.depth, frame.rgb(), frame.depth)
    loss = config.image_weight * image + config.depth_weight * depth
    if labelled and semantic is not None and frame.labels is not None:
        loss = loss + config.semantic_weight * semantic(seen.code, frame.labels, head, iteration)
    return loss
