"""The public functions: arguments checked, a backend chosen, results put together as gsplat returns them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmkit.errors import InputError, nearest
from mmkit.ops.backends import choose_backend
from mmkit.ops.compiling import cpu_kernels
from mmkit.ops.gaussian import cuda, reference
from mmkit.ops.gaussian.checks import check, refuse
from mmkit.ops.gaussian.harmonics import seen_colors
from mmkit.ops.gaussian.settings import NUMERICS, TILE, Numerics, Settings
from mmkit.ops.gaussian.tile_lists import LazyMeta, tile_lists

_NAME = "rasterization"
_LATE = ("tiles_per_gauss", "isect_ids", "flatten_ids", "isect_offsets")


def rasterization(
    means: Tensor,
    quats: Tensor | None,
    scales: Tensor | None,
    opacities: Tensor,
    colors: Tensor | None,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    packed: bool = True,
    tile_size: int | None = TILE,
    backgrounds: Tensor | None = None,
    render_mode: str = "RGB",
    absgrad: bool = False,
    rasterize_mode: str = "classic",
    channel_chunk: int = 32,
    camera_model: str = "pinhole",
    segmented: bool = False,
    covars: Tensor | None = None,
    backend: str = "auto",
    numerics: str = "auto",
    **others: Any,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Render Gaussians into pictures; arguments and results are those of `gsplat.rasterization`.

    Args:
        means: centres (..., N, 3) in the world. Gaussians whose values are not finite are not seen, nor are those whose picture
            float32 does not hold (radii from 2e9 pixels on, conics from 1e30 on); they get no gradient.
        quats: rotations (..., N, 4), wxyz, of any length from 1e-18 to 1e18; not read when `covars` is given.
        scales: standard deviations (..., N, 3), lengths in the world; not read when `covars` is given.
        opacities: (..., N) in 0..1.
        colors: (..., N, D) or one set per camera (..., C, N, D), any D; with `sh_degree`, coefficients (..., [C,] N, K, 3).
            `None` for the depth modes. They are taken as they are, finite or not.
        viewmats: world to camera (..., C, 4, 4), x right, y down, z forward.
        Ks: intrinsics (..., C, 3, 3) in pixels; the centre of the first pixel is (0.5, 0.5). They get no gradient.
        width, height: of the pictures, at most 32768 each.
        near_plane, far_plane: Gaussians with centres outside are not seen.
        radius_clip: nor are those with both radii at most this many pixels.
        eps2d: added to the variances in the picture.
        sh_degree: 0 to 3, or `None` when `colors` are colours.
        packed: lay out what `meta` holds by visible Gaussian; else (..., C, N, ...) with radii 0 where nothing is seen.
        backgrounds: (..., C, D), the depth's is 0.
        render_mode: "RGB", "D" (sum of weights times z), "ED" (that over alpha), "RGB+D", "RGB+ED" (depth is the last channel).
        absgrad: sum absolute gradients of the projected means into `meta["means2d"].absgrad`.
        rasterize_mode: "classic", or "antialiased" (opacities compensate `eps2d`, arXiv 2311.16493). Render a scene in the mode it
            was made in.
        camera_model: "pinhole" or "ortho".
        covars: covariances (..., N, 3, 3); their upper triangle is read.
        backend: "auto", "gsplat", "cpu" or "reference". Auto takes gsplat for CUDA tensors where it builds, Numba for CPU
            tensors below float64, else the reference.
        numerics: "gsplat-1.5" or "gsplat-1.6", which differ in the largest alpha, the least compensation and the tiles listed;
            "auto" follows the installed gsplat, 1.5 without one.
        tile_size, channel_chunk, segmented: accepted; how gsplat works, not what comes out. `tile_size` must be 16 or `None`.
        others: further arguments of gsplat, at their defaults.

    Returns:
        Colours (..., C, H, W, X), alphas (..., C, H, W, 1), and `meta` with gsplat's keys; those of the tile lists are computed
        when they are read.

    Raises:
        InputError: shapes that do not fit together, cameras that are not finite or have no inverse, unknown modes, too many
            (Gaussian, tile) pairs.
        NotImplementedError: an argument that asks for what only gsplat's other renderers do.
        BackendUnavailableError: the requested backend cannot run here.

    Example:
        >>> import torch
        >>> from mmkit.ops import rasterization
        >>> means, quats = torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        >>> K = torch.tensor([[[50.0, 0.0, 16.0], [0.0, 50.0, 16.0], [0.0, 0.0, 1.0]]])
        >>> image, alpha, meta = rasterization(
        ...     means, quats, torch.full((1, 3), 0.1), torch.ones(1), torch.ones(1, 3), torch.eye(4)[None], K, 32, 32)
        >>> image.shape
        torch.Size([1, 32, 32, 3])
    """
    refuse(others, camera_model, render_mode, tile_size)
    lead = check(means, quats, scales, opacities, colors, viewmats, Ks, width, height, sh_degree, covars, render_mode)
    if rasterize_mode not in ("classic", "antialiased"):
        raise InputError(f"{_NAME}: rasterize_mode must be 'classic' or 'antialiased', not {rasterize_mode!r}.")
    constants = _numerics(numerics)
    chosen = _choose(backend, means)
    if chosen == "gsplat":
        if cuda.version() and NUMERICS[_installed_numerics()] != constants:
            raise InputError(
                f"{_NAME}: the installed gsplat {cuda.version()} does not compute with numerics={numerics!r}."
            )
        return cuda.rasterization(
            means=means, quats=quats, scales=scales, opacities=opacities, colors=colors, viewmats=viewmats, Ks=Ks, width=width,
            height=height, near_plane=near_plane, far_plane=far_plane, radius_clip=radius_clip, eps2d=eps2d, sh_degree=sh_degree,
            packed=packed, tile_size=TILE, backgrounds=backgrounds, render_mode=render_mode, absgrad=absgrad,
            rasterize_mode=rasterize_mode, channel_chunk=channel_chunk, camera_model=camera_model, segmented=segmented, covars=covars,
        )  # fmt: skip
    s = Settings(
        int(width), int(height), float(near_plane), float(far_plane), float(radius_clip), float(eps2d),
        rasterize_mode == "antialiased", camera_model == "ortho", packed, absgrad, "D" in render_mode, constants,
    )  # fmt: skip
    scene = _Scene(lead, chosen, means, quats, scales, covars, opacities, viewmats, Ks)
    rows = _rows(scene, s)
    features, feature_ids = _features(scene, rows, colors, sh_degree, render_mode)
    ground = (
        None if backgrounds is None or "RGB" not in render_mode else _background(scene, backgrounds, features.shape[1])
    )
    image, alpha = _composite(scene, rows, features, feature_ids, ground, s)
    if "ED" in render_mode:
        image = torch.cat([image[..., :-1], image[..., -1:] / alpha.unsqueeze(-1).clamp_min(1e-10)], -1)
    shape = (*lead, scene.viewmats.shape[1], s.height, s.width)
    dtype = means.dtype
    meta = _meta(scene, rows, s, lead)
    return image.view(*shape, image.shape[-1]).to(dtype), alpha.view(*shape, 1).to(dtype), meta


