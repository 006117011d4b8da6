"""Follow README from top to bottom as somebody who has only just cloned it: `python benchmarks/newcomer.py [--python python3.12]`.

A fresh clone, a fresh environment, every command and every block of Python in their order and without an edit, in a folder with a
few photographs. Needs what README needs: git, make, Python, and a package index; 8 GB of disk while it runs.
Writes results/newcomer.json: how long each step took, by the wall.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```(sh|python)\n(.*?)```", re.S)


def photographs(folder: Path) -> None:
    """`photos/` with two classes, and `photo.jpg`."""
    for name, shade in (("cat", 60), ("dog", 180)):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(8):
            noise = Image.effect_noise((96, 96), 40).point(lambda v, s=shade: (v + s) // 2)
            noise.convert("RGB").save(folder / "photos" / name / f"{i}.png")
    Image.open(folder / "photos" / "dog" / "0.png").save(folder / "photo.jpg")


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """One command; what it printed is shown when it fails."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")


def open_studio(clone: Path, environment: dict[str, str]) -> None:
    """`make demo` until the studio answers; then it is ended."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with tempfile.TemporaryFile() as said:
        served = subprocess.Popen(
            ["make", "demo"], cwd=clone, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            for _ in range(1800):
                time.sleep(1)
                if served.poll() is not None:
                    said.seek(0)
                    sys.exit(f"make demo ended: {said.read()[-4000:].decode()}")
                try:
                    with direct.open("http://127.0.0.1:7860/healthz", timeout=5) as answer:
                        assert json.load(answer) == {"status": "ok"}
                        return
                except OSError:
                    continue
            sys.exit("make demo did not answer within half an hour.")
        finally:
            if served.poll() is None:
                os.killpg(served.pid, signal.SIGTERM)  # a job in the background may not hear Ctrl-C
                served.wait(60)


def megabytes(environment: Path) -> dict[str, int]:
    """Of the whole environment, of torch with CUDA's libraries, and of what the domains read their files with."""
    (site,) = environment.glob("lib/python*/site-packages")
    size = {
        entry.name: sum(f.stat().st_size for f in entry.rglob("*") if f.is_file() and not f.is_symlink()) / 1e6
        for entry in site.iterdir()
        if entry.is_dir()
    }
    readers = ("av", "av.libs", "nibabel", "h5py", "h5py.libs", "laspy", "lazrs", "trimesh", "matplotlib", "sklearn")
    parts = {"torch and CUDA": ("torch", "nvidia", "triton"), "readers and charts": readers}
    sums = {name: sum(size.get(key, 0.0) for key in keys) for name, keys in parts.items()}
    return {name: round(value) for name, value in {"all": sum(size.values()), **sums}.items()}


def steps(text: str) -> Iterator[tuple[str, str]]:
    """(language, command or program) of the blocks of README."""
    for language, block in BLOCK.findall(text):
        if language == "python":
            yield language, block
            continue
        for line in block.splitlines():
            if words := shlex.split(line, comments=True):
                yield language, shlex.join(words)


def main() -> None:
    """Clone, install, follow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the fresh environment")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/newcomer.json")
    args = parser.parse_args()
    took: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="mmkit-newcomer-") as place:
        clone, desk = Path(place) / "mmkit", Path(place) / "desk"
        desk.mkdir()
        photographs(desk)
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "MMKIT_DATA_DIR")}
        environment = {**kept, "PYTHON": args.python, "HOME": place, "NUMBA_CACHE_DIR": f"{place}/numba"}
        environment["PATH"] = f"{clone}/.venv/bin:{kept['PATH']}"
        started = time.monotonic()
        run(["git", "clone", "--quiet", str(ROOT), str(clone)], desk, environment)
        for number, (language, what) in enumerate(steps((clone / "README.md").read_text(encoding="utf-8"))):
            before = time.monotonic()
            if what == "make demo":
                open_studio(clone, environment)
            elif language == "python":
                (desk / "block.py").write_text(what, encoding="utf-8")
                run(["python", "block.py"], desk, environment)
            else:
                run(shlex.split(what), clone if what.startswith("make ") else desk, environment)
            name = what if language == "sh" else f"block {number}: {what.splitlines()[-1].split('  #')[0]}"
            took[name] = round(time.monotonic() - before, 1)
            print(f"{took[name]:7.1f} s  {name}", flush=True)
        version = subprocess.run(["python", "-V"], env=environment, capture_output=True, text=True, check=True).stdout
        found = {"python": version.split()[1], "wall_seconds": round(time.monotonic() - started, 1), "steps": took}
        found["megabytes"] = megabytes(clone / ".venv")
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{found['wall_seconds']} s in all")


if __name__ == "__main__":
    main()
