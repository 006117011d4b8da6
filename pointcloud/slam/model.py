"""The map: Gaussians with colours and label codes, their rendering, and surgery that keeps an optimiser in step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.errors import InputError
from mmkit.ops import rasterization
from mmkit.ops.gaussian.harmonics import C0
from mmkit.pointcloud.gaussians import GaussianModel
from mmkit.pointcloud.slam.frames import points_of_depth, to_world

NAMES = ("means", "rgb", "opacities", "scales", "codes")
NEAR = 0.01


@dataclass
class Rendering:
    """What a camera sees: rgb (H, W, 3), depth (H, W), alpha (H, W), code (H, W, D); tensors with gradients."""

    rgb: Tensor
    depth: Tensor
    alpha: Tensor
    code: Tensor


class SemanticGaussians(nn.Module):
    """N round Gaussians with plain colours and codes.

    Parameters: `means` (N, 3) in the world, `rgb` (N, 3), `opacities` (N,) logits, `scales` (N, 1) logarithms of standard deviations
    (N, 3 for maps of the authors' that are not round), `codes` (N, D). Buffers: `quats` (N, 4), which matter for three scales only,
    and `birth` (N,), the frame that added each. 12 + D numbers each, as in arXiv 2409.12518.
    """

    def __init__(self, code_dim: int):
        super().__init__()
        self.means, self.rgb = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(0, 3))
        self.opacities, self.scales = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0, 1))
        self.codes = nn.Parameter(torch.zeros(0, code_dim))
        self.quats: Tensor
        self.birth: Tensor
        self.register_buffer("quats", torch.zeros(0, 4))
        self.register_buffer("birth", torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def code_dim(self) -> int:
        """D."""
        return self.codes.shape[1]

    def bytes(self) -> int:
        """Of the map as it is stored: 48 + 4 D for each Gaussian."""
        return len(self) * (48 + 4 * self.code_dim)

    def render(
        self, view: Tensor, K: Tensor, width: int, height: int, *, codes: bool = True, depth_mode: str = "ED",
        detach_geometry: bool = False, backend: str = "auto",
    ) -> Rendering:  # fmt: skip
        """Render everything in one pass.

        Args:
            view: (4, 4) world to camera; gets gradients.
            K: (3, 3).
            codes: render label codes too.
            depth_mode: "ED" divides by alpha, "D" does not.
            detach_geometry: gradients of codes stop at the codes (a second pass).
            backend: of `mmkit.ops.rasterization`.
        """
        together = codes and not detach_geometry
        colors = torch.cat([self.rgb, self.codes], 1) if together else self.rgb
        out, alpha = self._pass(colors, view, K, width, height, "RGB+" + depth_mode, backend)
        code = out[..., 3:-1]
        if codes and detach_geometry:
            with torch.no_grad():
                still = [x.detach() for x in (self.means, self.scales, self.opacities)]
            code, _ = self._pass(self.codes, view.detach(), K, width, height, "RGB", backend, still)
        return Rendering(out[..., :3], out[..., -1], alpha, code)

    def _pass(
        self, colors: Tensor, view: Tensor, K: Tensor, width: int, height: int, mode: str, backend: str,
        geometry: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        means, scales, opacities = geometry or [self.means, self.scales, self.opacities]
        out, alpha, _ = rasterization(
            means, self.quats, scales.exp().expand(-1, 3), opacities.sigmoid(), colors, view[None], K[None], width, height,
            render_mode=mode, near_plane=NEAR, backend=backend,
        )  # fmt: skip
        return out[0], alpha[0, ..., 0]

    # -------------------------------------------------------------------------------------------------------- surgery

    @torch.no_grad()
    def replace(
        self, change: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None, kept: Tensor | None = None
    ) -> None:
        """New values for all parameters and buffers, of another length if need be.

        The optimiser's moments follow: those of line i become those of line `kept[i]`, zero where `kept[i]` is -1.
        """
        for name in NAMES:
            old = getattr(self, name)
            new = nn.Parameter(change[name].detach().clone().contiguous())
            setattr(self, name, new)
            if optimizer is not None:
                _hand_over(optimizer, old, new, kept)
        self.quats, self.birth = change["quats"].clone(), change["birth"].clone()

    def tensors(self) -> dict[str, Tensor]:
        """Copies by name."""
        return {name: getattr(self, name).detach().clone() for name in (*NAMES, "quats", "birth")}

    def select(self, mask: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Keep the Gaussians of a mask (N,)."""
        lines = mask.nonzero().squeeze(-1)
        self.replace({n: getattr(self, n)[lines] for n in (*NAMES, "quats", "birth")}, optimizer, lines)

    def append(self, more: Mapping[str, Tensor]) -> None:
        """Add Gaussians, between rounds of optimisation."""
        if len(self) == 0 and more["scales"].shape[1] != self.scales.shape[1]:
            self.scales = nn.Parameter(torch.zeros(0, more["scales"].shape[1]))
        self.replace({n: torch.cat([getattr(self, n), more[n]]) for n in (*NAMES, "quats", "birth")})

    def prune_mask(self, scene_radius: float) -> Tensor:
        """Which Gaussians (N,) stay: not transparent (opacity 0.005), not larger than a tenth of the scene."""
        with torch.no_grad():
            return (self.opacities.sigmoid() >= 0.005) & (self.scales.exp().amax(1) <= 0.1 * scene_radius)

    # ------------------------------------------------------------------------------------------------------ elsewhere

    @torch.no_grad()
    def as_splats(self, colors: Tensor | None = None) -> GaussianModel:
        """A scene for the files and pages of splats; `colors` (N, 3) in place of the map's, for example of labels."""
        return GaussianModel.from_tensors(
            {
                "means": self.means, "scales": self.scales.expand(-1, 3), "quats": self.quats, "opacities": self.opacities,
                "sh0": ((self.rgb if colors is None else colors) - 0.5)[:, None] / C0, "shN": self.means.new_zeros(len(self), 0, 3),
            }
        )  # fmt: skip


def new_gaussians(
    rgb: Tensor, depth: Tensor, K: Tensor, view: Tensor, mask: Tensor, code_dim: int, *, index: int = 0,
    generator: torch.Generator | None = None, offset: float = 0.5,
) -> dict[str, Tensor]:  # fmt: skip
    """One Gaussian per pixel of a mask: half opaque, about a pixel large, its code uniform in 0..1.

    Args:
        rgb, depth, mask: (H, W, 3) in 0..1, (H, W), (H, W).
        view: world to camera.
        index: of the frame.
        generator: of the codes.
        offset: see `points_of_depth`.
    """
    if bool((mask & (depth <= 0)).any()):
        raise InputError("A Gaussian cannot be placed at a pixel without depth.")
    points = to_world(points_of_depth(depth, K, offset=offset)[mask], view)
    n = len(points)
    size = depth[mask] / ((K[0, 0] + K[1, 1]) / 2)
    return {
        "means": points, "rgb": rgb[mask], "opacities": torch.zeros(n), "scales": size.log().unsqueeze(-1),
        "codes": torch.rand(n, code_dim, generator=generator), "quats": torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(n, 1),
        "birth": torch.full((n,), index, dtype=torch.int64),
    }  # fmt: skip


def thinned(mask: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most `most` pixels of a mask, chosen evenly at random."""
    total = int(mask.sum())
    if total <= most:
        return mask
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.randperm(total, generator=generator)[: max(most, 0)]] = True
    out = torch.zeros_like(mask)
    out[mask] = chosen
    return out


def scene_radius(depth: Tensor) -> float:
    """A third of the first frame's largest depth, as the authors measure a scene."""
    return max(float(depth.max()) / 3, 1e-6)


def adam(groups: list[dict[str, Any]], eps: float = 1e-8) -> torch.optim.Adam:
    """The optimiser of maps and poses."""
    return torch.optim.Adam(groups, eps=eps, fused=True)


def _hand_over(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, kept: Tensor | None) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state:
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == old.shape and kept is not None:
                moved = value[kept.clamp_min(0)]
                moved[kept < 0] = 0
                state[key] = moved
        optimizer.state[new] = state


def logit(p: float) -> float:
    """The number whose sigmoid is p."""
    return math.log(p / (1 - p))
