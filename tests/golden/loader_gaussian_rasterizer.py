"""Gaussian rasteriser cases: pictures, gradients, projection, tile lists and harmonics of gsplat 1.5, by both backends."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmkit.ops import rasterization
from mmkit.ops.gaussian import fully_fused_projection, spherical_harmonics
from mmkit.ops.gaussian.settings import NUMERICS, Settings
from mmkit.ops.gaussian.tile_lists import tile_lists

LEAVES = ("means", "quats", "scales", "opacities", "colors", "viewmat", "backgrounds")
PICTURES = {  # names of expected pictures, and the mode that gives them
    "render_rgb": "RGB", "render_d": "D", "expected_depth": "ED", "render_rgb_plus_d": "RGB+D", "render_rgb_plus_ed": "RGB+ED"
}  # fmt: skip


def run(case: Path, meta: dict[str, Any]) -> None:
    given, expected = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    for mode in ("classic", "antialiased"):
        for backend in ("cpu", "reference"):
            if f"{mode}.alpha" in expected:
                _pictures(given, expected, meta, mode, backend)
    _projection(given, expected, meta)
    for key, value in expected.items():
        if key.startswith("gsplat.sh_degree_"):
            got = spherical_harmonics(int(key[-1]), given["sh.dirs"], given["sh.coeffs"])
            assert (got - value).abs().max() <= meta["tolerance"]["sh_abs"], key


def _pictures(
    given: dict[str, Tensor], expected: dict[str, Tensor], meta: dict[str, Any], mode: str, backend: str
) -> None:
    config, tolerance = meta["config"], meta["tolerance"]
    dtype = torch.float64 if backend == "reference" else torch.float32
    leaves = {k: given[k].to(dtype).requires_grad_() for k in LEAVES if k in given}
    own = {k: v[None] if k == "backgrounds" and v.dim() == 1 else v for k, v in leaves.items()}
    own |= {"viewmats": own.pop("viewmat")[None], "Ks": given["K"].to(dtype)[None]}
    common: dict[str, Any] = {
        "width": config["width"], "height": config["height"], "near_plane": config["near"], "eps2d": config["eps2d"],
        "rasterize_mode": mode, "backend": backend, "numerics": _numerics(config), "camera_model": config.get("camera_model", "pinhole"),
    }  # fmt: skip
    pictures = {name: m for name, m in PICTURES.items() if f"{mode}.{name}" in expected}
    assert pictures
    for name, render_mode in pictures.items():
        image, alpha, _ = rasterization(**own, render_mode=render_mode, **common)
        for key, got in ((name, image[0]), ("alpha", alpha[0])):
            error = (got - expected[f"{mode}.{key}"]).abs().max()
            assert error <= tolerance["render_abs"], (mode, backend, name, key)
    image, alpha, _ = rasterization(**own, render_mode=config["render_mode"], **common)
    loss = (image[0] * given["grad_out.render"]).sum() + (alpha[0] * given["grad_out.alpha"]).sum()
    named = {k: v for k, v in leaves.items() if f"{mode}.grad.{k}" in expected}
    for name, got in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
        want = expected[f"{mode}.grad.{name}"]
        assert (got - want).norm() <= tolerance["grad_rel_norm"] * want.norm(), (mode, backend, name)


def _numerics(config: dict[str, Any]) -> str:
    return "gsplat-1.6" if config["alpha_max"] == 0.99 else "gsplat-1.5"


def _projection(given: dict[str, Tensor], expected: dict[str, Tensor], meta: dict[str, Any]) -> None:
    config, relative = meta["config"], meta["tolerance"]["projection_rel"]
    size = (config["width"], config["height"])
    radii, means2d, depths, conics, compensations = fully_fused_projection(
        given["means"], None, given["quats"], given["scales"], given["viewmat"][None], given["K"][None], *size,
        near_plane=config["near"], eps2d=config["eps2d"], calc_compensations=True, backend="cpu", numerics=_numerics(config),
    )  # fmt: skip
    assert torch.equal(radii[0], expected["gsplat.radii_3.33"])
    seen = (radii[0] > 0).all(-1)
    assert compensations is not None
    for name, got in (("means2d", means2d), ("depths", depths), ("conics", conics), ("compensations", compensations)):
        want = expected[f"gsplat.{name}"][seen]
        assert (got[0][seen] - want).norm() <= relative * want.norm(), name
    s = Settings(
        *size, config["near"], math.inf, 0.0, config["eps2d"], False, False, False, False, True, NUMERICS["gsplat-1.5"]
    )
    opaque = torch.ones_like(depths[0])
    lists = tile_lists(
        means2d[0], radii[0], depths[0], conics[0], opaque, torch.zeros(len(opaque), dtype=torch.long), 1, s
    )
    assert torch.equal(lists["tiles_per_gauss"], expected["gsplat.tiles_per_gauss"])
    assert torch.equal(lists["flatten_ids"], expected["gsplat.flatten_ids"])
    assert torch.equal(lists["isect_offsets"][0], expected["gsplat.isect_offsets"])
