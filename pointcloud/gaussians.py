"""A scene of Gaussians as a module: named tensors, rendering, and surgery that keeps an optimiser in step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.backbones.model import Model
from mmkit.errors import InputError
from mmkit.ops import rasterization
from mmkit.ops.gaussian.harmonics import C0, basis
from mmkit.pointcloud.cameras import Camera

NAMES = ("means", "scales", "quats", "opacities", "sh0", "shN")


class GaussianModel(Model):
    """N Gaussians with colours as spherical harmonics.

    The parameters have gsplat's names and meanings: `means` (N, 3) in the world; `scales` (N, 3), logarithms of standard
    deviations; `quats` (N, 4) wxyz, of any length; `opacities` (N,), logits; `sh0` (N, 1, 3) and `shN` (N, K - 1, 3), harmonics.
    `dict(model.named_parameters())` is what gsplat's strategies take.

    Args:
        num_gaussians: N.
        sh_degree: 0 to 3, K = (sh_degree + 1)^2.
        rasterize_mode: "classic" or "antialiased"; a scene looks right in the mode it was made in.
    """

    def __init__(self, num_gaussians: int = 0, sh_degree: int = 0, rasterize_mode: str = "classic"):
        super().__init__()
        if not 0 <= sh_degree <= 3:
            raise InputError(f"sh_degree must be 0 to 3, not {sh_degree}.")
        self.sh_degree, self.rasterize_mode = sh_degree, rasterize_mode
        n, k = num_gaussians, (sh_degree + 1) ** 2
        self.means, self.scales = nn.Parameter(torch.zeros(n, 3)), nn.Parameter(torch.zeros(n, 3))
        self.quats = nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(n, 1))
        self.opacities = nn.Parameter(torch.zeros(n))
        self.sh0, self.shN = nn.Parameter(torch.zeros(n, 1, 3)), nn.Parameter(torch.zeros(n, k - 1, 3))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, rasterize_mode: str = "classic") -> GaussianModel:
        """A model of these tensors, under the names above.

        Raises:
            InputError: missing tensors, or shapes that do not fit together.
        """
        missing = [name for name in NAMES if name not in tensors]
        if missing:
            raise InputError(f"A scene of Gaussians needs {', '.join(NAMES)}; {', '.join(missing)} missing.")
        n, rest = tensors["means"].shape[0], tensors["shN"].shape[1]
        degree = math.isqrt(rest + 1) - 1
        model = cls(n, degree if (degree + 1) ** 2 == rest + 1 else -1, rasterize_mode)
        for name in NAMES:
            own = getattr(model, name)
            if tensors[name].shape != own.shape:
                raise InputError(f"{name} must be {tuple(own.shape)}; got {tuple(tensors[name].shape)}.")
            own.data = tensors[name].detach().to(own.dtype).clone()
        return model

    @classmethod
    def from_points(
        cls, points: Tensor, colors: Tensor | None = None, *, sh_degree: int = 0, opacity: float = 0.1, rasterize_mode: str = "classic"
    ) -> GaussianModel:  # fmt: skip
        """Round Gaussians at `points` (N, 3), as large as the mean distance to the three nearest; `colors` (N, 3) in 0..1."""
        from scipy.spatial import cKDTree

        n = len(points)
        model = cls(n, sh_degree, rasterize_mode)
        distance = cKDTree(points.numpy()).query(points.numpy(), k=min(4, n))[0].reshape(n, -1)[:, 1:]
        size = torch.from_numpy(distance).float().mean(1) if n > 1 else torch.full((n,), 0.1)
        model.means.data = points.float().clone()
        model.scales.data = size.clamp_min(1e-6).log()[:, None].repeat(1, 3)
        model.opacities.data.fill_(math.log(opacity / (1 - opacity)))
        if colors is not None:
            model.sh0.data = (colors.float()[:, None] - 0.5) / C0
        return model

    def __len__(self) -> int:
        return self.means.shape[0]

    def __repr__(self) -> str:
        return (
            f"GaussianModel({len(self)} Gaussians, sh_degree={self.sh_degree}, rasterize_mode={self.rasterize_mode!r})"
        )

    @property
    def colors(self) -> Tensor:
        """The harmonics (N, K, 3)."""
        return torch.cat([self.sh0, self.shN], 1)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the parameters on the CPU, by name."""
        return {name: getattr(self, name).detach().cpu().clone() for name in NAMES}

    def render(
        self, cameras: Camera, *, render_mode: str = "RGB", sh_degree: int | None = None, backgrounds: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:  # fmt: skip
        """Pictures (C, H, W, X), alphas (C, H, W, 1) and meta, as `mmkit.ops.rasterization`.

        Args:
            cameras: views (C, 4, 4), intrinsics (C, 3, 3) and the size.
            sh_degree: harmonics beyond this degree are left out.
            options: of `rasterization`.
        """
        degree = self.sh_degree if sh_degree is None else min(sh_degree, self.sh_degree)
        device = self.means.device
        return rasterization(
            self.means, self.quats, self.scales.exp(), self.opacities.sigmoid(), self.colors, cameras.viewmats.to(device),
            cameras.Ks.to(device), cameras.width, cameras.height, sh_degree=degree, render_mode=render_mode, backgrounds=backgrounds,
            rasterize_mode=self.rasterize_mode, **options,
        )  # fmt: skip

    def bounds(self) -> tuple[Tensor, float]:
        """The centre of the Gaussians and a radius that holds 9 of 10, both by medians, so that strays do not matter."""
        means = self.means.detach()
        centre = means.median(0).values if len(self) else means.new_zeros(3)
        away = (means - centre).norm(dim=1)
        return centre, float(away.quantile(0.9)) if 0 < len(self) <= 10**7 else 1.0

    @torch.no_grad()
    def transform(self, rotation: Tensor, shift: Tensor | None = None, scale: float = 1.0) -> GaussianModel:
        """A copy turned by `rotation` (3, 3), scaled and shifted; harmonics are turned with it."""
        out = GaussianModel.from_tensors(self.tensors(), rasterize_mode=self.rasterize_mode)
        turn = rotation.to(out.means)
        out.means.copy_(scale * out.means @ turn.T + (0 if shift is None else shift.to(out.means)))
        out.scales.add_(math.log(scale))
        out.quats.copy_(quaternion_product(quaternion(turn), out.quats))
        start = 0
        for degree in range(1, self.sh_degree + 1):
            width = 2 * degree + 1
            band = out.shN[:, start : start + width]
            band.copy_(torch.einsum("ij,njc->nic", band_rotation(degree, rotation).to(band), band))
            start += width
        return out

    # ------------------------------------------------------------------------------------------------------ surgery

    @torch.no_grad()
    def replace(
        self, change: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None, kept: Tensor | None = None
    ) -> None:
        """Give the parameters new values, of another length if need be.

        Args:
            change: a tensor for every name.
            optimizer: its moments follow: those of line i become those of line `kept[i]`, zero where `kept[i]` is -1.
            kept: (N',) lines of the old tensors; all in order when left out.
        """
        for name in NAMES:
            old = getattr(self, name)
            new = nn.Parameter(change[name].detach().clone(), requires_grad=old.requires_grad)
            setattr(self, name, new)
            if optimizer is not None:
                _hand_over(optimizer, old, new, kept)
        self.config["num_gaussians"] = len(self)

    def select(self, kept: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Keep the Gaussians of a mask (N,) or of indices."""
        lines = kept.nonzero().squeeze(-1) if kept.dtype == torch.bool else kept
        self.replace({name: getattr(self, name)[lines] for name in NAMES}, optimizer, lines)

    def append(self, more: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Add Gaussians; their moments start at zero."""
        n = len(self)
        lines = torch.cat([torch.arange(n), torch.full((len(more["means"]),), -1)]).to(self.means.device)
        self.replace({name: torch.cat([getattr(self, name), more[name]]) for name in NAMES}, optimizer, lines)


def _hand_over(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, kept: Tensor | None) -> None:
    """Put `new` in the place of `old` in its group, with the moments of the lines that stay."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state:
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() == old.dim() and value.shape == old.shape and kept is not None:
                moved = value[kept.clamp_min(0)]
                moved[kept < 0] = 0
                state[key] = moved
        optimizer.state[new] = state


def quaternion(rotation: Tensor) -> Tensor:
    """The unit quaternion wxyz of a rotation matrix (3, 3): the largest eigenvector of a symmetric 4 x 4 form."""
    r = rotation.double()
    form = torch.stack(
        [
            torch.stack([r[0, 0] + r[1, 1] + r[2, 2], r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]]),
            torch.stack([r[2, 1] - r[1, 2], r[0, 0] - r[1, 1] - r[2, 2], r[0, 1] + r[1, 0], r[0, 2] + r[2, 0]]),
            torch.stack([r[0, 2] - r[2, 0], r[0, 1] + r[1, 0], r[1, 1] - r[0, 0] - r[2, 2], r[1, 2] + r[2, 1]]),
            torch.stack([r[1, 0] - r[0, 1], r[0, 2] + r[2, 0], r[1, 2] + r[2, 1], r[2, 2] - r[0, 0] - r[1, 1]]),
        ]
    )
    q = torch.linalg.eigh(form).eigenvectors[:, -1]
    return (q * (1 if q[q.abs().argmax()] > 0 else -1)).to(rotation)


def quaternion_product(a: Tensor, b: Tensor) -> Tensor:
    """The rotation `b` (..., 4) followed by `a` (4,)."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    parts = [
        aw * bw - ax * bx - ay * by - az * bz, aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx, aw * bz + ax * by - ay * bx + az * bw,
    ]  # fmt: skip
    return torch.stack(parts, -1)


def band_rotation(degree: int, rotation: Tensor) -> Tensor:
    """How the coefficients of one degree change when a scene is turned: solved from the functions' values at some directions."""
    directions = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(directions, dim=1)
    first = degree * degree
    before = basis(degree, directions @ rotation.double())[:, first:]
    after = basis(degree, directions)[:, first:]
    solved = torch.linalg.lstsq(after, before).solution
    return torch.where(solved.abs() < 1e-12, 0.0, torch.where((solved.abs() - 1).abs() < 1e-12, solved.sign(), solved))
