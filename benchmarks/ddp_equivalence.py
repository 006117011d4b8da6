"""Are two gloo processes the same as one process with the doubled batch? Compare loss curves and final weights.

Cases: all parameters; an SSF adapter on a frozen ViT; gradient accumulation; a data set that does not divide evenly; FSDP.
Rounding differs between the two (sums are split), and long full training with Adam amplifies rounding without bound: the
float32 cases are therefore short, and the long one runs in float64.
accelerate offers FSDP on GPUs only; here its state is set by hand so that the same code runs on two CPU processes.

    python benchmarks/ddp_equivalence.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
CASES: dict[str, dict[str, Any]] = {
    "full": {"adapter": False, "grad_accum": 1, "examples": 160, "lr": 2e-3},
    "ssf adapter": {"adapter": True, "grad_accum": 1, "examples": 160, "lr": 1e-2},
    "gradient accumulation": {"adapter": True, "grad_accum": 2, "examples": 160, "lr": 1e-2},
    "ragged last step": {"adapter": False, "grad_accum": 2, "examples": 157, "lr": 2e-3},
    "fsdp, ssf adapter": {"adapter": True, "grad_accum": 2, "examples": 157, "lr": 1e-2, "fsdp": True, "ema": 0.9},
    "full, float64": {"adapter": False, "grad_accum": 1, "examples": 512, "lr": 2e-3, "double": True},
}


def use_fsdp_on_cpu() -> None:
    """Make `fit` shard with FSDP version 2 although the processes have no GPU."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from mmkit.training import loop

    make = loop.make_accelerator

    def sharded(config):
        accelerator = make(config)
        accelerator.state.__dict__["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=False,
        )
        for state in (accelerator.state.__dict__, PartialState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        return accelerator

    loop.make_accelerator = sharded


def train(folder: str, batch_size: int, case: dict[str, Any]) -> None:
    """One process of a run; the main one writes its losses and final weights."""
    import timm
    from accelerate import PartialState

    from mmkit.adapters import apply_adapter
    from mmkit.data import load_digits
    from mmkit.data.transforms import ImageTransform
    from mmkit.storage import write_json, write_safetensors
    from mmkit.storage.runs import whole
    from mmkit.training import FitConfig, fit

    if case.get("fsdp") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        use_fsdp_on_cpu()
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10
    )
    adapter, transform = None, ImageTransform(32)
    if case.get("double"):
        model.double()
    if case["adapter"]:
        from mmkit.adapters.ssf import SSFConfig

        adapter = apply_adapter(model, SSFConfig(modules_to_save=("head",)))
    digits = load_digits().with_transform(lambda im: transform(im).to(next(model.parameters()).dtype))
    train_part, val_part = digits.subset(range(case["examples"])), digits.subset(range(1600, 1797))
    config = FitConfig(
        epochs=4,
        batch_size=batch_size,
        grad_accum=case["grad_accum"],
        lr=case["lr"],
        warmup_steps=3,
        ema_decay=case.get("ema"),
        restore_best=False,
        progress=False,
        device="cpu",
    )
    result = fit(model, train_part, val_part, config=config, adapter=adapter)
    parameters = dict(model.named_parameters()) if adapter is None else dict(adapter.trainable_parameters())
    parameters = {k: whole(p) for k, p in parameters.items()}
    if PartialState().is_main_process:
        write_json(Path(folder) / "losses.json", {"losses": result.losses, "metrics": result.metrics})
        write_safetensors(Path(folder) / "weights.safetensors", parameters)


def run(folder: Path, processes: int, batch_size: int, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Start one or two processes and read what they wrote."""
    from mmkit.storage import read_json, read_tensors

    folder.mkdir()
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    worker = [__file__, "--train", str(folder), "--batch-size", str(batch_size), "--case", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launcher, *worker], check=True, env=environment)
    return read_json(folder / "losses.json"), read_tensors(folder / "weights.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, default=8, help="per process in the two-process run")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train, args.batch_size, CASES[args.case])
        return
    from mmkit.storage import write_json

    rows, started = [], time.perf_counter()
    print(f"{'case':<22} {'steps':>5} {'loss: largest difference':>25} {'weights':>9} {'accuracy 1 / 2':>15}")
    with tempfile.TemporaryDirectory() as root:
        for number, name in enumerate(args.cases):
            one, w1 = run(Path(root) / f"{number}-1", 1, 2 * args.batch_size, name)
            two, w2 = run(Path(root) / f"{number}-2", 2, args.batch_size, name)
            difference = max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True))
            weights = max(float((w1[k] - w2[k]).abs().max()) for k in w1)
            scores = one["metrics"]["accuracy"], two["metrics"]["accuracy"]
            row = {"case": name, "steps": len(one["losses"]), "loss_difference": difference, "weights": weights}
            rows.append({**row, "accuracy_one": scores[0], "accuracy_two": scores[1]})
            print(
                f"{name:<22} {row['steps']:>5} {difference:>25.2e} {weights:>9.1e} {scores[0]:>7.3f} {scores[1]:>7.3f}"
            )
    worst = max(r["loss_difference"] for r in rows)
    result = {
        "largest_loss_difference": worst,
        "limit": 1e-5,
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
        "device": "cpu, gloo",
        "cores": os.cpu_count(),
        "rows": rows,
    }
    write_json(RESULTS / "ddp_equivalence.json", result)
    print(json.dumps({"largest_loss_difference": worst, "limit": 1e-5}))
    sys.exit(worst > 1e-5)


if __name__ == "__main__":
    main()
