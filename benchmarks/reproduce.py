"""Do the manifest's commands make the bundled files? Each is run in a copy of this checkout, and its file compared with ours.

    python benchmarks/reproduce.py --data DIR point_shapes piip_nuclei
    python benchmarks/reproduce.py --data DIR --twice point_shapes   # and once more: is it the same file again?
    python benchmarks/reproduce.py --data DIR --work runs/again clicknet-photo   # keeps its copies: called again, it goes on
    python benchmarks/reproduce.py --data DIR              # all of them: many hours

On the machine that made a file the same command gives the same bytes ("same"; "same again": of two runs here). Another CPU rounds sums in
another order; from there on a training goes its own way, and what must agree is the score: as a rule it lies inside the
95 % range of benchmarks/results/defaults.md. Writes benchmarks/results/reproduce.json; rows of other names stay.
"""

from __future__ import annotations

import argparse
import contextlib
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
ROOMS = ("vision", "diffusion", "video", "pointcloud", "apps")


def rerun(entries: list[WeightEntry], data: Path, folder: Path, twice: bool) -> dict[str, dict[str, Any]]:
    """Run the command of `entries`, which is one, in a copy of the checkout below `folder`; compare each file. `twice`: in two copies."""
    scores, minutes = make(entries, data, folder / "one")
    rows = {}
    for entry in entries:
        made = folder / "one/mmkit/weights" / entry.file
        rows[entry.name] = {
            "same": sha256_file(made) == entry.sha256,
            "difference": round(difference(entry.path, made), 6),
            "score": scores[entry.name],
            "score of the bundled file": entry.score,
            "cpu_minutes": round(minutes, 1),
            "machine": {"processor": processor(), "torch": torch.__version__},
        }
    if twice:
        make(entries, data, folder / "two")
        for entry in entries:
            one, two = (sha256_file(folder / copy / "mmkit/weights" / entry.file) for copy in ("one", "two"))
            rows[entry.name]["same again"] = one == two
    return rows


def make(entries: list[WeightEntry], data: Path, folder: Path) -> tuple[dict[str, dict[str, Any]], float]:
    """Run the command in `folder`; the scores it writes into the manifest there, by name, and its CPU minutes in all calls."""
    if not (folder / "copied").is_file():
        copy_checkout(folder, data, [entry.file for entry in entries])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(folder), "PATH": path, "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = subprocess.run(entries[0].command, shell=True, cwd=folder, env=env).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60
    minutes += float((folder / "copied").read_text())
    (folder / "copied").write_text(str(minutes))
    missing = [entry.file for entry in entries if not (folder / "mmkit/weights" / entry.file).is_file()]
    if code or missing:
        raise SystemExit(f"{entries[0].command!r} ended with {code}; not made: {', '.join(missing) or 'nothing'}.")
    rows = json.loads((folder / "mmkit/weights/manifest.json").read_text())
    wanted = {entry.name for entry in entries}
    return {row["name"]: row["score"] for row in rows if row["name"] in wanted}, minutes


def copy_checkout(folder: Path, data: Path, without: list[str]) -> None:
    """Copy what git knows into `folder`, less the weights that are to be made; "copied" says that it is whole."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, files.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    for name, target in {f"mmkit/{room}": folder / room for room in ROOMS}.items() | {("data", data)}:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target.resolve())
    for name in without:
        (folder / "mmkit/weights" / name).unlink()
    (folder / "copied").write_text("0")


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
    parser.add_argument(
        "--work", type=Path, help="where the copies are made and stay, so that an interrupted call goes on"
    )
    args = parser.parse_args()
    commands: dict[str, list[WeightEntry]] = {}
    for name in args.names or list_weights():  # a command that makes two files runs once for both
        commands.setdefault(weight_entry(name).command, []).append(weight_entry(name))
    for entries in commands.values():
        with contextlib.nullcontext(args.work) if args.work else tempfile.TemporaryDirectory() as folder:
            rows = rerun(entries, args.data, Path(folder).resolve() / entries[0].name, args.twice)
        print(rows, flush=True)
        found = read_json(RESULTS) if RESULTS.is_file() else {}
        write_json(RESULTS, {**found, **rows})


if __name__ == "__main__":
    main()
