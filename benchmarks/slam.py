"""Semantic SLAM on a drawn room with a camera's noise, its parts left out one by one, live at 640 x 480, and real recordings.

    python benchmarks/slam.py room        # the preset cpu_small, and what each part is good for
    python benchmarks/slam.py live        # the preset cpu_live at 640 x 480
    python benchmarks/slam.py real        # MMKIT_DATA_DIR: rgbd_7scenes and rgbd_tum5, beside small_gicp alone
    python benchmarks/slam.py loop        # once around the room: drift with and without closing the loop
    python benchmarks/slam.py mono        # depths of unknown scale, another in every frame, in place of a depth camera

Each row is a run of one thread, written to results/slam.json and .md as soon as it is measured; rows that are there are not run again
(`--again NAME` does so). Times are CPU seconds of the process.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmkit.pointcloud.slam import (
    HierSLAM,
    HierSLAMConfig,
    RGBDFrame,
    SemanticTree,
    Step,
    SyntheticRoom,
    evaluate,
    open_sequence,
    trajectory_figures,
)  # fmt: skip
from mmkit.storage import atomic_write, read_json, write_json

RESULTS = Path(__file__).parent / "results"
SHOWN = {  # column of the table -> figure, factor, digits
    "lost": ("lost", 1, 0), "ATE cm": ("ate_rmse", 100, 2), "end cm": ("end_error", 100, 2), "RPE mm": ("rpe_translation", 1000, 2),
    "RPE deg": ("rpe_rotation", 1, 3), "PSNR": ("psnr", 1, 2), "least": ("psnr_min", 1, 2), "SSIM": ("ssim", 1, 3),
    "depth cm": ("depth_l1", 100, 2), "mIoU": ("miou", 1, 3),
    "mIoU, level argmax": ("miou_level_argmax", 1, 3), "Gaussians": ("gaussians", 1, 0), "bytes each": ("bytes_each", 1, 0),
    "flat bytes": ("flat_bytes", 1, 0), "of flat": ("ratio", 1, 3),
    "CPU s": ("cpu_seconds", 1, 1), "tracked a second": ("tracking_fps", 1, 1), "mapped a second": ("mapping_fps", 1, 2),
    "MB": ("peak_mb", 1, 0),
}  # fmt: skip


class Recorded:
    """Frames drawn or read before the clock starts."""

    def __init__(self, sequence: Any):
        self.frames = [sequence[i] for i in range(len(sequence))]
        self.poses, self.tree = sequence.poses, sequence.tree
        self.clean: Callable[[int], RGBDFrame] | None = getattr(sequence, "clean", None)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> RGBDFrame:
        return self.frames[index]


class Timed(HierSLAM):
    """Counts the CPU seconds of mapping apart."""

    mapping, rounds = 0.0, 0

    def _map(self, present: Any) -> tuple[int, float]:
        started = time.process_time()
        out = super()._map(present)
        self.mapping += time.process_time() - started
        self.rounds += 1
        return out


def measured(
    config: HierSLAMConfig, data: Recorded, tree: SemanticTree | None, judge_every: int = 1, depth_source: Any = None
) -> dict[str, Any]:  # fmt: skip
    """One run and its figures."""
    slam = Timed(config, tree, depth_source=depth_source)
    steps: list[Step] = []
    started = time.process_time()
    first = 0.0
    for i in range(len(data)):
        steps.append(slam.step(data[i]))
        first = slam.mapping if i == 0 else first
    cpu = time.process_time() - started
    figures = evaluate(slam, data, every=judge_every, reference=data.clean, with_scale=depth_source is not None)
    tracking = max(cpu - slam.mapping, 1e-9)
    figures |= {
        "cpu_seconds": cpu, "tracking_fps": (len(data) - 1) / tracking, "mapping_fps": (slam.rounds - 1) / max(slam.mapping - first, 1e-9),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "bytes_each": 48 + 4 * slam.map.code_dim,
        "bytes": slam.bytes(), "tracker": slam.tracker, "loops": len(slam.loops), "relocalised": sum(s.relocalised for s in steps),
    }  # fmt: skip
    return figures


def plain_gicp(data: Recorded, *, voxel: float = 0.03, reach: float = 0.1) -> dict[str, Any]:
    """small_gicp by itself: constant velocity, scan to a grid of Gaussians that every frame is added to."""
    import small_gicp

    from mmkit.pointcloud.slam.gicp import scan
    from mmkit.pointcloud.slam.poses import inverse, rigid

    started = time.process_time()
    poses, grid = [torch.eye(4, dtype=torch.float64)], small_gicp.GaussianVoxelMap(0.1)
    for i in range(len(data)):
        cloud, _ = small_gicp.preprocess_points(scan(data[i], 10.0), voxel, num_neighbors=10, num_threads=1)
        if i:
            guess = poses[-1] @ inverse(poses[-2]) @ poses[-1] if i > 1 else poses[-1]
            out = small_gicp.align(
                grid, cloud, guess.numpy(), max_correspondence_distance=reach, num_threads=1, max_iterations=30
            )
            poses.append(rigid(torch.from_numpy(np.array(out.T_target_source))))
        grid.insert(cloud, poses[-1].numpy())
    cpu = time.process_time() - started
    truth = torch.stack(data.poses)
    return {**trajectory_figures(torch.stack(poses), truth), "cpu_seconds": cpu, "tracking_fps": len(data) / cpu}


def storage(tree: SemanticTree) -> dict[str, Any]:
    """Bytes of a Gaussian with a tree's code and with one number a class."""
    own = tree.storage()
    return {
        "bytes_each": own["tree_bytes"],
        "flat_bytes": own["flat_bytes"],
        "ratio": own["ratio"],
        "classes": tree.num_classes,
    }


