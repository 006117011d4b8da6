"""Does training survive kill -9? Kill a training process at a random step, resume it, compare with an uninterrupted run.

The comparison is bit for bit: trained weights, running statistics, best weights, optimiser state and the loss of every step.
The small network has dropout, batch norm and random augmentation, so every random stream matters.

    python benchmarks/resume.py --runs 20
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"


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


def train(folder: str, steps: int, stop_file: str = "") -> None:
    """One training process; after each step it writes the step number to `stop_file`."""
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

    def note(info) -> None:
        if stop_file:
            Path(stop_file).write_text(str(info.step))
        time.sleep(0.01)  # so that kills fall on all places of a step, checkpoint writing included

    fit(model, Jittered(data[:480]), data[480:], config=config, output_dir=folder, on_step=note)


def final_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of the last checkpoint, prefixed with their file."""
    from mmkit.storage.runs import newest_checkpoint

    found = newest_checkpoint(folder / "checkpoints")
    assert found is not None, f"no checkpoint in {folder}"
    path, state, tensors = found
    assert state["progress"]["stopped"] == "finished", f"{path} is not the end of the run"
    return {f"{stem}:{key}": value for stem, group in tensors.items() for key, value in group.items()}


def _start(folder: Path, steps: int, note: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--train", str(folder), "--steps", str(steps), "--note", str(note)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def killed_run(folder: Path, steps: int, kill_at: int, delay: float) -> tuple[int, int]:
    """Run, kill -9 `delay` seconds after step `kill_at`, run again; returns (step seen when killed, step resumed from)."""
    from mmkit.storage.runs import list_checkpoints

    note = folder.with_suffix(".step")
    process = _start(folder, steps, note)
    while process.poll() is None:
        text = note.read_text() if note.exists() else ""
        if text and int(text) >= kill_at:
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    code = process.wait()
    assert code == -signal.SIGKILL, f"the run ended by itself (exit {code}) before it was killed"
    killed = int(note.read_text() or kill_at)
    saved = list_checkpoints(folder / "checkpoints")
    resumed = int(saved[-1].name[5:]) if saved else 0
    again = _start(folder, steps, note)
    assert again.wait() == 0, "the resumed run failed"
    return killed, resumed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="how many runs to kill")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--note", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train, args.steps, args.note)
        return
    from mmkit.storage import write_json

    rng, rows, started = random.Random(args.seed), [], time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root) / "whole"
        assert _start(whole, args.steps, Path(root) / "whole.step").wait() == 0
        expected = final_state(whole)
        print(f"{'run':>4} {'killed at':>10} {'resumed from':>13} {'tensors':>8}  bit-equal")
        for run in range(args.runs):
            folder = Path(root) / f"run{run}"
            kill_at, delay = rng.randint(1, args.steps - 3), rng.uniform(0, 0.03)
            killed, resumed = killed_run(folder, args.steps, kill_at, delay)
            found = final_state(folder)
            same = found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
            print(f"{run:>4} {killed:>10} {resumed:>13} {len(found):>8}  {same}", flush=True)
            rows.append({"killed_at": killed, "resumed_from": resumed, "bit_equal": same})
    result = {
        "runs": len(rows),
        "bit_equal": sum(r["bit_equal"] for r in rows),
        "steps": args.steps,
        "tensors_compared": len(expected),
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
        "device": "cpu",
        "cores": os.cpu_count(),
        "rows": rows,
    }
    write_json(RESULTS / "resume.json", result)
    print(f"{result['bit_equal']} of {result['runs']} resumed runs are bit-equal to the uninterrupted one.")
    sys.exit(result["bit_equal"] != result["runs"])


if __name__ == "__main__":
    main()
