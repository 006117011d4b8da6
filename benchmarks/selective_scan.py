"""The selective scan against the plain loop, mambapy's parallel scan and transformers' slow path: time and memory.

    python benchmarks/selective_scan.py                     # CPU time of one process, runs interleaved, best of --repeats
    python benchmarks/selective_scan.py --device cuda       # mamba-ssm's kernel against the chunked torch version

Forward plus backward of the bare recurrence (u, dt, A, B, C), batch 1, N = 16. transformers' mixer is compared with our Mamba block
of the same sizes, since its scan cannot be called alone. mambapy is optional (`pip install mambapy`).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkit.ops import Mamba, selective_scan
from mmkit.storage import write_json

RESULTS = Path(__file__).parent / "results" / "selective_scan.json"
N = 16


def inputs(length: int, dim: int, device: str = "cpu") -> list[Tensor]:
    """u, dt, A, B, C with gradients."""
    make = torch.Generator().manual_seed(0)
    u, dt = (torch.randn(1, dim, length, generator=make) for _ in range(2))
    B, C = (torch.randn(1, N, length, generator=make) for _ in range(2))
    A = -torch.arange(1.0, N + 1).repeat(dim, 1)
    tensors = [u, torch.nn.functional.softplus(dt - 3), A, B, C]
    return [t.to(device).requires_grad_() for t in tensors]


def run_scan(tensors: list[Tensor], backend: str) -> None:
    """Forward and backward of one of our backends."""
    selective_scan(*tensors, backend=backend).sum().backward()


def run_pscan(tensors: list[Tensor]) -> None:
    """Forward and backward of mambapy's parallel scan."""
    from mambapy.pscan import pscan

    u, dt, A, B, C = tensors
    decay = torch.exp(dt.transpose(1, 2).unsqueeze(-1) * A)
    states = pscan(decay, (dt * u).transpose(1, 2).unsqueeze(-1) * B.transpose(1, 2).unsqueeze(2))
    (states @ C.transpose(1, 2).unsqueeze(-1)).sum().backward()


def mixers(length: int, dim: int) -> dict[str, Callable[[], None]]:
    """transformers' Mamba mixer on its slow path, and our block with the same weights."""
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

    block = Mamba(dim // 2)
    config = MambaConfig(hidden_size=dim // 2, state_size=N, num_hidden_layers=1, use_bias=False)
    mixer = MambaMixer(config, layer_idx=0)
    mixer.load_state_dict(block.state_dict())
    x = torch.randn(1, length, dim // 2)
    torch.testing.assert_close(block(x), mixer(x), atol=1e-4, rtol=1e-3)
    return {
        "our block": lambda: block(x).sum().backward(),
        "transformers mixer": lambda: mixer(x).sum().backward(),
    }


def best_times(jobs: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, float]:
    """Milliseconds per job, interleaved, best of `repeats` (slow jobs run once): CPU time, or wall time on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    best = dict.fromkeys(jobs, float("inf"))
    for turn in range(repeats):
        for name, job in jobs.items():
            if turn and best[name] > 1000:
                continue
            start = clock()
            job()
            if device != "cpu":
                torch.cuda.synchronize()
            best[name] = min(best[name], 1000 * (clock() - start))
    return {k: round(v, 3) for k, v in best.items()}


def peak_memory(backend: str, length: int, dim: int) -> float:
    """MB that forward and backward add to the peak of a fresh process (Linux)."""
    command = [sys.executable, __file__, "--memory-of", backend, "--lengths", str(length), "--dims", str(dim)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def measure_memory(backend: str, length: int, dim: int) -> None:
    """Child process: warm up on a short sequence, reset the peak counter, run once, print the growth in MB."""
    torch.set_num_threads(1)
    run = run_pscan if backend == "mambapy pscan" else lambda t: run_scan(t, backend)
    run(inputs(64, dim))
    tensors = inputs(length, dim)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run(tensors)
    gradients = sum(t.grad.numel() * 4 for t in tensors if t.grad is not None) / 2**20
    print(_resident("VmHWM") - before - gradients)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rows."""
    backends = ["cpu", "torch", "reference"] if args.device == "cpu" else ["cuda", "torch"]
    rows = []
    for length in args.lengths:
        for dim in args.dims:
            tensors = inputs(length, dim, args.device)
            jobs: dict[str, Callable[[], None]] = {b: partial(run_scan, tensors, b) for b in backends}
            if args.device == "cpu":
                if args.pscan:
                    jobs["mambapy pscan"] = partial(run_pscan, tensors)
                if length * dim <= args.mixer_limit:
                    jobs |= mixers(length, dim)
            run_scan(tensors, backends[0])  # compile outside the clock
            row = {"length": length, "dim": dim, "ms": best_times(jobs, args.repeats, args.device)}
            first = row["ms"][backends[0]]
            row["times_slower"] = {k: round(v / first, 1) for k, v in row["ms"].items() if "our" not in k}
            if "our block" in row["ms"]:
                slower = row["ms"]["transformers mixer"] / row["ms"]["our block"]
                row["times_slower"]["transformers mixer"] = round(slower, 1)
            rows.append(row)
            print(
                f"L {length:6d} D {dim:4d}  " + "  ".join(f"{k} {v:.1f} ms" for k, v in row["ms"].items()), flush=True
            )
            print(" " * 16 + "  ".join(f"{k} x{v}" for k, v in row["times_slower"].items()), flush=True)
    memory = {}
    if args.device == "cpu" and Path("/proc/self/clear_refs").exists():
        size = (max(args.lengths), max(args.dims))
        names = [*backends, *(["mambapy pscan"] if args.pscan else [])]
        memory = {"length": size[0], "dim": size[1], "mb": {n: round(peak_memory(n, *size), 1) for n in names}}
        print("extra memory, MB:", memory["mb"])
    return {"rows": rows, "memory": memory}


def main() -> None:
    """Measure, print, write `benchmarks/results/selective_scan.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--mixer-limit", type=int, default=1024 * 32, help="largest L*D for transformers' mixer")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.lengths = args.lengths or ([256, 1024, 4096] if args.device == "cpu" else [4096, 16384, 65536])
    if args.memory_of:
        measure_memory(args.memory_of, args.lengths[0], args.dims[0])
        return
    torch.set_num_threads(args.threads)
    try:
        import mambapy.pscan  # noqa: F401

        args.pscan = True
    except ImportError:
        args.pscan = False
        print("mambapy is not installed: its column is left out.")
    result = measure(args)
    result["setting"] = {
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "threads": args.threads,
        "clock": "process CPU time" if args.device == "cpu" else "wall time",
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    out = RESULTS if args.device == "cpu" else RESULTS.with_name("selective_scan_cuda.json")
    write_json(out, result)
    print(json.dumps(result["setting"]), "->", out)


if __name__ == "__main__":
    main()
