"""The Gaussian rasteriser on the CPU: time beside plain torch, threads, limits, and 10,000 odd calls.

    python benchmarks/rasterizer.py                 # CPU time of one process on one thread, best of --repeats
    python benchmarks/rasterizer.py --wall          # wall time on one and two threads, and what two idle cores would take
    python benchmarks/rasterizer.py --fuzz 10000    # random and broken scenes: crashes, NaN, other errors
    python benchmarks/rasterizer.py --fit           # scenes from posed pictures: PSNR of held-out views
    python benchmarks/rasterizer.py --cuda          # gsplat's own time for the same call, and what our wrapper adds

Scenes: random anisotropic Gaussians whose size follows their number, opacity 0.3 to 0.95, three colours and depth. "Plain torch" is the
same formula tile by tile with autograd, written here, and also run in float64. Where pictures differ from that by more than 3e-5, a
Gaussian's alpha is within 1e-5 (relative) of 1/255 in that pixel, and rounding decides whether it counts, in plain float32 torch as
in ours: `pixels_at_the_cut` counts such pixels, `largest_difference` is that of all others. Each part has a key of its own in
`results/rasterizer.json`.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkit.errors import MMKitError
from mmkit.ops import rasterization
from mmkit.ops.gaussian.reference import covariance, project
from mmkit.ops.gaussian.settings import ALPHA_MIN, NUMERICS, T_STOP, TILE, Settings
from mmkit.storage import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "rasterizer.json"
SIZES = [
    (320, 240, 10_000, 3),
    (320, 240, 50_000, 3),
    (640, 480, 50_000, 3),
    (640, 480, 50_000, 19),
    (640, 480, 200_000, 3),
]
TORCH = {(320, 240, 10_000, 3), (320, 240, 50_000, 3)}
GROUP_NS = {"forward": 7.0, "both": 16.5}
"""Estimated least time for eight pixels of a Gaussian on one core of 2.6 GHz: about 35 and 85 vector instructions, 2 per cycle."""


def scene(width: int, height: int, n: int, channels: int, device: str = "cpu") -> tuple[list[Tensor], Tensor]:
    """Leaves (means, quats, scales, opacities, colors, viewmats) and intrinsics."""
    g = torch.Generator().manual_seed(0)
    z, focal = 1 + 9 * torch.rand(n, generator=g), 0.8 * width
    pixels = torch.rand(n, 2, generator=g) * torch.tensor([float(width), float(height)])
    means = torch.stack([(pixels[:, 0] - width / 2) * z / focal, (pixels[:, 1] - height / 2) * z / focal, z], -1)
    size = 0.7 * math.sqrt(width * height / n)
    scales = (size * z / focal)[:, None] * torch.exp(0.4 * torch.randn(n, 3, generator=g))
    leaves = [
        means,
        torch.randn(n, 4, generator=g),
        scales,
        0.3 + 0.65 * torch.rand(n, generator=g),
        torch.rand(n, channels, generator=g),
    ]
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
    return [x.to(device).requires_grad_() for x in (*leaves, torch.eye(4)[None])], K[None].to(device)


def ours(leaves: list[Tensor], K: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """The operator."""
    image, alpha, _ = rasterization(*leaves, K, width, height, render_mode="RGB+D")
    return image, alpha


def plain_torch(
    leaves: list[Tensor], K: Tensor, width: int, height: int, margins: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same picture with torch operations, one tile after the other.

    `margins` (H, W) is filled with how near, relatively, an alpha of each pixel is to where it is cut off.
    """
    means, quats, scales, opacities, colors, views = leaves
    s = Settings(width, height, 0.01, 1e10, 0.0, 0.3, False, False, False, False, True, NUMERICS["gsplat-1.5"])
    covars = covariance(quats, scales)
    radii, means2d, depths, conics, opacities = project(means, covars, opacities, views, K, s)
    order = depths.detach().argsort()
    features = torch.cat([colors, depths[:, None]], 1)
    low, high = means2d.detach() - radii, means2d.detach() + radii
    image, alphas = features.new_zeros(height, width, features.shape[1]), features.new_zeros(height, width)
    parts = []
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            h, w = min(TILE, height - top), min(TILE, width - left)
            there = (
                (high[:, 0] > left)
                & (low[:, 0] < left + w)
                & (high[:, 1] > top)
                & (low[:, 1] < top + h)
                & (radii[:, 0] > 0)
            )
            ids = order[there[order]]
            ys, xs = torch.meshgrid(torch.arange(top, top + h) + 0.5, torch.arange(left, left + w) + 0.5, indexing="ij")
            x, y = means2d[ids, 0, None] - xs.flatten(), means2d[ids, 1, None] - ys.flatten()
            a, b, c = conics[ids].unsqueeze(-1).unbind(1)
            alpha = (opacities[ids, None] * torch.exp(-0.5 * (a * x * x + c * y * y) - b * x * y)).clamp_max(0.999)
            if margins is not None and len(ids):
                margins[top : top + h, left : left + w] = (alpha / ALPHA_MIN - 1).abs().amin(0).view(h, w)
            alpha = torch.where(alpha >= ALPHA_MIN, alpha, 0.0)
            with torch.no_grad():
                going = (torch.cumprod(1 - alpha, 0) > T_STOP) | (alpha == 0)
                going = going.cummin(0).values if len(ids) else going
            alpha = torch.where(going, alpha, 0.0)
            light = torch.cat([torch.ones_like(xs).view(1, -1), torch.cumprod(1 - alpha, 0)])
            parts.append((top, left, h, w, (alpha * light[:-1]).T @ features[ids], 1 - light[-1]))
    for top, left, h, w, color, alpha in parts:
        image[top : top + h, left : left + w], alphas[top : top + h, left : left + w] = (
            color.view(h, w, -1),
            alpha.view(h, w),
        )
    return image[None], alphas[None, ..., None]


