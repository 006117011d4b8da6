"""CPU time of the point operators beside plain torch and, where installed, fpsample and open3d; one thread, ratios within one run.

    python benchmarks/point_ops.py

Writes benchmarks/results/point_ops.json. "plain torch" is sampling as commonly written (a gather per step) and cdist with topk.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkit.ops.points import chamfer_distance, farthest_point_sample, knn_indices
from mmkit.pointcloud import choose_points

OUTPUT = Path(__file__).parent / "results" / "point_ops.json"


def cpu_seconds(call: Callable[[], Any], rounds: int = 9) -> float:
    """The least process time of a few calls."""
    found = []
    for _ in range(rounds):
        started = time.process_time()
        call()
        found.append(time.process_time() - started)
    return min(found)


def plain_sampling(xyz: Tensor, m: int) -> Tensor:
    """Farthest points as commonly written."""
    batch = torch.arange(len(xyz))
    out, d, last = (
        torch.zeros(len(xyz), m, dtype=torch.long),
        torch.full(xyz.shape[:2], 1e10),
        torch.zeros(len(xyz), dtype=torch.long),
    )
    for i in range(m):
        out[:, i] = last
        d = torch.minimum(d, ((xyz - xyz[batch, last][:, None]) ** 2).sum(-1))
        last = d.argmax(-1)
    return out


def open3d_neighbours(points: Any, queries: int, k: int) -> Any:
    """The k nearest of the first points, the search tree included, as ours includes its own."""
    import open3d

    points = open3d.core.Tensor(points)
    search = open3d.core.nns.NearestNeighborSearch(points)
    search.knn_index()
    return search.knn_search(points[:queries], k)


def sphere(batch: int, n: int) -> Tensor:
    """Points on a sphere."""
    return torch.nn.functional.normalize(torch.randn(batch, n, 3, generator=torch.Generator().manual_seed(0)), dim=-1)


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    farthest_point_sample(sphere(1, 500), 4)
    knn_indices(sphere(1, 500), sphere(1, 9), 4)
    for batch, n, m in ((8, 1024, 64), (8, 8192, 512), (1, 65536, 256)):
        x = sphere(batch, n)
        row: dict[str, Any] = {"op": "farthest_point_sample", "clouds": batch, "points": n, "samples": m}
        row["mmkit"] = cpu_seconds(lambda x=x, m=m: farthest_point_sample(x, m))
        row["plain_torch"] = cpu_seconds(lambda x=x, m=m: plain_sampling(x, m))
        if importlib.util.find_spec("fpsample"):
            import fpsample

            row["fpsample_exact"] = cpu_seconds(
                lambda x=x, m=m: [fpsample.fps_sampling(c.numpy(), m, start_idx=0) for c in x]
            )
        if importlib.util.find_spec("open3d"):
            import open3d

            files = [open3d.geometry.PointCloud(open3d.utility.Vector3dVector(c.double().numpy())) for c in x]
            row["open3d"] = cpu_seconds(lambda files=files, m=m: [c.farthest_point_down_sample(m) for c in files])
        rows.append(row)
    for batch, n, m in ((8, 1024, 64), (8, 8192, 512), (1, 65536, 256)):
        x = sphere(batch, n)
        row = {"op": "knn", "clouds": batch, "points": n, "queries": m, "k": 32}
        row["mmkit"] = cpu_seconds(lambda x=x, m=m: knn_indices(x, x[:, :m], 32))
        row["plain_torch"] = cpu_seconds(lambda x=x, m=m: torch.cdist(x[:, :m], x).topk(32, largest=False))
        if importlib.util.find_spec("open3d"):
            row["open3d"] = cpu_seconds(lambda x=x, m=m: [open3d_neighbours(c.numpy(), m, 32) for c in x])
        rows.append(row)
    x, y = sphere(1, 8192), sphere(1, 8192) * 1.1
    rows.append(
        {
            "op": "chamfer_distance", "clouds": 1, "points": 8192, "mmkit": cpu_seconds(lambda: chamfer_distance(x, y)),
            "plain_torch": cpu_seconds(lambda: [torch.cdist(x, y).amin(d) for d in (1, 2)]),
        }
    )  # fmt: skip
    big = sphere(1, 10_000_000)
    rows.append(
        {
            "op": "farthest_point_sample",
            "clouds": 1,
            "points": 10**7,
            "samples": 8192,
            "mmkit": cpu_seconds(lambda: farthest_point_sample(big, 8192), 2),
        }
    )
    rows.append(
        {
            "op": "choose_points (thinned first)",
            "clouds": 1,
            "points": 10**7,
            "samples": 8192,
            "mmkit": cpu_seconds(lambda: choose_points(big[0].numpy(), 8192), 2),
        }
    )
    for row in rows:
        for other in ("plain_torch", "fpsample_exact", "open3d"):
            if other in row:
                row[f"times_{other}"] = round(row[other] / row["mmkit"], 1)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    OUTPUT.write_text(json.dumps({"unit": "CPU seconds for all clouds, one thread", "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
