"""Settings of a run and the presets for the published data sets and for a CPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mmkit.errors import InputError, check_seed, nearest

TRACKERS = ("auto", "gicp", "photometric", "constant", "given")


@dataclass(frozen=True)
class HierSLAMConfig:
    """Settings of `HierSLAM`. The defaults are the authors' for Replica, but for what is marked (ours).

    Attributes:
        resolution: (ours) longer side, in pixels, at which the map is rendered while tracking and mapping; `None`: that of the frames.
        tracker: "photometric" (the papers'), "gicp" (ours: scan-to-model with `small_gicp`, then `refine_iters` photometric steps),
            "auto" (gicp where it is installed), "constant" (constant velocity only) or "given" (poses of the data set).
        map_every, keyframe_every, window: frames between mapping rounds and between keyframes; frames a round chooses from.
        track_iters, lr_rotation, lr_translation: of photometric tracking.
        refine_iters, refine_lr_rotation, refine_lr_translation: (ours) of the photometric steps after geometry.
        map_iters, first_map_iters: iterations of a mapping round, and of the first one (`None`: as the others).
        image_weight, depth_weight, semantic_weight: of the terms of the losses.
        leaf_weight, leaf_from_iter, ignore_index: of the semantic loss; see `HierarchicalSemanticLoss`. `leaf_from_iter` is at most half of
            `map_iters`, or the head would never learn.
        semantics: "tree" (a code and a head), "flat" (one number per class, no head) or "none".
        detach_geometry: labels do not move, scale or fade Gaussians.
        silhouette_track, silhouette_add: opacity above which pixels are tracked, and below which Gaussians are added.
        depth_mode: "ED", depths divided by opacity (ours), or "D", the official sum, which reads too near where opacity is below 1.
        lr_means, lr_rgb, lr_opacity, lr_scale, lr_code, lr_head: learning rates of the map.
        prune_at: iterations of a round after which transparent and huge Gaussians are removed.
        max_gaussians, max_new, max_keyframes: (ours) bounds of the map, of what a frame may add, and of kept keyframes.
        lost_share, lost_factor: (ours) tracking is lost when less of the picture than this is explained by the map, or the loss is this
            many times its running median.
        relocalise: (ours) look for a lost camera among the keyframes.
        loop_closure: (ours) correct keyframes and map when an old place is seen again. It mends the path's end; where drift came in bursts
            the middle can become worse (`benchmarks/results/slam.md`), so it is off by default.
        gicp_voxel, gicp_reach: metres between points of a scan, and how far a pair may lie apart.
        scan_every: every so many frames a scan is added to the model that scans are aligned with.
        depth_max: metres beyond which depths are not used.
        seed: of everything random.
    """

    resolution: int | None = None
    tracker: str = "auto"
    map_every: int = 8
    keyframe_every: int = 5
    window: int = 24
    track_iters: int = 40
    lr_rotation: float = 4e-4
    lr_translation: float = 2e-3
    refine_iters: int = 4
    refine_lr_rotation: float = 5e-5
    refine_lr_translation: float = 1e-4
    map_iters: int = 60
    first_map_iters: int | None = None
    image_weight: float = 0.5
    depth_weight: float = 1.0
    semantic_weight: float = 0.2
    leaf_weight: float = 5.0
    leaf_from_iter: int = 14
    ignore_index: int | None = None
    semantics: str = "tree"
    detach_geometry: bool = False
    silhouette_track: float = 0.99
    silhouette_add: float = 0.5
    depth_mode: str = "ED"
    lr_means: float = 1e-4
    lr_rgb: float = 2.5e-3
    lr_opacity: float = 0.05
    lr_scale: float = 1e-3
    lr_code: float = 0.05
    lr_head: float = 5e-4
    prune_at: tuple[int, ...] = (0, 20)
    max_gaussians: int = 1_000_000
    max_new: int = 400_000
    max_keyframes: int = 400
    lost_share: float = 0.2
    lost_factor: float = 5.0
    relocalise: bool = True
    loop_closure: bool = False
    gicp_voxel: float = 0.03
    scan_every: int = 4
    gicp_reach: float = 0.1
    depth_max: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prune_at", tuple(self.prune_at))
        choices = {"tracker": TRACKERS, "semantics": ("tree", "flat", "none"), "depth_mode": ("ED", "D")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be {', '.join(known)}, not {getattr(self, name)!r}.")
        counts = ("map_every", "keyframe_every", "window", "max_gaussians", "max_new", "max_keyframes", "scan_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if min(self.track_iters, self.refine_iters, self.map_iters, self.first_map_iters or 0) < 0:
            raise InputError("Numbers of iterations cannot be negative.")
        check_seed(self.seed)
        if self.resolution is not None and self.resolution < 16:
            raise InputError(f"resolution must be at least 16 pixels, not {self.resolution}.")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> HierSLAMConfig:
        """Settings of a preset, with changes: "replica", "scannet", "tum", "cpu_small", "cpu_live".

        Raises:
            InputError: another name, or a setting that does not exist.
        """
        if name not in PRESETS:
            raise InputError(f"Unknown preset {name!r}. {nearest(name, PRESETS)}")
        known = {f.name for f in dataclasses.fields(cls)}
        for key in changes:
            if key not in known:
                raise InputError(f"There is no setting {key!r}. {nearest(key, known)}")
        return cls(**{**PRESETS[name], **changes})

    def to_dict(self) -> dict[str, Any]:
        """JSON-friendly."""
        return {**dataclasses.asdict(self), "prune_at": list(self.prune_at)}


PRESETS: dict[str, dict[str, Any]] = {
    "replica": {},
    "scannet": {
        "map_every": 1, "keyframe_every": 8, "window": 10, "track_iters": 100, "lr_rotation": 5e-4, "lr_translation": 5e-4,
        "map_iters": 30, "semantic_weight": 0.1,
    },
    "tum": {
        "map_every": 1, "keyframe_every": 5, "window": 20, "track_iters": 200, "lr_rotation": 2e-3, "lr_translation": 2e-3,
        "map_iters": 30, "semantic_weight": 0.0, "semantics": "none",
    },
    "cpu_small": {  # depths divided by opacity do not press it towards 1, so 0.99 would leave little to track on real pictures
        "silhouette_track": 0.7, "resolution": 160, "map_every": 4, "keyframe_every": 4, "window": 8, "lr_rotation": 1e-3,
        "map_iters": 50, "semantic_weight": 0.05, "lr_head": 5e-3, "max_gaussians": 60_000, "max_new": 20_000, "max_keyframes": 200,
    },
    "cpu_live": {
        "silhouette_track": 0.7, "resolution": 160, "map_every": 5, "keyframe_every": 5, "window": 5, "track_iters": 10,
        "lr_rotation": 2e-3, "refine_iters": 0, "map_iters": 9, "first_map_iters": 20, "leaf_from_iter": 0, "lr_head": 3e-2,
        "lr_rgb": 5e-3, "max_gaussians": 40_000, "max_new": 20_000, "max_keyframes": 60, "gicp_voxel": 0.04,
    },
}  # fmt: skip
"""Changes of the defaults by preset. "tum" has SplaTAM's settings of that data set, as the authors of Hier-SLAM give none."""
