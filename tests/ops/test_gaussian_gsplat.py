"""What gsplat is given: its place is taken by functions with the signatures of its releases, since it renders on CUDA only."""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from mmkit.errors import InputError
from mmkit.ops import rasterization
from mmkit.ops.gaussian import api

CALLS: list[dict[str, Any]] = []


def release_1_5(
    means, quats, scales, opacities, colors, viewmats, Ks, width, height, near_plane=0.01, far_plane=1e10, radius_clip=0.0,
    eps2d=0.3, sh_degree=None, packed=True, tile_size=16, backgrounds=None, render_mode="RGB", sparse_grad=False, absgrad=False,
    rasterize_mode="classic", channel_chunk=32, distributed=False, camera_model="pinhole", segmented=False, covars=None,
    with_ut=False, with_eval3d=False, radial_coeffs=None, tangential_coeffs=None, thin_prism_coeffs=None, ftheta_coeffs=None,
    rolling_shutter=None, viewmats_rs=None,
):  # fmt: skip
    """As release 1.5.3: everything may be given by position."""
    CALLS.append(dict(locals()))
    assert colors.shape[:-1] == means.shape[:-1]  # it looks at them in every mode
    return "image", "alpha", {}


def release_1_6(
    means, quats, scales, opacities, colors, viewmats, Ks, width, height, *, covars=None, near_plane=0.01, far_plane=1e10,
    radius_clip=0.0, eps2d=0.3, sh_degree=None, packed=True, tile_size=None, backgrounds=None, render_mode="RGB", absgrad=False,
    rasterize_mode="classic", channel_chunk=32, camera_model="pinhole", segmented=False, sparse_grad=False, distributed=False,
    return_normals=False,
):  # fmt: skip
    """As release 1.6: another order, keywords only."""
    CALLS.append(dict(locals()))
    return "image", "alpha", {}


@pytest.fixture(params=[("1.5.3", release_1_5), ("1.6.0", release_1_6)], ids=["1.5", "1.6"])
def gsplat(request, monkeypatch) -> str:
    """A gsplat of one release that notes what it is given; the release's name."""
    version, function = request.param
    module = ModuleType("gsplat")
    module.rasterization = function
    monkeypatch.setitem(sys.modules, "gsplat", module)
    monkeypatch.setitem(api._PROBLEMS, "gsplat", lambda device: None)
    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "gsplat" else known(name))
    CALLS.clear()
    return version


def given() -> dict[str, Any]:
    return {
        "means": torch.rand(5, 3), "quats": torch.rand(5, 4), "scales": torch.rand(5, 3), "opacities": torch.rand(5),
        "colors": torch.rand(5, 7), "viewmats": torch.eye(4).repeat(2, 1, 1), "Ks": torch.eye(3).repeat(2, 1, 1), "width": 20, "height": 10,
    }  # fmt: skip


def test_every_argument_arrives_under_its_name(gsplat: str) -> None:
    options: dict[str, Any] = {
        "near_plane": 0.2, "far_plane": 50.0, "radius_clip": 1.0, "eps2d": 0.1, "packed": False, "backgrounds": torch.rand(2, 7),
        "render_mode": "RGB+ED", "absgrad": True, "rasterize_mode": "antialiased", "channel_chunk": 16, "camera_model": "ortho",
        "segmented": True, "covars": torch.rand(5, 3, 3),
    }  # fmt: skip
    tensors = given()
    answer = rasterization(**tensors, **options, backend="gsplat", numerics=f"gsplat-{gsplat[:3]}")
    assert answer == ("image", "alpha", {})
    (call,) = CALLS
    assert all(call[name] is value for name, value in {**tensors, **options}.items())
    assert call["tile_size"] == 16


def test_depths_need_no_colours(gsplat: str) -> None:
    rasterization(**{**given(), "colors": None}, render_mode="ED", backend="gsplat")
    assert CALLS[0]["colors"].shape == (5, 1)


def test_numbers_of_another_release_are_refused(gsplat: str) -> None:
    other = {"1.5.3": "gsplat-1.6", "1.6.0": "gsplat-1.5"}[gsplat]
    with pytest.raises(InputError, match=f"installed gsplat {gsplat} does not compute"):
        rasterization(**given(), backend="gsplat", numerics=other)
    assert not CALLS
    assert api._numerics("auto") is api.NUMERICS[f"gsplat-{gsplat[:3]}"]
