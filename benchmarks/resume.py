"""Does training survive kill -9? Kill a training process, start it again, compare with a run that was left alone.

Two kinds of runs: `fit` on a small network with dropout, batch norm, moving average, gradient accumulation and random
augmentation; and the command `mmkit finetune` on a folder of pictures. They are killed at random moments, every other one inside
the writing of a checkpoint, some commands inside the writing of the result. The comparison is bit for bit: all tensors of the
last checkpoint (weights, best weights, statistics, optimiser, the loss of every step), the logs, and for the command
every file of the result. Nothing hidden may be left.

    python benchmarks/resume.py --runs 20
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
MOMENTS = ("step", "checkpoint", "step", "result")
"""When the runs are killed, in turn: after a random step, while a checkpoint or the result is being written."""
PASSING = {"seconds", "run"}
"""What differs between two runs of the same."""


class Jittered:
    """Digits with random shifts and noise from all three random generators."""

    def __init__(self, data: list[tuple[Tensor, int]]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import numpy as np

        image, label = self.data[index]
        image = torch.roll(image, (random.randint(-1, 1), int(np.random.randint(-1, 2))), (1, 2))
        return image + 0.1 * torch.randn_like(image), label


def train(folder: str, steps: int) -> None:
    """What a training process of the first kind does."""
    from sklearn.datasets import load_digits

    from mmkit.training import FitConfig, fit

    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32)[:, None] / 16
    data = [(image, int(label)) for image, label in zip(images, source.target, strict=True)][:600]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    config = FitConfig(
        max_steps=steps,
        batch_size=16,
        lr=3e-3,
        warmup_steps=5,
        grad_accum=2,
        checkpoint_every=3,
        ema_decay=0.9,
        progress=False,
        device="cpu",
    )
    fit(model, Jittered(data[:480]), data[480:], config=config, output_dir=folder)


def fit_command(folder: Path, steps: int) -> list[str]:
    """The command line of a run of the first kind."""
    return [sys.executable, __file__, "--train", str(folder / "training"), "--steps", str(steps)]


def finetune_command(folder: Path, steps: int, data: Path) -> list[str]:
    """The command line of a run of the second kind: five steps are an epoch."""
    options = [
        "--backbone",
        "tiny_vit",
        "--adapter",
        "ssf",
        "--batch-size",
        "16",
        "--augment",
        "--epochs",
        str(steps // 5),
        "--seed",
        "3",
    ]
    return [sys.executable, "-m", "mmkit.cli", "finetune", "--data", str(data), "--output", str(folder), *options]


def write_pictures(folder: Path) -> Path:
    """A data set of 96 digits, one sub-folder per class: 77 to train on, 19 held back."""
    from PIL import Image

    from mmkit.data import load_digits

    digits = load_digits((0, 1, 2))
    for i in range(96):
        place = folder / digits.class_names[digits.labels[i]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[i]).save(place / f"{i:03d}.png")
    return folder


# ----------------------------------------------------------------------------------------------------------- one run


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a training process, quietly."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def steps_done(folder: Path) -> int:
    """How many steps the log of a run shows."""
    log = folder / "training" / "log.csv"
    return max(log.read_bytes().count(b"\n") - 1, 0) if log.exists() else 0


def reached(moment: str, folder: Path, step: int) -> bool:
    """Whether a process is where it is to be killed."""
    if moment == "result":
        return any(p.is_dir() for p in folder.parent.glob(".mmkit-*.tmp"))
    if steps_done(folder) < step:
        return False
    return moment == "step" or any((folder / "training" / "checkpoints").glob(".step_*"))


def killed_run(command: list[str], folder: Path, moment: str, step: int, delay: float) -> dict[str, Any]:
    """Run, kill -9 `delay` seconds after the `moment` at or after `step`, run again; returns where it was killed."""
    from mmkit.storage.runs import list_checkpoints

    for _ in range(5):
        process = start(command)
        while process.poll() is None and not reached(moment, folder, step):
            time.sleep(0.0005)
        time.sleep(delay)
        process.kill()
        code = process.wait()
        if code == -signal.SIGKILL:
            break
        shutil.rmtree(folder)  # the moment was missed on a busy machine: try again
    assert code == -signal.SIGKILL, f"the run ended by itself (exit {code}) five times before it was killed"
    saved = list_checkpoints(folder / "training" / "checkpoints") if folder.exists() else []
    half = [p for place in (folder.parent, folder) for p in place.rglob(".*") if p.name != ".mmkit.lock"]
    row = {
        "moment": moment,
        "killed_at": steps_done(folder),
        "half_written": len(half),
        "resumed_from": int(saved[-1].name[5:]) if saved else 0,
    }
    again = start(command)
    _, told = again.communicate()
    assert again.returncode == 0, f"the resumed run failed: {told.decode()[-2000:]}"
    return row


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run produced: tensors by file and name, JSON and CSV by file."""
    from mmkit.storage import read_json, read_tensors
    from mmkit.storage.runs import newest_checkpoint

    found = newest_checkpoint(folder / "training")
    assert found is not None, f"no checkpoint in {folder}"
    path, state, tensors = found
    assert state["progress"]["stopped"] == "finished", f"{path} is not the end of the run"
    everything: dict[str, Any] = {
        f"{stem}:{key}": value for stem, group in tensors.items() for key, value in group.items()
    }
    everything |= {p.name: p.read_text() for p in (folder / "training").glob("*.csv")}
    for file in (p for p in folder.glob("*") if p.is_file() and p.name != "mmkit.json"):
        if file.suffix == ".safetensors":
            everything |= {f"{file.name}:{key}": value for key, value in read_tensors(file).items()}
        elif file.suffix == ".json":  # report.html and run.toml say the same in other words, and where it lies
            everything[file.name] = {k: v for k, v in read_json(file).items() if k not in PASSING}
    hidden = [str(p) for p in folder.rglob(".*")]
    assert not hidden, f"left behind: {hidden}"
    return everything


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Bit for bit."""

    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else json.dumps(a) == json.dumps(b)

    return found.keys() == expected.keys() and all(equal(found[k], expected[k]) for k in expected)


def compare(
    command: Callable[[Path], list[str]], moments: tuple[str, ...], runs: int, steps: int, seed: int
) -> dict[str, Any]:
    """Kill and resume `runs` runs and compare each with one that was left alone."""
    rng, rows = random.Random(seed), []
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root) / "whole" / "run"
        process = start(command(whole))
        _, told = process.communicate()
        assert process.returncode == 0, told.decode()[-2000:]
        expected = outcome(whole)
        print(f"{'run':>4} {'moment':>11} {'killed at':>10} {'half-written':>13} {'resumed from':>13}  bit-equal")
        for run in range(runs):
            folder, moment = Path(root) / f"{run}" / "run", moments[run % len(moments)]
            delay = rng.uniform(0, 0.03 if moment == "step" else 0.004)
            row = killed_run(command(folder), folder, moment, rng.randint(1, steps - 6), delay)
            row["bit_equal"] = same(outcome(folder), expected)
            print(
                f"{run:>4} {moment:>11} {row['killed_at']:>10} {row['half_written']:>13} {row['resumed_from']:>13}  "
                f"{row['bit_equal']}",
                flush=True,
            )
            rows.append(row)
    equal = sum(r["bit_equal"] for r in rows)
    print(
        f"{equal} of {runs} killed and resumed runs are bit-equal to the one left alone ({len(expected)} things compared).\n"
    )
    return {"runs": runs, "bit_equal": equal, "steps": steps, "compared": len(expected), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="how many runs of each kind to kill")
    parser.add_argument("--only", choices=("fit", "finetune"), help="one kind")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train, args.steps)
        return
    results = []
    if args.only != "finetune":
        print("fit")
        command = functools.partial(fit_command, steps=args.steps)
        results.append(record("fit", compare(command, MOMENTS[:2], args.runs, args.steps, args.seed)))
    if args.only != "fit":
        print("mmkit finetune")
        with tempfile.TemporaryDirectory() as folder:
            command = functools.partial(finetune_command, steps=args.steps, data=write_pictures(Path(folder) / "data"))
            results.append(record("mmkit finetune", compare(command, MOMENTS, args.runs, args.steps, args.seed)))
    sys.exit(any(r["bit_equal"] != r["runs"] for r in results))


def record(kind: str, result: dict[str, Any]) -> dict[str, Any]:
    """Write the result of one kind of runs beside those of the other."""
    from mmkit.storage import read_json, write_json

    file = RESULTS / "resume.json"
    machine = {"torch": torch.__version__, "device": "cpu", "cores": os.cpu_count()}
    found = read_json(file) if file.exists() else {}
    write_json(file, {k: found[k] for k in ("fit", "mmkit finetune") if k in found} | {kind: result | machine})
    return result


if __name__ == "__main__":
    main()