def fully_fused_projection(
    means: Tensor, covars: Tensor | None, quats: Tensor | None, scales: Tensor | None, viewmats: Tensor, Ks: Tensor, width: int,
    height: int, *, eps2d: float = 0.3, near_plane: float = 0.01, far_plane: float = 1e10, radius_clip: float = 0.0,
    calc_compensations: bool = False, camera_model: str = "pinhole", opacities: Tensor | None = None, backend: str = "auto",
    numerics: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The first half of `rasterization`, as gsplat's function of that name with `packed=False`.

    Without `opacities` a Gaussian reaches 3.33 standard deviations far, with them as far as its alpha is 1/255.

    Returns:
        radii (..., C, N, 2), 0 where nothing is seen; means2d; depths; conics; compensations (..., C, N), or `None`.
    """
    refuse({}, camera_model, "D", TILE)
    given = torch.ones_like(means[..., 0]) if opacities is None else opacities
    lead = check(means, quats, scales, given, None, viewmats, Ks, width, height, None, covars, "D")
    s = Settings(
        width, height, near_plane, far_plane, radius_clip, eps2d, calc_compensations, camera_model == "ortho", False, False, True,
        _numerics(numerics), bounded=opacities is not None,
    )  # fmt: skip
    chosen = _choose("reference" if means.is_cuda and backend == "auto" else backend, means)
    if chosen == "gsplat":
        raise InputError("fully_fused_projection: call gsplat's own for CUDA tensors, or use backend='reference'.")
    scene = _Scene(lead, chosen, means, quats, scales, covars, given, viewmats, Ks)
    rows = _rows(scene, s)
    seen = (*lead, viewmats.shape[-3], means.shape[-2])
    radii, means2d, depths, conics = (
        x.view(*seen, *x.shape[1:]) for x in (rows.radii, rows.means2d, rows.depths, rows.conics)
    )
    compensations = rows.opacities.view(seen) / given.unsqueeze(-2) if calc_compensations else None
    return radii, means2d, depths, conics, compensations


def top_contributors(
    means: Tensor, quats: Tensor | None, scales: Tensor | None, opacities: Tensor, viewmats: Tensor, Ks: Tensor, width: int,
    height: int, *, k: int = 1, covars: Tensor | None = None, rasterize_mode: str = "classic", camera_model: str = "pinhole",
    near_plane: float = 0.01, far_plane: float = 1e10, eps2d: float = 0.3, backend: str = "auto", numerics: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Which Gaussians a pixel shows: for picking, and for carrying labels from pictures to Gaussians and back.

    Args:
        k: how many per pixel; the others are those of `rasterization`. CUDA tensors take the reference.

    Returns:
        Indices (..., C, H, W, k) of the Gaussians with the largest weights, strongest first, -1 where there are fewer, and the
        weights, of the same shape. No gradients.
    """
    lead = check(means, quats, scales, opacities, None, viewmats, Ks, width, height, None, covars, "D")
    refuse({}, camera_model, "D", TILE)
    if k < 1:
        raise InputError(f"top_contributors: k must be at least 1, not {k}.")
    s = Settings(
        width, height, near_plane, far_plane, 0.0, eps2d, rasterize_mode == "antialiased", camera_model == "ortho", True, False,
        False, _numerics(numerics),
    )  # fmt: skip
    chosen = _choose("reference" if means.is_cuda and backend == "auto" else backend, means)
    with torch.no_grad():
        scene = _Scene(lead, chosen, means, quats, scales, covars, opacities, viewmats, Ks)
        rows = _rows(scene, s)
        if chosen == "cpu":
            parts = [rows.radii, rows.means2d, rows.conics, rows.opacities, rows.depths]
            ids, weights = _implementation().strongest(parts, rows.starts, k, s)
        else:
            pairs = [_strongest_reference(rows, a, b, k, s) for a, b in rows.images()]
            ids, weights = (torch.stack(x) for x in zip(*pairs, strict=True))
        known = torch.cat([rows.ids, rows.ids.new_tensor([-1])])
    shape = (*lead, viewmats.shape[-3], height, width, k)
    return known[ids].view(shape), weights.view(shape).to(means.dtype)


def warmup() -> None:
    """Compile the CPU kernels now (about 25 s of CPU time once per machine, then read from Numba's cache)."""
    x = torch.zeros(1, 3, requires_grad=True)
    K = torch.tensor([[[8.0, 0.0, 4.0], [0.0, 8.0, 4.0], [0.0, 0.0, 1.0]]])
    view = torch.eye(4)[None]
    image, _, _ = rasterization(
        x + torch.tensor([0.0, 0.0, 2.0]),
        torch.ones(1, 4),
        torch.ones(1, 3),
        torch.ones(1),
        torch.ones(1, 3),
        view,
        K,
        8,
        8,
        backend="cpu",
    )
    image.sum().backward()


# ------------------------------------------------------------------------------------------------------------ the parts


class _Scene:
    """Inputs with one batch dimension, in the dtype of the arithmetic."""

    def __init__(
        self, lead: tuple[int, ...], backend: str, means: Tensor, quats: Tensor | None, scales: Tensor | None,
        covars: Tensor | None, opacities: Tensor, viewmats: Tensor, ks: Tensor,
    ):  # fmt: skip
        work = torch.float32 if backend == "cpu" or means.dtype in (torch.float16, torch.bfloat16) else means.dtype
        self.lead, self.backend, self.work, self.skip = lead, backend, work, len(lead)
        self.means, self.opacities, self.viewmats, self.ks = (self.flat(x) for x in (means, opacities, viewmats, ks))
        axes = (quats, scales) if covars is None else (None, None)
        self.quats, self.scales, self.covars = (None if x is None else self.flat(x) for x in (*axes, covars))
        self.batch, self.n, self.cameras = math.prod(lead), means.shape[-2], viewmats.shape[-3]

    def covariances(self, which: Any = slice(None)) -> Tensor:
        """Of all Gaussians or of some, (..., 3, 3)."""
        if self.covars is not None:
            return self.covars[which]
        assert self.quats is not None
        assert self.scales is not None
        return reference.covariance(self.quats[which], self.scales[which])

    def flat(self, x: Tensor) -> Tensor:
        """(..., X) as (B, X) in the arithmetic's dtype."""
        return x.to(self.work).reshape(math.prod(self.lead), *x.shape[self.skip :])


@dataclasses.dataclass
class _Rows:
    """The projected Gaussians of all images, one after the other."""

    radii: Tensor
    means2d: Tensor
    depths: Tensor
    conics: Tensor
    opacities: Tensor
    ids: Tensor  # of the Gaussian within its scene
    starts: Tensor
    shown: list[
        Tensor
    ]  # means2d as `meta` shows it, from which what is composited derives: so it can retain its gradient

    def images(self) -> list[tuple[int, int]]:
        """First row and end of each image."""
        return list(zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True))

    def part(self, a: int, b: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Radii, means2d, depths, conics and opacities of some rows."""
        return self.radii[a:b], self.means2d[a:b], self.depths[a:b], self.conics[a:b], self.opacities[a:b]

    def image_ids(self) -> Tensor:
        """The image of each row."""
        return torch.repeat_interleave(torch.arange(len(self.starts) - 1), self.starts.diff()).to(self.ids.device)


def _rows(scene: _Scene, s: Settings) -> _Rows:
    if scene.backend == "cpu":
        tensors = (scene.means, scene.quats, scene.scales, scene.covars, scene.opacities, scene.viewmats, scene.ks)
        radii, means2d, depths, conics, opacities, ids, starts = _implementation().project(*tensors, s)
        return _shown(_Rows(radii, means2d, depths, conics, opacities, ids, starts, []), scene, s)
    views, ks = scene.viewmats, scene.ks
    with torch.no_grad():
        each = (scene.means[:, None], scene.covariances()[:, None], scene.opacities[:, None])
        radii = reference.project(*each, views[:, :, None], ks[:, :, None], s)[0]
        seen = (radii > 0).any(-1)
    # only what is seen is computed with gradients, so that infinities of the rest reach none
    b, c, i = seen.nonzero(as_tuple=True)
    given = (scene.means[b, i], scene.covariances((b, i)), scene.opacities[b, i], views[b, c], ks[b, c])
    flat, ids = [radii[seen], *reference.project(*given, s)[1:]], i
    if s.packed:
        starts = torch.cat([seen.new_zeros(1, dtype=torch.long), seen.sum(2).flatten().cumsum(0)]).cpu()
    else:
        places = seen.flatten().nonzero().squeeze(-1)
        flat = [x.new_zeros(seen.numel(), *x.shape[1:]).index_put((places,), x) for x in flat]
        starts = torch.arange(scene.batch * scene.cameras + 1) * scene.n
        ids = torch.arange(scene.n, device=seen.device).repeat(scene.batch * scene.cameras)
    radii, means2d, depths, conics, opacities = flat
    return _shown(_Rows(radii, means2d, depths, conics, opacities, ids, starts, []), scene, s)


def _shown(rows: _Rows, scene: _Scene, s: Settings) -> _Rows:
    if not s.packed:
        rows.means2d = rows.means2d.view(*scene.lead, scene.cameras, scene.n, 2)
    rows.shown.append(rows.means2d)
    rows.means2d = rows.means2d.reshape(-1, 2) if not s.packed else rows.means2d
    return rows


def _features(
    scene: _Scene, rows: _Rows, colors: Tensor | None, sh_degree: int | None, mode: str
) -> tuple[Tensor, Tensor]:
    """What is composited besides the depth, (F, D), and which of its lines belongs to each row."""
    if "RGB" not in mode or colors is None:
        return scene.means.new_zeros(scene.batch * scene.n, 0), torch.zeros_like(rows.ids)
    values = scene.flat(colors)
    if sh_degree is not None:
        values = seen_colors(sh_degree, scene.means, scene.viewmats, values)
    per_camera = values.dim() == 4
    images = rows.image_ids()
    ids = (images if per_camera else images // scene.cameras) * scene.n + rows.ids
    return values.reshape(-1, values.shape[-1]), ids


def _background(scene: _Scene, backgrounds: Tensor, channels: int) -> Tensor:
    expected = (*scene.lead, scene.cameras, channels)
    if tuple(backgrounds.shape) != expected:
        raise InputError(f"{_NAME}: backgrounds must be {expected}; got {tuple(backgrounds.shape)}.")
    return scene.flat(backgrounds).reshape(-1, channels)


def _composite(
    scene: _Scene, rows: _Rows, features: Tensor, feature_ids: Tensor, ground: Tensor | None, s: Settings
) -> tuple[Tensor, Tensor]:
    """Colours (I, H, W, X) and alphas (I, H, W)."""
    if scene.backend == "cpu":
        rest = (rows.radii, feature_ids, rows.starts, rows.shown)
        given = (rows.means2d, rows.conics, rows.opacities, rows.depths, features, ground, *rest)
        return _implementation().Composite.apply(*given, s)
    images, alphas = [], []
    values = features[feature_ids]
    if s.depth:
        values = torch.cat([values, rows.depths.unsqueeze(-1)], -1)
    for i, (a, b) in enumerate(rows.images()):
        image, light, _, _ = reference.composite(*rows.part(a, b), values[a:b], s)
        if ground is not None:
            image = image + light.unsqueeze(-1) * torch.nn.functional.pad(
                ground[i], (0, image.shape[-1] - ground.shape[-1])
            )
        images.append(image)
        alphas.append(1 - light)
    return torch.stack(images), torch.stack(alphas)


def _strongest_reference(rows: _Rows, a: int, b: int, k: int, s: Settings) -> tuple[Tensor, Tensor]:
    _, _, order, weights = reference.composite(*rows.part(a, b), rows.conics[a:b, :0], s)
    weights = torch.cat([weights, weights.new_zeros(k, weights.shape[1])])
    order = torch.cat([order + a, order.new_full((k,), -1)])
    top, places = weights.sort(dim=0, descending=True, stable=True)
    ids = torch.where(top[:k] > 0, order[places[:k]], -1)
    return ids.T.view(s.height, s.width, k), top[:k].T.view(s.height, s.width, k)


def _meta(scene: _Scene, rows: _Rows, s: Settings, lead: tuple[int, ...]) -> dict[str, Any]:
    images = rows.image_ids()
    across, down = s.tiles

    def shaped(x: Tensor) -> Tensor:
        return x if s.packed else x.view(*lead, scene.cameras, scene.n, *x.shape[1:])

    values = {
        "batch_ids": images // scene.cameras if s.packed else None,
        "camera_ids": images % scene.cameras if s.packed else None,
        "gaussian_ids": rows.ids if s.packed else None,
        "radii": shaped(rows.radii), "means2d": rows.shown[0], "depths": shaped(rows.depths), "conics": shaped(rows.conics),
        "opacities": shaped(rows.opacities), "tile_width": across, "tile_height": down, "width": s.width, "height": s.height,
        "tile_size": TILE, "n_batches": scene.batch, "n_cameras": scene.cameras,
    }  # fmt: skip

    def lists() -> dict[str, Tensor]:
        radii, *values = (
            x.detach().cpu() for x in (rows.radii, rows.means2d, rows.depths, rows.conics, rows.opacities)
        )
        means2d, depths, conics, opacities = (x.float() for x in values)
        made = tile_lists(means2d, radii, depths, conics, opacities, images.cpu(), scene.batch * scene.cameras, s)
        made["isect_offsets"] = made["isect_offsets"].view(*lead, scene.cameras, down, across)
        made["tiles_per_gauss"] = shaped(made["tiles_per_gauss"])
        return made

    return LazyMeta(values, _LATE, lists)


# --------------------------------------------------------------------------------------------------- choices and checks


def _installed_numerics() -> str:
    parts = (cuda.version() or "1.5").split(".")
    return "gsplat-1.6" if (int(parts[0]), int(parts[1])) >= (1, 6) else "gsplat-1.5"


def _numerics(name: str) -> Numerics:
    name = _installed_numerics() if name == "auto" else name
    if name not in NUMERICS:
        raise InputError(f"{_NAME}: unknown numerics {name!r}. {nearest(name, [*NUMERICS, 'auto'])}")
    return NUMERICS[name]


def _choose(backend: str, means: Tensor) -> str:
    double = means.dtype == torch.float64
    if double and backend in ("cpu", "gsplat"):
        raise InputError(f"{_NAME}: backend {backend!r} computes in float32; use backend='reference' for float64.")
    preference = {"cpu": ("reference",)} if double else {"cuda": ("gsplat", "reference"), "cpu": ("cpu", "reference")}
    return choose_backend(_NAME, backend, means.device, preference, _PROBLEMS)


@functools.cache
def _implementation() -> ModuleType:
    """The Numba backend; importing it compiles its kernels."""
    return cpu_kernels("gaussian")


def _cpu_problem(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the Numba kernels run on CPU tensors only, not on {device.type}."
    return None if importlib.util.find_spec("numba") else "numba is missing: pip install numba."


_PROBLEMS = {"gsplat": cuda.problem, "cpu": _cpu_problem, "reference": lambda device: None}
