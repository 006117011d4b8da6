"""What the rasteriser's arguments must be, and what of gsplat's it refuses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkit.errors import InputError, nearest
from mmkit.ops.gaussian.settings import TILE

_NAME = "rasterization"
MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")
_RAY_MODES = ("d", "Ed", "RGB-d", "RGB-Ed")  # of gsplat 1.6: distances along rays, from its evaluation in 3D
MAX_SIDE = 2**15
_REFUSED: dict[str, Any] = {  # arguments of gsplat that mean another renderer, and the values that do not ask for it
    "sparse_grad": (False,), "distributed": (False,), "with_ut": (False,), "with_eval3d": (False,), "return_normals": (False,),
    "radial_coeffs": (None,), "tangential_coeffs": (None,), "thin_prism_coeffs": (None,), "ftheta_coeffs": (None,),
    "rolling_shutter": (None,), "viewmats_rs": (None,),
}  # fmt: skip


def refuse(others: dict[str, Any], camera_model: str, mode: str, tile_size: int | None) -> None:
    """Raise for arguments that ask for another renderer, and for unknown modes."""
    for name, value in others.items():
        if name not in _REFUSED:
            raise TypeError(f"{_NAME}() got an unexpected keyword argument {name!r}. {nearest(name, _REFUSED)}")
        shutter = name == "rolling_shutter" and getattr(value, "name", "") == "GLOBAL"
        if not any(value is allowed for allowed in _REFUSED[name]) and not shutter:
            raise NotImplementedError(f"{_NAME}: {name}={value!r} is not implemented; gsplat on CUDA has it.")
    if camera_model not in ("pinhole", "ortho"):
        raise NotImplementedError(
            f"{_NAME}: camera_model={camera_model!r} is not implemented, only 'pinhole' and 'ortho'."
        )
    if mode in _RAY_MODES:
        raise NotImplementedError(
            f"{_NAME}: render_mode={mode!r} (distance along the ray) is not implemented, only {MODES}."
        )
    if mode not in MODES:
        raise InputError(f"{_NAME}: unknown render_mode {mode!r}. {nearest(mode, MODES)}")
    if tile_size not in (TILE, None):
        raise NotImplementedError(f"{_NAME}: tile_size={tile_size!r} is not implemented, only {TILE}.")


def check(
    means: Tensor, quats: Tensor | None, scales: Tensor | None, opacities: Tensor, colors: Tensor | None, viewmats: Tensor,
    ks: Tensor, width: int, height: int, sh_degree: int | None, covars: Tensor | None, mode: str,
) -> tuple[int, ...]:  # fmt: skip
    """The leading dimensions; `InputError` when something does not fit."""
    if means.dim() < 2 or means.shape[-1] != 3 or not means.is_floating_point():
        raise InputError(f"{_NAME}: means must be floating (..., N, 3); got {means.dtype} {tuple(means.shape)}.")
    lead, n = tuple(means.shape[:-2]), means.shape[-2]
    cameras = viewmats.shape[-3] if viewmats.dim() >= 3 else -1
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("opacities", opacities, (n,)), ("viewmats", viewmats, (cameras, 4, 4)), ("Ks", ks, (cameras, 3, 3)),
    ]  # fmt: skip
    expected += (
        [("quats", quats, (n, 4)), ("scales", scales, (n, 3))] if covars is None else [("covars", covars, (n, 3, 3))]
    )
    for name, value, tail in expected:
        if value is None or tuple(value.shape) != (*lead, *tail):
            found = "nothing" if value is None else tuple(value.shape)
            shape = str((*lead, *tail)).replace("-1", "C")
            raise InputError(f"{_NAME}: {name} must be {shape}, for {n} Gaussians; got {found}.")
        if value.device != means.device or not value.is_floating_point():
            raise InputError(
                f"{_NAME}: {name} must be floating and on {means.device}; got {value.dtype} on {value.device}."
            )
    for name, value in (("viewmats", viewmats), ("Ks", ks)):
        if not value.is_cuda and not value.isfinite().all():
            raise InputError(f"{_NAME}: {name} hold values that are not finite; leave out cameras whose pose was lost.")
    for side, pixels in (("width", width), ("height", height)):
        if not 1 <= pixels <= MAX_SIDE:
            raise InputError(f"{_NAME}: {side} must be 1 to {MAX_SIDE}, not {pixels}.")
    if "RGB" in mode:
        _check_colors(colors, lead, n, cameras, sh_degree)
    return lead


def _check_colors(colors: Tensor | None, lead: tuple[int, ...], n: int, cameras: int, sh_degree: int | None) -> None:
    if colors is None:
        raise InputError(f"{_NAME}: colors may be None only with render_mode 'D' or 'ED'.")
    tail = 1 if sh_degree is None else 2
    shape, middle = tuple(colors.shape), tuple(colors.shape[:-tail])
    if middle not in ((*lead, n), (*lead, cameras, n)) or (tail == 2 and shape[-1] != 3):
        last = "D" if sh_degree is None else "K, 3"
        raise InputError(f"{_NAME}: colors must be (..., {n}, {last}) or (..., {cameras}, {n}, {last}); got {shape}.")
    if sh_degree is not None and not (0 <= sh_degree <= 3 and (sh_degree + 1) ** 2 <= shape[-2]):
        raise InputError(
            f"{_NAME}: sh_degree must be 0 to 3 with (sh_degree + 1)^2 <= K; got {sh_degree} and K = {shape[-2]}."
        )
