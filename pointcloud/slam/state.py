"""What a system knows, and how it is looked at: map, head, path, keyframes, scans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkit.errors import InputError
from mmkit.pointcloud.slam import gicp
from mmkit.pointcloud.slam.config import HierSLAMConfig
from mmkit.pointcloud.slam.keyframes import Keyframe
from mmkit.pointcloud.slam.model import SemanticGaussians
from mmkit.pointcloud.slam.poses import inverse
from mmkit.pointcloud.slam.semantics import HierarchicalSemanticLoss, SemanticHead
from mmkit.pointcloud.slam.tracking import LostDetector
from mmkit.pointcloud.slam.tree import SemanticTree

Labeler = Callable[[Tensor], Tensor]
DepthSource = Callable[[Tensor, Tensor], Tensor]


@dataclass
class View:
    """A rendering: rgb (H, W, 3) in 0..1, depth (H, W) in metres, alpha (H, W), code (H, W, D), and labels (H, W): class numbers, -1
    where the map is less than half solid or holds no labels."""

    rgb: Tensor
    depth: Tensor
    alpha: Tensor
    code: Tensor
    labels: Tensor


class SlamState:
    """Everything between two frames; see `HierSLAM`, which derives from it."""

    def __init__(
        self, config: HierSLAMConfig | str | None = None, tree: SemanticTree | None = None, *, backend: str = "auto",
        labeler: Labeler | None = None, depth_source: DepthSource | None = None,
    ):  # fmt: skip
        self.config = HierSLAMConfig.preset(config) if isinstance(config, str) else config or HierSLAMConfig()
        self.backend, self.labeler, self.depth_source = backend, labeler, depth_source
        self.tracker = self.config.tracker
        if self.tracker == "auto":
            self.tracker = "gicp" if gicp.gicp_available() else "photometric"
        if self.tracker == "gicp":
            gicp.library()
        self.tree = tree
        kind = self.config.semantics if tree is not None else "none"
        self.semantics = kind
        self.code_tree = None if tree is None or kind == "none" else tree.flat() if kind == "flat" else tree
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.map = SemanticGaussians(0 if self.code_tree is None else self.code_tree.code_dim)
        self.head: SemanticHead | None = None
        self.head_optimizer: torch.optim.Adam | None = None
        if kind == "tree" and tree is not None:
            self.head = SemanticHead(tree.code_dim, tree.num_classes, self.generator)
            self.head_optimizer = torch.optim.Adam(self.head.parameters(), lr=self.config.lr_head)
        self.loss = None
        if self.code_tree is not None:
            c = self.config
            self.loss = HierarchicalSemanticLoss(
                self.code_tree,
                leaf_weight=c.leaf_weight,
                leaf_from_iter=min(c.leaf_from_iter, c.map_iters // 2),
                ignore_index=c.ignore_index,
            )
        self.poses: list[Tensor] = []
        self.tracked: list[bool] = []
        self.keyframes: list[Keyframe] = []
        self.scans = gicp.ScanModel(
            self.config.gicp_voxel, self.config.gicp_reach, self.config.depth_max, self.config.max_keyframes
        )
        self.detector = LostDetector(self.config)
        self.radius = 1.0
        self.loops: list[tuple[int, int]] = []
        self.unknown_labels: set[int] = set()
        self._origin: Tensor | None = None
        self.seen: bytes | None = None
        """Of the first and the latest frame, when `run` saved the state: what it goes on with must begin with the same."""

    def __len__(self) -> int:
        return len(self.poses)

    def __repr__(self) -> str:
        return f"HierSLAM({len(self)} frames, {len(self.keyframes)} keyframes, {len(self.map)} Gaussians, tracker={self.tracker!r})"

    def trajectory(self) -> Tensor:
        """Camera-to-world poses (F, 4, 4) float64, in the first camera's frame."""
        return torch.stack(self.poses) if self.poses else torch.zeros(0, 4, 4, dtype=torch.float64)

    def bytes(self) -> dict[str, int]:
        """Memory that is held: of the map, of keyframes, and of scans."""
        kept = 0
        for k in self.keyframes:
            kept += sum(
                x.numel() * x.element_size() for x in (k.frame.color, k.frame.depth, k.frame.labels) if x is not None
            )
        return {"map": self.map.bytes(), "keyframes": kept, "scans": self.scans.bytes()}

    # --------------------------------------------------------------------------------------------------------- looking

    @torch.no_grad()
    def render(self, pose: Tensor, K: Tensor, size: tuple[int, int], *, decode: str = "head") -> View:
        """What a camera sees of the map.

        Args:
            pose: (4, 4) camera to world.
            K: (3, 3) in pixels.
            size: (width, height).
            decode: "head", or "closest" or "argmax" of `SemanticTree.decode`.
        """
        width, height = size
        labelled = self.code_tree is not None
        seen = self.map.render(
            inverse(pose).float(), K.float(), width, height, codes=labelled, depth_mode="ED", backend=self.backend
        )
        labels = torch.full((height, width), -1)
        if labelled:
            labels = torch.where(seen.alpha >= 0.5, self.classes(seen.code, decode), -1)
        return View(seen.rgb.clamp(0, 1), seen.depth, seen.alpha, seen.code, labels)

    @torch.no_grad()
    def scores(self, code: Tensor) -> Tensor:
        """Scores (..., K) of the classes for codes (..., D)."""
        if self.code_tree is None:
            raise InputError("This map holds no labels.")
        if self.semantics == "flat" or self.head is None:
            return code
        return self.head(code)

    def classes(self, code: Tensor, decode: str = "head") -> Tensor:
        """Class numbers (...) of codes (..., D)."""
        if self.code_tree is None:
            raise InputError("This map holds no labels.")
        if decode == "head" or self.semantics == "flat":
            return self.scores(code).argmax(-1)
        return self.code_tree.decode(code, decode)

    def labels(self) -> Tensor | None:
        """A class number for each Gaussian (N,), or `None` without labels."""
        return None if self.code_tree is None else self.classes(self.map.codes.detach())
