"""The Gaussian rasteriser: backends agree, gradients are right in float64, results are the same on any number of threads."""

from __future__ import annotations

import itertools
import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmkit.errors import InputError
from mmkit.ops import rasterization
from mmkit.ops.gaussian import top_contributors
from mmkit.ops.gaussian.harmonics import basis

pytestmark = pytest.mark.slow  # compiling its kernels takes half a minute on a fresh checkout

NAMES = ("means", "quats", "scales", "opacities", "colors", "viewmats")


def scene(
    n: int = 60,
    channels: int = 3,
    size: tuple[int, int] = (50, 38),
    cameras: int = 1,
    dtype=torch.float32,
    seed: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """Leaves in the order of `NAMES`, and intrinsics: Gaussians before slightly turned cameras, a few of them behind."""
    g = torch.Generator().manual_seed(seed)
    width, height = size
    means = torch.rand(n, 3, generator=g) * torch.tensor([4.0, 3.0, 4.0]) - torch.tensor([2.0, 1.5, 0.4])
    scales = 0.05 + 0.25 * torch.rand(n, 3, generator=g)
    quats, opacities = torch.randn(n, 4, generator=g), 0.05 + 0.94 * torch.rand(n, generator=g)
    views = torch.eye(4).repeat(cameras, 1, 1)
    for i in range(cameras):
        turn = torch.linalg.matrix_exp(0.2 * torch.tensor([[0, -1.0, i], [1, 0, -0.5], [-float(i), 0.5, 0]]))
        views[i, :3, :3], views[i, :3, 3] = turn, torch.tensor([0.1 * i, -0.05, 0.3])
    f = 0.9 * width
    ks = torch.tensor([[f, 0, width / 2 + 1.3], [0, 1.05 * f, height / 2 - 0.7], [0, 0, 1]]).repeat(cameras, 1, 1)
    leaves = [means, quats, scales, opacities, torch.rand(n, channels, generator=g), views]
    return [x.to(dtype).requires_grad_() for x in leaves], ks.to(dtype)


def render(leaves: list[Tensor], ks: Tensor, size: tuple[int, int] = (50, 38), **options: Any) -> list[Tensor]:
    """Picture, alpha, and the gradients of a fixed weighting of both."""
    image, alpha, _ = rasterization(*leaves, ks, *size, **options)
    weights = [torch.linspace(-1, 1.3, x.numel(), dtype=x.dtype).sin().view_as(x) for x in (image, alpha)]
    loss = (image * weights[0]).sum() + (alpha * weights[1]).sum()
    return [image, alpha, *torch.autograd.grad(loss, leaves)]


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    for name, a, b in zip(("image", "alpha"), got, want, strict=False):
        assert (a - b).abs().max() <= 2e-5 * max(1.0, b.abs().max().item()), name
    for name, a, b in zip(NAMES, got[2:], want[2:], strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm().clamp_min(1e-6), name


@pytest.mark.parametrize("seed", range(16))
def test_cpu_agrees_with_the_double_reference(seed: int) -> None:
    """Random configurations: shapes, batches, colours or harmonics, modes, cameras, constants, gradients of everything."""
    rng = np.random.default_rng(seed)
    n, width, height = int(rng.integers(10, 60)), int(rng.integers(5, 60)), int(rng.integers(5, 45))
    lead, cameras, degree = [(), (2,), (1, 2)][rng.integers(3)], int(rng.integers(1, 4)), int(rng.integers(-4, 4))
    mode = ["RGB", "D", "ED", "RGB+D", "RGB+ED"][seed % 5]
    channels = int(rng.choice([1, 2, 3, 5, 8, 19, 40])) if degree < 0 else 3
    scenes = [
        scene(n, channels, (width, height), cameras, torch.float64, 100 * seed + i) for i in range(math.prod(lead))
    ]
    stacked = [
        torch.stack(x).detach().view(*lead, *x[0].shape) for x in zip(*[leaves for leaves, _ in scenes], strict=True)
    ]
    means, quats, scales, opacities, colors, views = stacked
    ks = torch.stack([k for _, k in scenes]).view(*lead, cameras, 3, 3)
    generator = torch.Generator().manual_seed(seed)
    if degree >= 0:
        bases = (degree + 1) ** 2 + int(rng.integers(0, 2))
        colors = 0.5 * torch.randn(*lead, n, bases, 3, generator=generator, dtype=torch.float64)
    if rng.integers(2):  # colours of each camera's own
        place = len(lead)
        colors = torch.stack([colors, 1 - colors, 0.5 * colors][:cameras], place)
    leaves = {"means": means, "opacities": opacities, "viewmats": views}
    if "RGB" in mode:
        leaves["colors"] = colors
    if rng.integers(3):
        leaves |= {"quats": quats, "scales": scales}
    else:
        axes = _rotation(quats) * scales.unsqueeze(-2)
        leaves["covars"] = axes @ axes.transpose(-1, -2)
    if "RGB" in mode and rng.integers(2):
        leaves["backgrounds"] = torch.rand(*lead, cameras, channels, generator=generator, dtype=torch.float64)
    options: dict[str, Any] = {
        "width": width, "height": height, "render_mode": mode, "sh_degree": degree if degree >= 0 and "RGB" in mode else None,
        "rasterize_mode": ["classic", "antialiased"][rng.integers(2)], "camera_model": ["pinhole", "ortho"][rng.integers(2)],
        "numerics": ["gsplat-1.5", "gsplat-1.6"][rng.integers(2)], "packed": bool(rng.integers(2)),
        "radius_clip": float(rng.choice([0, 2])), "eps2d": float(rng.choice([0.1, 0.3])),
        "near_plane": float(rng.choice([0.01, 1.0])), "far_plane": float(rng.choice([3.0, 1e10])),
    }  # fmt: skip
    if options["camera_model"] == "ortho":
        ks[..., :2, :2] *= 0.25
    results = []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference")):
        own = {k: x.detach().to(dtype).requires_grad_() for k, x in leaves.items()}
        given = {**dict.fromkeys(("quats", "scales", "colors")), **own, "Ks": ks.to(dtype)}
        image, alpha, meta = rasterization(**given, **options, backend=backend)
        weights = [torch.linspace(-1, 1.3, x.numel(), dtype=torch.float64).sin().view_as(x) for x in (image, alpha)]
        loss = (image * weights[0]).sum() + (alpha * weights[1]).sum()
        results.append((image, alpha, meta["radii"], torch.autograd.grad(loss, list(own.values()))))
    (image, alpha, radii, grads), (want_image, want_alpha, want_radii, want_grads) = results
    assert (alpha > 0.1).any()
    assert torch.equal(radii, want_radii)
    assert (image - want_image).abs().max() <= 2e-5 * max(1.0, want_image.abs().max().item())
    assert (alpha - want_alpha).abs().max() <= 2e-5
    for name, got, want in zip(leaves, grads, want_grads, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm().clamp_min(1e-6), name


def test_gradcheck_of_the_reference() -> None:
    leaves, ks = scene(6, 2, (12, 10), dtype=torch.float64)
    with torch.no_grad():  # away from the cuts at 1/255, 0.999 and 1e-4
        leaves[2].mul_(4)
        leaves[3].mul_(0.4).add_(0.05)
    covars = leaves[2].detach().square().diag_embed().requires_grad_()
    ground = torch.rand(1, 2, dtype=torch.float64, requires_grad=True)

    def by_axes(means, quats, scales, opacities, colors, views, ground):
        tensors = (means, quats, scales, opacities, colors, views, ks, 12, 10)
        image, alpha, _ = rasterization(*tensors, backgrounds=ground, render_mode="RGB+D", rasterize_mode="antialiased")
        values = torch.cat([image, alpha], -1).flatten()
        waves = torch.arange(1.0, 4.0, dtype=torch.float64)[:, None] * torch.arange(len(values))
        return waves.sin() @ values  # three weightings of all pixels cost less than each pixel's own gradient

    def by_covariance(means, covars):
        image = rasterization(means, None, None, *leaves[3:], ks, 12, 10, covars=covars)[0]
        return image.square().sum()

    assert torch.autograd.gradcheck(by_axes, (*leaves, ground), atol=1e-5, rtol=1e-3, nondet_tol=0)
    assert torch.autograd.gradcheck(by_covariance, (leaves[0], covars), atol=1e-5, rtol=1e-3)


def test_covariances_and_backgrounds_get_the_reference_s_gradients() -> None:
    leaves, ks = scene(cameras=2)
    g = torch.Generator().manual_seed(3)
    axes = 0.2 * torch.randn(60, 3, 3, generator=g)
    grads = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        covars = (axes @ axes.transpose(1, 2)).to(dtype).requires_grad_()
        ground = torch.full((2, 3), 0.3, dtype=dtype, requires_grad=True)
        tensors = [x.detach().to(dtype) for x in leaves]
        image, _, _ = rasterization(
            tensors[0],
            None,
            None,
            *tensors[3:],
            ks.to(dtype),
            50,
            38,
            covars=covars,
            backgrounds=ground,
            backend=backend,
        )
        grads.append(torch.autograd.grad(image.square().sum(), (covars, ground)))
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_harmonics_seen_from_cameras(degree: int) -> None:
    leaves, ks = scene(cameras=2)
    leaves[4] = (0.4 * torch.randn(60, 16, 3, generator=torch.Generator().manual_seed(1))).requires_grad_()
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    assert_close(render(leaves, ks, sh_degree=degree, backend="cpu"), render(doubles, ks.double(), sh_degree=degree))


def test_harmonics_are_orthonormal() -> None:
    points = torch.nn.functional.normalize(
        torch.randn(200000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1
    )
    values = basis(3, points)
    gram = 4 * math.pi * values.T @ values / len(points)
    assert (gram - torch.eye(16)).abs().max() < 0.03


def test_one_gaussian_is_what_the_formula_says() -> None:
    K = torch.tensor([[[40.0, 0, 10.5], [0, 40.0, 8.5], [0, 0, 1]]])
    given = (
        torch.tensor([[0, 0, 2.0]]),
        torch.tensor([[3.0, 0, 0, 0]]),
        torch.full((1, 3), 0.1),
        torch.tensor([0.7]),
        torch.tensor([[0.5]]),
    )
    image, alpha, _ = rasterization(*given, torch.eye(4)[None], K, 21, 17)
    assert image[0, 8, 10, 0].item() == pytest.approx(0.7 * 0.5, abs=1e-7)
    variance = (40 * 0.1 / 2) ** 2 + 0.3
    r = torch.arange(5.0)
    torch.testing.assert_close(alpha[0, 8, 10:15, 0], 0.7 * torch.exp(-0.5 * r * r / variance), atol=1e-6, rtol=0)


def test_sums_and_depths() -> None:
    leaves, ks = scene()
    means = leaves[0].detach().clone()
    ones = torch.ones(60, 1)
    image, alpha, _ = rasterization(*[x.detach() for x in leaves[:4]], ones, leaves[5].detach(), ks, 50, 38)
    torch.testing.assert_close(image, alpha, atol=1e-6, rtol=0)
    means[:, 2] = 2.5
    depth, alpha, _ = rasterization(
        means, *[x.detach() for x in leaves[1:4]], None, torch.eye(4)[None], ks, 50, 38, render_mode="ED"
    )
    assert (depth[alpha > 0.01] - 2.5).abs().max() < 1e-5


def test_same_bits_in_any_order_and_on_any_number_of_threads() -> None:
    leaves, ks = scene(9000, size=(120, 90), cameras=2)
    with torch.no_grad():
        leaves[2].mul_(0.2)
    leaves[4] = (0.3 * torch.randn(9000, 9, 3)).requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            results.append(render(leaves, ks, (120, 90), sh_degree=2, render_mode="RGB+D", backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    order = torch.randperm(9000, generator=torch.Generator().manual_seed(0))
    mixed = [x.detach()[order] for x in leaves[:5]]
    image, _, _ = rasterization(*mixed, leaves[5], ks, 120, 90, sh_degree=2, render_mode="RGB+D")
    assert torch.equal(image, results[0][0])


def test_moving_world_and_camera_together_changes_nothing() -> None:
    leaves, ks = scene()
    motion = torch.eye(4)
    motion[:3, :3] = torch.linalg.matrix_exp(torch.tensor([[0, -0.3, 0.1], [0.3, 0, 0.2], [-0.1, -0.2, 0]]))
    motion[:3, 3] = torch.tensor([0.3, -0.2, 0.5])
    means, quats, scales, opacities, colors, view = (x.detach() for x in leaves)
    turned = torch.nn.functional.normalize(quats, dim=1)
    axes = _rotation(turned) * scales[:, None]
    moved = motion[:3, :3] @ axes
    before, _, _ = rasterization(
        means, None, None, opacities, colors, view, ks, 50, 38, covars=axes @ axes.transpose(1, 2)
    )
    after, _, _ = rasterization(
        means @ motion[:3, :3].T + motion[:3, 3], None, None, opacities, colors, view @ motion.inverse(), ks, 50, 38,
        covars=moved @ moved.transpose(1, 2),
    )  # fmt: skip
    assert (before - after).abs().max() < 2e-5


def _rotation(quats: Tensor) -> Tensor:
    from mmkit.ops.gaussian.reference import rotation

    return rotation(quats)


def test_many_channels_are_several_renderings() -> None:
    leaves, ks = scene(channels=20)
    whole, _, _ = rasterization(*leaves, ks, 50, 38)
    for c in range(0, 20, 4):
        part, _, _ = rasterization(*leaves[:4], leaves[4][:, c : c + 4], leaves[5], ks, 50, 38)
        assert (part - whole[..., c : c + 4]).abs().max() < 1e-6


def test_batches_and_colours_per_camera() -> None:
    one, ks = scene(cameras=2)
    two, _ = scene(cameras=2, seed=5)
    both = [torch.stack([a, b]).detach() for a, b in zip(one, two, strict=True)]
    image, _, meta = rasterization(*both, torch.stack([ks, ks]), 50, 38, packed=False)
    assert image.shape == (2, 2, 38, 50, 3)
    assert meta["means2d"].shape == (2, 2, 60, 2)
    assert torch.equal(image[1], rasterization(*two, ks, 50, 38)[0])
    colors = torch.rand(2, 60, 3)
    image, _, _ = rasterization(*one[:4], colors, one[5], ks, 50, 38)
    assert torch.equal(image[1], rasterization(*one[:4], colors[1], one[5][1:], ks[1:], 50, 38)[0][0])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_meta_has_what_densifiers_read(packed: bool, backend: str) -> None:
    leaves, ks = scene(cameras=2)
    absgrad = backend == "cpu"
    image, _, meta = rasterization(*leaves, ks, 50, 38, packed=packed, absgrad=absgrad, backend=backend)
    meta["means2d"].retain_grad()
    image.square().sum().backward()
    assert meta["means2d"].grad.abs().sum() > 0
    rows = len(meta["gaussian_ids"]) if packed else 60
    assert meta["radii"].shape == ((rows, 2) if packed else (2, 60, 2))
    assert (meta["gaussian_ids"] is None) != packed
    if absgrad:
        assert (meta["means2d"].absgrad >= meta["means2d"].grad.abs() - 1e-6).all()
    assert meta["isect_offsets"].shape == (2, 3, 4)
    assert len(meta["flatten_ids"]) == meta["tiles_per_gauss"].sum() == len(meta["isect_ids"])
    assert (meta["tile_width"], meta["tile_height"], meta["n_cameras"], meta["n_batches"]) == (4, 3, 2, 1)
    exact = rasterization(*leaves, ks, 50, 38, numerics="gsplat-1.6", backend=backend)[2]
    assert exact["tiles_per_gauss"].sum() < meta["tiles_per_gauss"].sum()


def test_absolute_gradients_are_those_of_single_pixels() -> None:
    leaves, ks = scene(5, size=(20, 12))
    image, _, meta = rasterization(*leaves, ks, 20, 12, absgrad=True, packed=False)
    meta["means2d"].retain_grad()
    total = torch.zeros_like(meta["means2d"])
    for y, x in itertools.product(range(12), range(20)):
        total += torch.autograd.grad(image[0, y, x].sum(), meta["means2d"], retain_graph=True)[0].abs()
    image.sum().backward()
    torch.testing.assert_close(meta["means2d"].absgrad, total, atol=1e-4, rtol=1e-3)


def test_picking_agrees_with_the_reference() -> None:
    leaves, ks = scene(cameras=2)
    tensors = [x.detach() for x in (*leaves[:4], leaves[5])]
    ids, weights = top_contributors(*tensors, ks, 50, 38, k=3)
    want_ids, want = top_contributors(*[x.double() for x in tensors], ks.double(), 50, 38, k=3)
    assert (weights - want).abs().max() < 2e-5
    clear = (want[..., :-1] - want[..., 1:] > 1e-4).all(-1) & (want[..., -1] > 1e-4)
    assert torch.equal(ids[clear], want_ids[clear])
    assert (ids == -1).eq(weights == 0).all()
    with pytest.raises(InputError, match="k must be"):
        top_contributors(*tensors, ks, 50, 38, k=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_to_see(backend: str) -> None:
    leaves, ks = scene()
    for n, shift in ((0, 0.0), (60, -50.0)):
        tensors = [x.detach()[:n].requires_grad_() for x in leaves[:5]]
        tensors[0] = (tensors[0].detach() + torch.tensor([0, 0, shift])).requires_grad_()
        image, alpha, meta = rasterization(
            *tensors, leaves[5], ks, 50, 38, backgrounds=torch.ones(1, 3), backend=backend
        )
        assert (image == 1).all()
        assert (alpha == 0).all()
        assert len(meta["isect_ids"]) == 0
        grads = torch.autograd.grad(image.sum() + alpha.sum(), [*tensors, leaves[5]], allow_unused=True)
        assert all(g is None or (g == 0).all() for g in grads)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("camera_model", ["pinhole", "ortho"])
def test_odd_gaussians_spoil_nothing(backend: str, camera_model: str) -> None:
    leaves, ks = scene()
    leaves[4] = torch.randn(60, 4, 3, generator=torch.Generator().manual_seed(0))
    tensors = [x.detach().clone() for x in leaves]
    options: dict[str, Any] = {
        "backend": backend, "sh_degree": 1, "rasterize_mode": "antialiased", "camera_model": camera_model, "eps2d": 0.0
    }  # fmt: skip
    clean = rasterization(*[x[17:] for x in tensors[:5]], tensors[5], ks, 50, 38, **options)[0]
    means, quats, scales, opacities = tensors[:4]
    means[0], means[1, 2], means[2, 0], means[3, 1] = torch.nan, torch.inf, -torch.inf, 3e38
    quats[4], quats[5], quats[6], quats[7] = 0, torch.nan, quats[6] * 1e25, quats[7] * 1e-25
    scales[8], scales[9, 1], scales[10], scales[11], scales[12] = torch.nan, torch.inf, 1e30, 3e38, 0
    opacities[13], opacities[14], opacities[15], opacities[16] = torch.nan, 0.0, -1.0, torch.inf
    for x in tensors:
        x.requires_grad_()
    image, alpha, meta = rasterization(*tensors, ks, 50, 38, **options)
    assert meta["gaussian_ids"].min() >= 17
    assert (image - clean).abs().max() < 1e-6
    grads = torch.autograd.grad(image.sum() + alpha.sum(), tensors)
    assert all(g.isfinite().all() for g in grads)
    assert all((g[:17] == 0).all() for g in grads[:5])


def test_random_odd_calls_are_finite_or_refused() -> None:
    """The first of the ten thousand calls of `benchmarks/rasterizer.py --fuzz 10000`."""
    benchmark = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "rasterizer.py"))
    counts = benchmark["fuzz"](150)
    assert counts["finite"] + counts["refused"] == 150
    assert counts["finite"] > 140


def test_huge_and_flat_gaussians_are_finite() -> None:
    leaves, ks = scene(20)
    with torch.no_grad():
        leaves[2][:5] = 1e6
        leaves[2][5:10, 0], leaves[2][5:10, 1] = 1e3, 1e-8
        leaves[2][10:] = 0
        leaves[3][:] = 1
    assert all(x.isfinite().all() for x in render(leaves, ks, backend="cpu", rasterize_mode="antialiased"))


def test_layouts_dtypes_and_partial_gradients() -> None:
    leaves, ks = scene()
    want = render(leaves, ks, backend="cpu")
    strided = [x.detach().mT.contiguous().mT.requires_grad_() if x.dim() > 1 else x for x in leaves]
    assert_close(render(strided, ks, backend="cpu"), want)
    halves = [x.detach().bfloat16() for x in leaves]
    image, _, _ = rasterization(*halves, ks.bfloat16(), 50, 38)
    assert image.dtype == torch.bfloat16
    image, _, _ = rasterization(*[x.detach() for x in leaves[:5]], leaves[5], ks, 50, 38, backend="cpu")
    weights = torch.linspace(-1, 1, image.numel()).view_as(image)
    assert torch.autograd.grad((image * weights).sum(), leaves[5])[0].abs().sum() > 0


@pytest.mark.parametrize(
    "change, options, error, message",
    [
        ({0: torch.zeros(60, 2)}, {}, InputError, "means must be"),
        ({1: torch.zeros(59, 4)}, {}, InputError, "quats must be"),
        ({3: torch.zeros(60, 1)}, {}, InputError, "opacities must be"),
        ({4: torch.zeros(61, 3)}, {}, InputError, "colors must be"),
        ({5: torch.zeros(4, 4)}, {}, InputError, "viewmats must be"),
        ({5: torch.full((1, 4, 4), torch.nan)}, {}, InputError, "viewmats hold values that are not finite"),
        ({4: torch.zeros(60, 4, 3), 5: torch.zeros(1, 4, 4)}, {"sh_degree": 1}, InputError, "no inverse"),
        ({}, {"sh_degree": 2}, InputError, "colors must be"),
        ({}, {"render_mode": "RGBD"}, InputError, "Did you mean"),
        ({}, {"backgrounds": torch.zeros(1, 4)}, InputError, "backgrounds must be"),
        ({}, {"numerics": "gsplat-2"}, InputError, "Did you mean"),
        ({}, {"rasterize_mode": "fast"}, InputError, "antialiased"),
        ({}, {"render_mode": "RGB-Ed"}, NotImplementedError, "distance along the ray"),
        ({}, {"with_ut": True}, NotImplementedError, "with_ut"),
        ({}, {"return_normals": True}, NotImplementedError, "return_normals"),
        ({}, {"camera_model": "fisheye"}, NotImplementedError, "fisheye"),
        ({}, {"tile_size": 8}, NotImplementedError, "tile_size"),
        ({}, {"with_utt": True}, TypeError, "with_ut"),
        ({}, {"backend": "gsplat"}, ImportError, "CUDA tensors only"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(
    change: dict[int, Tensor], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    leaves, ks = scene()
    for index, value in change.items():
        leaves[index] = value
    with pytest.raises(error, match=message):
        rasterization(*leaves, ks, 50, 38, **options)


def test_the_reference_refuses_large_scenes() -> None:
    leaves, ks = scene(3000, size=(300, 300), dtype=torch.float64)
    with pytest.raises(InputError, match="backend='cpu'"):
        rasterization(*leaves, ks, 300, 300)


def test_too_many_pairs_are_refused(monkeypatch) -> None:
    from mmkit.ops.gaussian import tiles

    monkeypatch.setattr(tiles, "MAX_PAIRS", 10)
    leaves, ks = scene()
    with pytest.raises(InputError, match="far too large"):
        rasterization(*leaves, ks, 50, 38, backend="cpu")


def test_random_gaussians_learn_a_picture() -> None:
    g = torch.Generator().manual_seed(0)
    ys, xs = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    target = torch.stack([xs, ys, (8 * xs).sin() * (8 * ys).cos() * 0.5 + 0.5], -1)
    means = torch.cat([4 * torch.rand(500, 2, generator=g) - 2, torch.full((500, 1), 2.0)], 1) + 0.01 * torch.rand(
        500, 3, generator=g
    )
    leaves = [
        means,
        torch.randn(500, 4, generator=g),
        torch.full((500, 3), -2.5),
        torch.zeros(500),
        torch.rand(500, 3, generator=g),
    ]
    for x in leaves:
        x.requires_grad_()
    optimizer = torch.optim.Adam(leaves, lr=1e-2)
    K = torch.tensor([[[32.0, 0, 32], [0, 32.0, 32], [0, 0, 1]]])
    for _ in range(300):
        means, quats, scales, opacities, colors = leaves
        image, _, _ = rasterization(
            means, quats, scales.exp(), opacities.sigmoid(), colors, torch.eye(4)[None], K, 64, 64
        )
        loss = (image[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert -10 * math.log10(loss.item()) > 25