class Table:
    """The rows so far."""

    def __init__(self, again: list[str]):
        self.path, self.again = RESULTS / "slam.json", again
        self.rows: dict[str, dict[str, Any]] = read_json(self.path) if self.path.is_file() else {}

    def row(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Measure a row unless it is there, print it, and write everything."""
        if name not in self.rows or name in self.again:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.rows[name] = run()
            write_json(self.path, self.rows)
            self._write_table()
        print(
            name,
            {
                c: f"{f * self.rows[name][k]:.{d}f}"
                for c, (k, f, d) in SHOWN.items()
                if self.rows[name].get(k) is not None
            },
            flush=True,
        )

    def _write_table(self) -> None:
        groups: dict[str, list[str]] = {}
        for name in self.rows:
            groups.setdefault(name.split(":")[0], []).append(name)
        lines = [
            "# Semantic SLAM",
            "",
            "Written by `python benchmarks/slam.py`; what each row is stands there. One thread, CPU seconds.",
            "",
        ]
        for group, names in groups.items():
            columns = [c for c, (k, _, _) in SHOWN.items() if any(self.rows[n].get(k) is not None for n in names)]
            lines += [f"## {group}", "", "| run | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
            for n in names:
                cells = [self._cell(n, *SHOWN[c]) for c in columns]
                lines.append(f"| {n.partition(': ')[2]} | " + " | ".join(cells) + " |")
            lines.append("")
        with atomic_write(RESULTS / "slam.md") as temporary:
            temporary.write_text("\n".join(lines), encoding="utf-8")

    def _cell(self, name: str, key: str, factor: float, digits: int) -> str:
        value = self.rows[name].get(key)
        return "–" if value is None else f"{factor * value:.{digits}f}"


def room(table: Table) -> None:
    """cpu_small with noise, seed 0, and without each part."""
    for name in ("replica", "scannet", "scannet_large"):
        table.row(f"storage by published tree: {name}", lambda name=name: storage(SemanticTree.shape_like(name)))
    data = Recorded(SyntheticRoom(frames=40))
    tree = data.tree
    assert isinstance(tree, SemanticTree)
    shuffled = SemanticTree.random(24, 3, seed=5)
    runs: list[tuple[str, dict[str, Any], SemanticTree]] = [
        ("cpu_small", {}, tree),
        (
            "tracker photometric, 40 steps",
            {"tracker": "photometric", "track_iters": 40, "lr_rotation": 1e-3, "lr_translation": 2e-3},
            tree,
        ),
        ("tracker gicp alone, no photometric steps", {"refine_iters": 0}, tree),
        ("constant velocity only", {"tracker": "constant"}, tree),
        ("true poses", {"tracker": "given"}, tree),
        ("flat code, one number a class", {"semantics": "flat"}, tree),
        ("no leaf loss", {"leaf_weight": 0.0}, tree),
        ("random paths", {}, shuffled),
        ("no labels", {"semantics": "none"}, tree),
    ]
    for name, changes, own in runs:
        table.row(
            f"drawn room: {name}",
            lambda changes=changes, own=own: measured(HierSLAMConfig.preset("cpu_small", **changes), data, own),
        )
    many = Recorded(SyntheticRoom(frames=40, num_classes=60, objects=54))
    for name, kind in (("60 classes in 4 levels, true poses", "tree"), ("60 classes, flat code, true poses", "flat")):
        config = HierSLAMConfig.preset("cpu_small", tracker="given", semantics=kind)
        table.row(f"drawn room: {name}", lambda config=config: measured(config, many, many.tree))


def live(table: Table) -> None:
    """cpu_live: frames of 640 x 480, mapped at a quarter of that."""
    data = Recorded(SyntheticRoom(frames=40, width=640, height=480))
    table.row(
        "640 x 480: cpu_live", lambda: measured(HierSLAMConfig.preset("cpu_live"), data, data.tree, judge_every=4)
    )
    table.row(
        "640 x 480: cpu_small", lambda: measured(HierSLAMConfig.preset("cpu_small"), data, data.tree, judge_every=4)
    )


def real(table: Table) -> None:
    """Recordings without labels; cpu_small as it is."""
    folder = Path(os.environ.get("MMKIT_DATA_DIR", "../shared/data")).expanduser()
    data = Recorded(open_sequence(folder / "rgbd_7scenes"))
    table.row("7-Scenes, 120 frames: small_gicp alone", lambda: plain_gicp(data))
    for name, preset, changes in (
        ("cpu_small", "cpu_small", {}), ("cpu_live", "cpu_live", {}),
    ):  # fmt: skip
        config = HierSLAMConfig.preset(preset, **changes)
        table.row(f"7-Scenes, 120 frames: {name}", lambda config=config: measured(config, data, None, judge_every=3))
    few = Recorded(open_sequence(folder / "rgbd_tum5"))
    wide = HierSLAMConfig.preset("cpu_small", map_every=1, keyframe_every=1, scan_every=1)
    table.row("TUM-like, 5 frames far apart: cpu_small, every frame mapped", lambda: measured(wide, few, None))


def loop(table: Table) -> None:
    """Once around the room in steps of 2.5 degrees.

    Before bare walls geometry slides; the picture holds it. Closing the loop mends the end of the path, not its middle.
    """
    data = Recorded(SyntheticRoom(frames=150, speed=2.0, width=96, height=72))
    base = {"map_iters": 10, "semantics": "none", "keyframe_every": 5, "map_every": 5}
    steps = {"refine_iters": 15, "refine_lr_rotation": 1e-4, "refine_lr_translation": 2e-3}
    for name, changes in (
        ("15 photometric steps a frame, closed", {**steps, "loop_closure": True}), ("15 photometric steps a frame, left open", steps),
        ("geometry alone, left open", {"refine_iters": 0}),
    ):  # fmt: skip
        config = HierSLAMConfig.preset("cpu_small", **base, **changes)
        table.row(f"once around the room: {name}", lambda config=config: measured(config, data, None, judge_every=5))


def mono(table: Table) -> None:
    """Clean depths times a random factor of 0.7 to 1.4 a frame: what a monocular estimator gives at best; aligned to the map."""
    data = Recorded(SyntheticRoom(frames=24))
    rng = np.random.default_rng(0)
    factors = [1.0, *rng.uniform(0.7, 1.4, len(data) - 1)]
    far = [SyntheticRoom(frames=24).clean(i).depth * factors[i] for i in range(len(data))]

    def run() -> dict[str, Any]:
        order = iter(far)
        return measured(HierSLAMConfig.preset("cpu_small"), data, data.tree, depth_source=lambda color, K: next(order))

    table.row("depths of unknown scale, 24 frames: cpu_small, aligned to the map", run)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"room": room, "live": live, "real": real, "loop": loop, "mono": mono}
    parser.add_argument("part", nargs="*", choices=[*parts, []], help="which; all when left out")
    parser.add_argument("--again", action="append", default=[], help="a row to measure again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(arguments.again)
    for name in arguments.part or parts:
        parts[name](table)


if __name__ == "__main__":
    main()