@torch.no_grad()
def differences(leaves: list[Tensor], K: Tensor, width: int, height: int) -> dict[str, Any]:
    """How far float32 is from plain torch in float64: ours, and plain torch's own."""
    margins = torch.full((height, width), math.inf, dtype=torch.float64)
    want = plain_torch([x.double() for x in leaves], K.double(), width, height, margins)[0]
    cut = margins < 1e-5
    out: dict[str, Any] = {"pixels_at_the_cut": int(cut.sum())}
    for name, render in (("ours", ours), ("torch", plain_torch)):
        error = (render(leaves, K, width, height)[0] - want).abs().amax(-1)[0]
        out[name] = {
            "largest_difference": float(error[~cut].max()),
            "at_the_cut": float(error[cut].max()) if cut.any() else 0.0,
        }
    return out


def timed(
    render: Callable[..., tuple[Tensor, Tensor]], given: Any, repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Best milliseconds of the forward pass, and of forward and backward together."""
    leaves, K, width, height = given
    best = {"forward": math.inf, "both": math.inf}
    for _ in range(repeats):
        start = clock()
        image, alpha = render(leaves, K, width, height)
        middle = clock()
        torch.autograd.grad([image, alpha], leaves, [torch.ones_like(image), torch.ones_like(alpha)])
        end = clock()
        best = {"forward": min(best["forward"], middle - start), "both": min(best["both"], end - start)}
    return {k: round(1000 * v, 1) for k, v in best.items()}


def groups(leaves: list[Tensor], K: Tensor, width: int, height: int) -> int:
    """Eight-pixel groups that Gaussians reach: the work of compositing, when nothing is hidden."""
    from mmkit.ops.gaussian import fully_fused_projection

    with torch.no_grad():
        means, quats, scales, opacities, _, views = leaves
        radii, means2d, _, conics, _ = fully_fused_projection(
            means, None, quats, scales, views, K, width, height, opacities=opacities
        )
    reach = 2 * (255 * opacities.detach()).log()
    a, b, c = conics[0].double().unbind(-1)
    x0, y0 = means2d[0].double().unbind(-1)
    total = 0
    for dy in range(-int(radii[..., 1].max()), int(radii[..., 1].max()) + 1):
        y = y0.floor() + dy + 0.5
        room = reach * a - (a * c - b * b) * (y - y0) ** 2
        root, middle = room.clamp_min(0).sqrt() / a, x0 - b * (y - y0) / a
        low, high = (middle - root).clamp(0, width), (middle + root).clamp(0, width)
        inside = (room > 0) & (y > 0) & (y < height) & (high > low) & (radii[0, :, 0] > 0)
        total += int(((high / 8).ceil() - (low / 8).floor())[inside].sum())
    return total


def cpu_times(repeats: int) -> dict[str, Any]:
    """The table, on one thread, in CPU time."""
    torch.set_num_threads(1)
    rows = []
    for size in SIZES:
        width, height, n, channels = size
        given = (*scene(width, height, n, channels), width, height)
        ours(*given)  # compiles
        row: dict[str, Any] = {"width": width, "height": height, "gaussians": n, "channels": channels}
        row["ms"] = timed(ours, given, repeats, time.process_time)
        if size in TORCH:
            row["from_float64"] = differences(*given)
            row["torch_ms"] = timed(plain_torch, given, 1, time.process_time)
            row["times_faster"] = {k: round(row["torch_ms"][k] / row["ms"][k], 1) for k in row["ms"]}
        work = groups(*given)
        row["groups"] = work
        row["limit_ms"] = {k: round(work * ns * 1e-6, 1) for k, ns in GROUP_NS.items()}
        row["times_limit"] = {k: round(row["ms"][k] / row["limit_ms"][k], 1) for k in row["ms"]}
        rows.append(row)
        print(row, flush=True)
    return {"clock": "process CPU time, one thread", "rows": rows}


def two_threads_path(given: Any, repeats: int) -> float:
    """Least milliseconds that forward and backward keep the busier of two threads: CPU time on one thread, less what the other would do.

    Unlike wall time it does not depend on who else uses the second core.
    """
    from mmkit.ops.gaussian import cpu, projection, tiles

    saved = 0.0

    def halves(function: Callable[..., Any], jobs: Any) -> None:
        nonlocal saved
        jobs, spent = list(jobs), []
        for part in (jobs[0::2], jobs[1::2]):  # as `run_jobs` deals them
            start = time.process_time()
            for job in part:
                function(*job)
            spent.append(time.process_time() - start)
        saved += min(spent)

    modules: list[Any] = [cpu, projection, tiles]
    before = [m.run_jobs for m in modules]
    best = math.inf
    torch.set_num_threads(1)
    try:
        for module in modules:
            module.run_jobs = halves
        for _ in range(repeats):
            saved, start = 0.0, time.process_time()
            image, alpha = ours(*given)
            torch.autograd.grad([image, alpha], given[0], [torch.ones_like(image), torch.ones_like(alpha)])
            best = min(best, time.process_time() - start - saved)
    finally:
        for module, function in zip(modules, before, strict=True):
            module.run_jobs = function
    return round(1000 * best, 1)


def wall_times(repeats: int) -> dict[str, Any]:
    """Wall time on one and two threads, with the load of the machine beside it."""
    rows = []
    for width, height, n, channels in SIZES:
        given = (*scene(width, height, n, channels), width, height)
        row: dict[str, Any] = {"width": width, "height": height, "gaussians": n, "channels": channels}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ours(*given)
            row[f"ms_{threads}"] = timed(ours, given, repeats, time.perf_counter)
        row["two_threads_path_ms"] = two_threads_path(given, repeats)
        rows.append(row)
        print(row, flush=True)
    return {"clock": "wall time", "load_average": os.getloadavg()[0], "rows": rows}


_BROKEN = [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e30, -1e30, 3e38, 1e-30, 1e-45]


def odd_call(seed: int, call: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and options of a random call; every second has up to six broken numbers, now and then in a camera."""
    rng = np.random.default_rng((seed, call))
    n, channels, cameras = int(rng.integers(0, 40)), int(rng.integers(1, 6)), int(rng.integers(1, 3))
    width, height = int(rng.integers(1, 50)), int(rng.integers(1, 40))
    f, spread = 10 ** rng.uniform(-1, 3), 10 ** rng.uniform(-2, 3)
    degree = int(rng.integers(-4, 4))
    axes = rng.normal(size=(n, 3, 3)) * 10 ** rng.uniform(-4, 2, (n, 1, 3))
    arrays = {
        "means": rng.normal(size=(n, 3)) * spread, "quats": rng.normal(size=(n, 4)), "scales": 10 ** rng.uniform(-4, 2, (n, 3)),
        "opacities": rng.uniform(0, 1, n), "covars": axes @ axes.transpose(0, 2, 1),
        "colors": rng.uniform(0, 1, (n, channels)) if degree < 0 else rng.normal(size=(n, (degree + 1) ** 2, 3)),
        "viewmats": np.tile(np.eye(4), (cameras, 1, 1)) + 0.1 * rng.normal(size=(cameras, 4, 4)),
        "Ks": np.tile([[f, 0, width / 2], [0, f, height / 2], [0, 0, 1.0]], (cameras, 1, 1)),
    }  # fmt: skip
    for name in ["quats", "scales"] if rng.integers(4) == 0 else ["covars"]:
        del arrays[name]
    names = [k for k in arrays if k not in ("colors", "viewmats", "Ks")]  # colours are carried through as they are
    if rng.integers(20) == 0:
        names = ["viewmats", "Ks"]
    for _ in range(int(rng.integers(1, 7)) if call % 2 else 0):
        x = arrays[names[int(rng.integers(len(names)))]].reshape(-1)
        if len(x):
            x[int(rng.integers(len(x)))] = _BROKEN[int(rng.integers(len(_BROKEN)))]
    tensors = {k: torch.from_numpy(x.astype(np.float32)).requires_grad_(k != "Ks") for k, x in arrays.items()}
    options: dict[str, Any] = {
        "width": width, "height": height, "sh_degree": None if degree < 0 else degree,
        "render_mode": str(rng.choice(["RGB", "RGB+D", "RGB+ED"])), "rasterize_mode": str(rng.choice(["classic", "antialiased"])),
        "camera_model": str(rng.choice(["pinhole", "ortho"])), "packed": bool(rng.integers(2)), "absgrad": bool(rng.integers(2)),
        "numerics": str(rng.choice(["gsplat-1.5", "gsplat-1.6"])), "eps2d": float(rng.choice([0.3, 0.0, 1.0])),
    }  # fmt: skip
    return tensors, options


def fuzz(calls: int, seed: int = 0) -> dict[str, Any]:
    """Random calls; counts those whose pictures and gradients are all finite, those refused with our errors, and others."""
    counts = {"finite": 0, "refused": 0, "not finite": 0, "other errors": 0}
    for call in range(calls):
        tensors, options = odd_call(seed, call)
        try:
            image, alpha, _ = rasterization(**{"quats": None, "scales": None, **tensors, **options}, backend="cpu")
            leaves = [x for x in tensors.values() if x.requires_grad]
            grads = torch.autograd.grad(image.sum() + alpha.sum(), leaves, allow_unused=True)
            fine = all(x.isfinite().all() for x in (image, alpha, *grads) if x is not None)
            outcome = "finite" if fine else "not finite"
        except MMKitError:
            outcome = "refused"
        except Exception as error:
            outcome = "other errors"
            print(call, type(error).__name__, error, flush=True)
        counts[outcome] += 1
        if outcome == "not finite":
            print(call, outcome, options, flush=True)
        if call % 1000 == 999:
            print(call + 1, counts, flush=True)
    return {"calls": calls, "seed": seed, **counts}


def fits(data: Path, wanted: str) -> dict[str, Any]:
    """PSNR of views that nothing was fitted to and no setting chosen by: a drawn scene from random points, and real ones from depths."""
    from mmkit.pointcloud.splats import FitConfig, drawn_scene, fit_images, load_trajectory
    from mmkit.pointcloud.splats.training import measure

    torch.set_num_threads(2)
    jobs: dict[str, Any] = {
        "drawn still life, 24 pictures of 128 pixels, random points": (
            drawn_scene(24, 128), drawn_scene(12, 128, between=True), FitConfig()
        ),
    }  # fmt: skip
    room = FitConfig(start_gaussians=10_000, max_gaussians=16_000)
    for folder, every, name in (
        ("rgbd_7scenes", 4, "7-Scenes chess, every fourth frame"),
        ("rgbd_tum5", 1, "TUM, 5 frames"),
    ):
        if (data / folder).is_dir():
            jobs[f"{name}, 128 pixels, points from depths"] = (
                *load_trajectory(data / folder, longest=128, every=every).split(),
                room,
            )
    known = read_json(RESULTS).get("fit", {}).get("rows", []) if RESULTS.is_file() else []
    rows = [row for row in known if wanted not in row["scene"]]
    for name, (fitted, held, config) in jobs.items():
        if wanted not in name:
            continue
        cpu = time.process_time()
        result = fit_images(fitted, config, held_out=held, progress=False)
        row = {
            "scene": name,
            "steps": config.steps,
            "gaussians": len(result.model),
            "fitted": len(fitted),
            "held_out": len(held),
        }
        row |= {k: round(v, 4) for k, v in result.scores.items()}
        row |= {f"fitted_{k}": round(v, 4) for k, v in measure(result.model, fitted).items()}
        row |= {
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "wall_seconds": round(result.seconds, 1),
            "load": os.getloadavg()[0],
        }
        rows.append(row)
        print(row, flush=True)
    return {"threads": 2, "rows": rows}


def cuda_times(repeats: int) -> dict[str, Any]:
    """gsplat alone and through our function, on the same tensors."""
    from gsplat import rasterization as direct

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    rows = []
    for width, height, n, channels in SIZES:
        given = (*scene(width, height, n, channels, "cuda"), width, height)
        theirs = lambda leaves, K, w, h: direct(*leaves, K, w, h, render_mode="RGB+D")[:2]  # noqa: E731
        ours(*given), theirs(*given)
        row = {"gsplat": timed(theirs, given, repeats, synchronized), "ours": timed(ours, given, repeats, synchronized)}
        rows.append({"width": width, "height": height, "gaussians": n, "channels": channels, **row})
    return {"device": torch.cuda.get_device_name(), "rows": rows}


def main() -> None:
    """Measure one part, print, and put it into `benchmarks/results/rasterizer.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument(
        "--fit", nargs="?", const="", metavar="SCENE", help="all scenes, or those with this in their names"
    )
    parser.add_argument("--fuzz", type=int, default=0, metavar="CALLS")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MMKIT_DATA_DIR", "../shared/data")))
    args = parser.parse_args()
    if args.fuzz:
        part = {"fuzz": fuzz(args.fuzz)}
    elif args.fit is not None:
        part = {"fit": fits(args.data, args.fit)}
    elif args.cuda:
        part = {"cuda": cuda_times(args.repeats)}
    else:
        part = {"wall": wall_times(args.repeats)} if args.wall else {"cpu": cpu_times(args.repeats)}
    setting = {
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    known = read_json(RESULTS) if RESULTS.is_file() else {}
    write_json(RESULTS, {**known, **part, "setting": setting})


if __name__ == "__main__":
    main()
