"""What an adapter costs: at inference (ViT-S/16 at 224 px, un-merged and merged, against the plain model) and when it is attached.

    python benchmarks/adapters.py          # writes benchmarks/results/adapters.json

Every round times plain, SSF, SSF merged, LoRA, LoRA merged and peft's own wrapper once, in turn, in process CPU time; the ratio to the
plain run of the same round is taken, and the median over rounds reported. Attaching LoRA to the 96 projections of 48 blocks is timed
against `peft.inject_adapter_in_model` on the same model.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import peft
import timm
import torch
from torch import nn

from mmkit.adapters import apply_adapter
from mmkit.backbones import create_backbone
from mmkit.storage import write_json

RESULT = Path(__file__).parent / "results" / "adapters.json"
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["qkv", "proj"], "exclude_modules": ["patch_embed.proj"]}


def variants() -> dict[str, nn.Module]:
    """The models that are compared, in eval mode."""
    plain = create_backbone("vit_small_patch16_224").eval().requires_grad_(False)
    models = {"plain": plain}
    for name, config in (("ssf", "ssf"), ("lora", peft.LoraConfig(**LORA))):
        model = copy.deepcopy(plain)
        apply_adapter(model, config)
        merged = copy.deepcopy(plain)
        apply_adapter(merged, config).merge()
        models |= {name: model, f"{name} merged": merged}
    models["lora, peft's get_peft_model"] = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**LORA)).eval()
    return models


def cpu_time(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def attach_cost(rounds: int) -> dict[str, float]:
    """CPU seconds to put LoRA on the attention of 48 blocks, ours over peft's own, interleaved; the fastest and the median round."""
    ours, theirs = [], []
    targets = ("attn.qkv", "attn.proj")
    for _ in range(rounds):
        models = [timm.create_model("vit_tiny_patch16_224", depth=48, img_size=32) for _ in range(2)]
        config = peft.LoraConfig(r=8, target_modules=list(targets))
        theirs.append(cpu_time(lambda m=models[0], c=config: peft.inject_adapter_in_model(c, m)))
        ours.append(cpu_time(lambda m=models[1]: apply_adapter(m, "lora", r=8, targets=targets)))
    found = {
        "blocks": 48,
        "peft_seconds": min(theirs),
        "ratio_fastest": min(ours) / min(theirs),
        "ratio_median": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
    }
    print(
        f"attaching to 48 blocks: {found['ratio_fastest']:.2f}x peft's own (median of rounds {found['ratio_median']:.2f}x)"
    )
    return {k: round(v, 4) for k, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models, x = variants(), torch.randn(args.batch_size, 3, 224, 224)
    ratios: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            model(x)
        for _ in range(args.rounds):
            times = {name: cpu_time(lambda m=model: m(x)) for name, model in models.items()}
            for name, seconds in times.items():
                ratios[name].append(seconds / times["plain"])
    rows = []
    for name, values in ratios.items():
        q = statistics.quantiles(values, n=4) if name != "plain" else [1.0, 1.0, 1.0]
        rows.append({"model": name, "ratio_median": round(q[1], 4), "quartiles": [round(q[0], 4), round(q[2], 4)]})
        print(f"{name:30s} {q[1]:.3f}x   (quartiles {q[0]:.3f} to {q[2]:.3f})")
    machine = {
        "python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__, "peft": peft.__version__,
        "cores": os.cpu_count(), "threads": 1,
    }  # fmt: skip
    attach = attach_cost(max(args.rounds // 2, 3))
    write_json(
        RESULT,
        {"machine": machine, "batch_size": args.batch_size, "rounds": args.rounds, "rows": rows, "attach": attach},
    )


if __name__ == "__main__":
    main()
