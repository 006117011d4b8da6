"""Do the manifest's commands make the bundled files? Each is run in a copy of this checkout, and its file compared with ours.

    python benchmarks/reproduce.py --data DIR point_shapes piip_nuclei
    python benchmarks/reproduce.py --data DIR --twice point_shapes   # and once more: is it the same file again?
    python benchmarks/reproduce.py --data DIR              # all of them: many hours

On the machine that made a file the same command gives the same bytes ("same"; "same again": of two runs here). Another CPU rounds sums in
another order; from there on a training goes its own way, and what must agree is the score: as a rule it lies inside the
95 % range of benchmarks/results/defaults.md. Writes benchmarks/results/reproduce.json; rows of other names stay.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mmkit.storage import read_json, read_tensors, sha256_file, write_json
from mmkit.weights import WeightEntry, list_weights, weight_entry

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/reproduce.json"


def rerun(entry: WeightEntry, data: Path, folder: Path, twice: bool) -> dict[str, Any]:
    """Run the entry's command in a copy of the checkout below `folder`, and compare; `twice`: in two copies."""
    made, score, minutes = make(entry, data, folder / "one")
    row = {
        "same": sha256_file(made) == entry.sha256,
        "difference": round(difference(entry.path, made), 6),
        "score": score,
        "score of the bundled file": entry.score,
        "cpu_minutes": round(minutes, 1),
        "machine": {"processor": processor(), "torch": torch.__version__},
    }
    if twice:
        row["same again"] = sha256_file(make(entry, data, folder / "two")[0]) == sha256_file(made)
    return row


def make(entry: WeightEntry, data: Path, folder: Path) -> tuple[Path, dict[str, Any], float]:
    """The file that the command makes, the score it writes into the manifest, and its CPU minutes."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, files.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    for room in ("vision", "diffusion", "video", "pointcloud", "apps"):
        (folder / "mmkit" / room).symlink_to(folder / room)
    (folder / "data").symlink_to(data.resolve())
    made = folder / "mmkit/weights" / entry.file
    made.unlink()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(folder), "PATH": path, "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = subprocess.run(entry.command, shell=True, cwd=folder, env=env).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60
    if code or not made.is_file():
        raise SystemExit(f"{entry.command!r} ended with {code} and made no {made.name}.")
    rows = json.loads((folder / "mmkit/weights/manifest.json").read_text())
    return made, next(row["score"] for row in rows if row["name"] == entry.name), minutes


def difference(one: Path, other: Path) -> float:
    """Length of the difference of all floating tensors over the length of the first."""
    first, second = (read_tensors(path, allow_pickle_format=False) for path in (one, other))
    if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in second.items()}:
        return float("inf")
    pairs = [(v.double(), second[k].double()) for k, v in first.items() if v.is_floating_point()]
    apart = sum(float((a - b).square().sum()) for a, b in pairs)
    return (apart / max(sum(float(a.square().sum()) for a, _ in pairs), 1e-12)) ** 0.5


def processor() -> str:
    """Its name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="bundled weights; default all")
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets, `data` in the commands")
    parser.add_argument(
        "--twice", action="store_true", help="run each command two times: the same bytes on this machine?"
    )
    args = parser.parse_args()
    for name in args.names or list_weights():
        with tempfile.TemporaryDirectory() as folder:
            row = rerun(weight_entry(name), args.data, Path(folder), args.twice)
        print(name, row, flush=True)
        found = read_json(RESULTS) if RESULTS.is_file() else {}
        write_json(RESULTS, {**found, name: row})


if __name__ == "__main__":
    main()
