"""PIIP: what detail costs, what it brings for small objects, DINOv3 branches at full size, and the sampling kernel.

    python benchmarks/piip.py cost     # a TSB pyramid beside the large model alone, a classic pyramid and a windowed model
    python benchmarks/piip.py small    # nuclei of ten pixels in large pictures, every model at the same compute, 3 seeds
    python benchmarks/piip.py dinov3   # DINOv3 small, base and large as branches, each beside itself alone
    python benchmarks/piip.py op       # the Numba kernel beside grid_sample

Times are process CPU seconds on one thread, interleaved within one run, and wall seconds on two threads; "cost" reports the fastest turn.
"small" goes on where it stopped: finished runs are kept. All its models start from the bundled `tiny_vit`, see the same pictures in the
same order, and spend the same multiply-adds in training. Tables are written to `results/piip.json` and `results/piip.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mmkit import FitConfig, apply_adapter, create_backbone, fit, save_adapter
from mmkit.ops import deformable_grid_attention
from mmkit.storage import write_json
from mmkit.vision.medical import nuclei_cases
from mmkit.vision.piip import PIIP, BranchConfig, PIIPConfig, branch_flops, build_branch, piip_flops, piip_tsb
from mmkit.weights import load_tensors

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("MMKIT_DATA_DIR", "../shared/data"))
SIDE, CELL = 256, 8


# --- what detail costs -----------------------------------------------------------------------------------------------------


class Alone(nn.Module):
    """A backbone run through the branch protocol: pictures -> its last map. Several sides, largest first, make it a classic pyramid."""

    def __init__(self, config: BranchConfig, sides: tuple[int, ...] = ()):
        super().__init__()
        self.config, self.sides = config, sides or (config.img_size,)
        self.model, self.family, _ = build_branch(config)

    def forward(self, x: Tensor) -> Tensor:
        total: Any = 0
        for side in self.sides:
            small = x if side == x.shape[-1] else F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
            tokens = self.family.embed(self.model, small, self.config)
            if not self.config.class_token:
                tokens = dataclasses.replace(tokens, prefix=None)
            depth = len(self.family.layers(self.model))
            maps = self.family.run(self.model, tokens, 0, depth - 1, self.config).maps
            if side != self.sides[0]:
                maps = F.interpolate(maps, size=total.shape[-2:], mode="bilinear")
            total = total + maps
        return total

    def flops(self) -> float:
        """Multiply-adds of one picture."""
        return sum(branch_flops(self.model, self.family, self.config, (s, s)) for s in self.sides)


def cost(repeats: int) -> None:
    """One picture through four models that see it at the same top resolution."""
    sizes = (368, 192, 128)
    pyramid = piip_tsb(sizes, separate_head=False).eval()
    base = dataclasses.replace(pyramid.pyramid.branches[0], img_size=sizes[0])
    windows = tuple(0 if i % 3 == 2 else 14 for i in range(12))
    bare = dataclasses.replace(
        base, class_token=False, window=windows, settings={**base.settings, "class_token": False, "global_pool": "avg"}
    )
    models: dict[str, tuple[nn.Module, float]] = {"PIIP-TSB": (pyramid, piip_flops(pyramid).total)}
    for name, alone in (
        ("single branch (B)", Alone(base)),
        ("classic pyramid (B)", Alone(base, sizes)),
        ("windowed (B, 14, two blocks of three)", Alone(bare)),
    ):
        models[name] = (alone.eval(), alone.flops())
    rows: dict[str, dict[str, Any]] = {
        name: {"gmac": round(flops / 1e9, 2), "params": sum(p.numel() for p in model.parameters())}
        for name, (model, flops) in models.items()
    }
    for kind, threads, batch, clock in (
        ("cpu_seconds", 1, 1, time.process_time),
        ("cpu_seconds_batch_of_4", 1, 4, time.process_time),
        ("wall_seconds_two_threads", 2, 1, time.perf_counter),
    ):
        torch.set_num_threads(threads)
        x = torch.randn(batch, 3, sizes[0], sizes[0])
        times: dict[str, list[float]] = {name: [] for name in models}
        with torch.inference_mode():
            for turn in tqdm(range(1 + (repeats if batch == 1 else -(-repeats // 3))), desc=kind):
                for name, (model, _) in models.items():
                    start = clock()
                    model(x)
                    if turn:
                        times[name].append((clock() - start) / batch)
        for name, row in rows.items():
            row[kind] = round(min(times[name]), 3)  # others use the machine, too
    single = {k: v for k, v in rows["single branch (B)"].items() if k != "params"}
    for row in rows.values():
        row |= {f"{k}_over_single": round(row[k] / v, 3) for k, v in single.items()}
    _save("cost", {"sizes": sizes, "rows": rows})


# --- small objects in large pictures -------------------------------------------------------------------------------------------


@functools.cache
def cases(split: str) -> list[tuple[Tensor, Tensor]]:
    """Nuclei of BBBC038 (CC0) and their masks, at half size: 128 x 128 pieces with nuclei about ten pixels wide."""
    pieces = []
    for image, labels in nuclei_cases(DATA / "med_nuclei", split):
        size = [max(128, s // 2) for s in labels.shape]
        small = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
        mask = F.interpolate(labels[None, None].float(), size=size, mode="area")[0, 0] > 0.5
        pieces.append((small, mask.float()))
    return pieces


def mosaic(seed: int, split: str) -> tuple[Tensor, Tensor]:
    """A large picture (3, 256, 256) of four pieces, each at a random place of a random case, mirrored at random; and its mask."""
    rng = np.random.default_rng([seed, split == "test"])
    pool = cases(split)
    picture, mask = torch.zeros(3, SIDE, SIDE), torch.zeros(SIDE, SIDE)
    for corner in range(4):
        image, labels = pool[rng.integers(len(pool))]
        top, left = (int(rng.integers(s - 127)) for s in labels.shape)
        flips = [axis for axis in (-1, -2) if rng.random() < 0.5]
        rows, columns = (slice(v * 128, v * 128 + 128) for v in divmod(corner, 2))
        picture[:, rows, columns] = image[:, top : top + 128, left : left + 128].flip(flips)
        mask[rows, columns] = labels[top : top + 128, left : left + 128].flip(flips)
    return picture, mask


class Reader(nn.Module):
    """A mask from a map: LayerNorm and a linear layer give every cell its 8 x 8 pixels; then enlarged to the full picture."""

    def __init__(self, trunk: nn.Module, side: int):
        super().__init__()
        self.trunk, self.side = trunk, side
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, CELL**2)

    def forward(self, x: Tensor) -> Tensor:
        if self.side != SIDE:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", antialias=True)
        maps = self.trunk.forward_features(x) if isinstance(self.trunk, PIIP) else self.trunk(x)
        logits = F.pixel_shuffle(self.head(self.norm(maps.permute(0, 2, 3, 1))).permute(0, 3, 1, 2), CELL)
        return F.interpolate(logits, size=(SIDE, SIDE), mode="bilinear")[:, 0]


def tiny(side: int, depth: int = 5, window: Any = 0) -> BranchConfig:
    """The first `depth` blocks of the bundled `tiny_vit`, without its class token."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": depth, "num_heads": 4, "class_token": False}
    return BranchConfig("timm:vit_tiny_patch16_224", side, settings={**settings, "global_pool": "avg"}, window=window)


def with_tiny_weights(model: Any) -> None:
    """Put as many blocks of `tiny_vit` into a backbone as it has."""
    state = load_tensors("tiny_vit")
    own = model.state_dict()
    state["pos_embed"] = state["pos_embed"][:, 1:]
    model.load_state_dict({k: state[k] for k in own})


def pyramid_model() -> tuple[nn.Module, float]:
    """Two blocks on the full picture, five on a small one."""
    config = PIIPConfig((tiny(96), tiny(SIDE, 2, 8)), num_heads=8, antialias=True)
    model = PIIP(config, 1)
    for backbone in model.backbones:
        with_tiny_weights(backbone)
    return Reader(model, SIDE), piip_flops(model).total


def alone_model(side: int, window: Any = 0) -> tuple[nn.Module, float]:
    """All of `tiny_vit` on a picture of `side` pixels."""
    trunk = Alone(tiny(side, window=window))
    with_tiny_weights(trunk.model)
    return Reader(trunk, side), trunk.flops()


WINDOWS = (8, 8, 0, 8, 0)
MODELS: dict[str, Callable[[], tuple[nn.Module, float]]] = {
    "PIIP": pyramid_model,
    "single, smaller picture": lambda: alone_model(_side_for(0)),
    "windowed, smaller picture": lambda: alone_model(_side_for(WINDOWS), WINDOWS),
    "PIIP, frozen branches with LoRA": pyramid_model,
    "single, full picture": lambda: alone_model(SIDE),
    "windowed, full picture": lambda: alone_model(SIDE, WINDOWS),
}


@functools.cache
def _side_for(window: Any) -> int:
    """The largest side at which the model alone costs no more than the pyramid."""
    budget = pyramid_model()[1]
    return max(s for s in range(64, SIDE + 1, 8) if alone_model(s, window)[1] <= budget)


class Mosaics:
    """Training pictures of one seed, always in the same order."""

    def __init__(self, seed: int, count: int):
        self.seed, self.count = seed, count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (mosaic((self.seed + 1) * 10**6 + i, "train") for i in range(self.count))


def mask_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy and Dice."""
    logits, truth = model(batch[0]), batch[1]
    share = logits.sigmoid()
    dice = (2 * (share * truth).sum() + 1) / (share.sum() + truth.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, truth) + 1 - dice


def train(name: str, seed: int, pictures: int, batch: int) -> dict[str, Any]:
    """Train one model on as many pictures as the pyramid's compute for `pictures` allows, and test it."""
    torch.manual_seed(seed)
    model, flops = MODELS[name]()
    steps = max(round(pictures / batch * min(pyramid_model()[1] / flops, 1.0)), 1)
    config = FitConfig(
        max_steps=steps, batch_size=batch, lr=2e-3, weight_decay=0.02, warmup_steps=round(0.15 * steps), seed=seed, resume=False,
        progress=False,
    )  # fmt: skip
    how: dict[str, Any]
    if "LoRA" in name:  # one adapter, one file: LoRA on both branches, and whole what is not a branch
        whole = ("trunk.interactions.0", "trunk.interactions.1", "trunk.merge", "norm", "head")
        how = {"adapter": apply_adapter(model, "lora", r=8, modules_to_save=whole, exclude=("trunk.cls_head",))}
        trained = [p for _, p in how["adapter"].trainable_parameters()]
    else:
        kinds: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for path, parameter in model.named_parameters():
            if ".cls_" not in path:  # the pyramid's own classifier is not asked
                kinds[".blocks." in path or "embed" in path].append(parameter)
        how = {"parameter_groups": [{"params": kinds[True], "lr_scale": 0.25}, {"params": kinds[False]}]}
        trained = [p for group in kinds.values() for p in group]
    start = time.process_time()
    fit(model, Mosaics(seed, steps * batch), loss_fn=mask_loss, config=config, **how)
    seconds = time.process_time() - start
    named = {
        "gmac_a_picture": round(flops / 1e9, 3),
        "pictures": steps * batch,
        "train_gmac": round(3 * flops * steps * batch / 1e9),
        "trained_params": sum(p.numel() for p in trained),
    }
    if "adapter" in how:
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(how["adapter"], Path(folder) / "adapter")
            named["file_mb"] = round(sum(f.stat().st_size for f in Path(folder).rglob("*.safetensors")) / 1e6, 2)
    return {**named, "train_cpu_seconds": round(seconds, 1), **score(model)}


@torch.no_grad()
def score(model: nn.Module, count: int = 24) -> dict[str, float]:
    """Mean Dice over test pictures, and F1 of single nuclei: found where a connected piece overlaps by more than half (IoU)."""
    from scipy.ndimage import label

    model.eval()
    dices, hits, truths, guesses = [], 0, 0, 0
    for seed in range(count):
        x, y = mosaic(seed, "test")
        guess, truth = model(x[None])[0].numpy() > 0, y.numpy() > 0
        dices.append(2 * (guess & truth).sum() / max(guess.sum() + truth.sum(), 1))
        (there, found), (n, m) = zip(label(truth), label(guess), strict=True)
        both = np.bincount((there * (m + 1) + found).ravel(), minlength=(n + 1) * (m + 1)).reshape(n + 1, m + 1)
        union = both.sum(1, keepdims=True) + both.sum(0, keepdims=True) - both
        hits += int((both[1:, 1:] > 0.5 * union[1:, 1:]).sum())
        truths, guesses = truths + n, guesses + m
    return {"dice": round(float(np.mean(dices)), 4), "f1": round(2 * hits / max(truths + guesses, 1), 4)}


def small(pictures: int, batch: int, seeds: int) -> None:
    """Every model and seed once; what is finished already is kept."""
    settings = {"side": SIDE, "pictures": pictures, "batch": batch}
    path = RESULTS / "piip.json"
    before = json.loads(path.read_text()).get("small", {}) if path.exists() else {}
    runs: dict[str, Any] = before.get("runs", {}) if before.get("settings") == settings else {}
    for name in MODELS:
        for seed in range(seeds):
            key = f"{name} / {seed}"
            if key not in runs:
                runs[key] = train(name, seed, pictures, batch)
                _save("small", {"settings": settings, "runs": runs, "rows": _summary(runs)})
                print(key, runs[key], flush=True)


def _summary(runs: dict[str, Any]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name in MODELS:
        mine = [r for key, r in runs.items() if key.startswith(f"{name} / ")]
        if mine:
            rows[name] = {k: round(statistics.mean(r[k] for r in mine), 4) for k in mine[0]} | {"seeds": len(mine)}
            for key in ("dice", "f1"):
                rows[name][f"{key}_range"] = [min(r[key] for r in mine), max(r[key] for r in mine)]
    return rows


# --- DINOv3 ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def dinov3() -> None:
    """Random weights, whole models: with interactions at their start every branch must say what its model says alone."""
    sizes = {"large": 64, "base": 96, "small": 192}
    branches = tuple(BranchConfig(f"timm:vit_{n}_patch16_dinov3", s) for n, s in sizes.items())
    model = PIIP(PIIPConfig(branches), 10).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma_1", "gamma_2")):
            parameter.fill_(1.0)  # their small start would hide what the blocks do
    x = torch.randn(1, 3, 192, 192)
    found, pictures, rows = model.forward_branches(x), model.pictures(x), {}
    for name, branch, tokens, picture in zip(sizes, model.backbones, found, pictures, strict=True):
        with torch.device("meta"):
            alone = create_backbone(f"timm:vit_{name}_patch16_dinov3", num_classes=0).eval()
        alone.norm = nn.Identity()
        alone.load_state_dict(branch.state_dict(), assign=True)
        for part, own in zip(alone.modules(), branch.modules(), strict=False):
            part._buffers.update({k: v for k, v in own._buffers.items() if k in part._buffers})
        want = alone.forward_features(picture)
        rows[name] = {
            "blocks": len(branch.blocks),
            "params": sum(p.numel() for p in branch.parameters()),
            "picture": sizes[name],
            "largest_difference": float((tokens.joined() - want).abs().max()),
            "largest_value": round(float(want.abs().max()), 2),
        }
        print(name, rows[name], flush=True)
    logits = model(x)
    total = sum(p.numel() for p in model.parameters())
    _save("dinov3", {"rows": rows, "params": total, "finite": bool(logits.isfinite().all())})


# --- the kernel --------------------------------------------------------------------------------------------------------------------


def op(repeats: int) -> None:
    """Both backends of the fused sampling operator at every size that the models give it, one picture."""
    grids = {
        "TSB 368/192/128": ((23, 12, 8), (192, 384, 768), 16),
        "TSB 1568/1120/672": ((98, 70, 42), (192, 384, 768), 16),
        "SBL 384/192/128": ((24, 12, 8), (384, 768, 1024), 16),
        "piip_nuclei 256/128": ((32, 16), (128, 128), 8),
    }
    rows = {}
    for model, (sides, widths, heads) in grids.items():
        for i, j in itertools.permutations(range(len(sides)), 2):
            if abs(i - j) == 1:  # neighbours
                name = f"{model}: {sides[i]}x{sides[i]} reads {sides[j]}x{sides[j]}"
                rows[name] = _both_backends(sides[i], sides[j], heads, widths[i] // 2 // heads, repeats)
                print(name, rows[name], flush=True)
    _save("op", {"rows": rows})


def _both_backends(queries: int, cells: int, heads: int, dim: int, repeats: int) -> dict[str, float]:
    """Ratios of process CPU time, grid_sample over the kernel, after a check that both say the same; sides of square grids."""
    torch.manual_seed(0)
    count, grids = queries**2, ((queries, queries), (cells, cells))
    value = torch.randn(1, cells**2, heads, dim, requires_grad=True)
    offsets = (2 * torch.randn(1, count, heads, 4, 2)).requires_grad_()
    logits = torch.randn(1, count, heads, 4, requires_grad=True)
    slopes = torch.randn(1, count, heads * dim)
    times: dict[str, list[float]] = {f"{b} {w}": [] for b in ("cpu", "torch") for w in ("forward", "both")}
    for turn in range(repeats + 1):
        found = {}
        for backend in ("cpu", "torch"):
            start = time.process_time()
            with torch.no_grad():
                deformable_grid_attention(value, offsets, logits, *grids, backend=backend)
            middle = time.process_time()
            out = deformable_grid_attention(value, offsets, logits, *grids, backend=backend)
            found[backend] = [out.detach(), *torch.autograd.grad(out, [value, offsets, logits], slopes)]
            if turn:
                times[f"{backend} forward"].append(middle - start)
                times[f"{backend} both"].append(time.process_time() - middle)
        for part, got, want in zip(("output", "value", "offsets", "logits"), *found.values(), strict=True):
            apart = float(((got - want).abs() > 1e-3 + 1e-3 * want.abs()).float().mean())
            # the slope jumps where a place lies on the border of two cells, and rounding decides which cell it is
            assert apart <= (1e-4 if part == "offsets" else 0.0), f"{part}: {apart:.2%} of the numbers differ"
    best = {k: min(v) for k, v in times.items()}
    return {
        "kernel_forward_ms": round(1e3 * best["cpu forward"], 2),
        "kernel_forward_and_backward_ms": round(1e3 * best["cpu both"], 2),
        "forward_over_kernel": round(best["torch forward"] / best["cpu forward"], 2),
        "forward_and_backward_over_kernel": round(best["torch both"] / best["cpu both"], 2),
    }


def _save(part: str, value: Any) -> None:
    path = RESULTS / "piip.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known |= {part: value}
    write_json(path, known)
    path.with_suffix(".md").write_text(_report(known), encoding="utf-8")


def _report(known: dict[str, Any]) -> str:
    """Everything that was measured, as tables."""
    titles = {
        "cost": "One picture at 368 pixels: PIIP-TSB (368/192/128) beside models that see as much",
        "small": "Nuclei of ten pixels in pictures of 256 pixels, trained with the same multiply-adds",
        "dinov3": "DINOv3 branches at full size, random weights, beside the same model alone",
        "op": "Deformable attention's sampling: CPU time of grid_sample over that of the Numba kernel",
    }
    lines = ["# PIIP", "", "Written by `python benchmarks/piip.py`.", ""]
    for part, title in titles.items():
        rows = known.get(part, {}).get("rows")
        if rows:
            names = list(dict.fromkeys(k for row in rows.values() for k in row))
            lines += [
                f"## {title}",
                "",
                f"| | {' | '.join(n.replace('_', ' ') for n in names)} |",
                "|---" * (len(names) + 1) + "|",
            ]
            lines += [f"| {k} | {' | '.join(str(row.get(n, '')) for n in names)} |" for k, row in rows.items()]
            lines += [""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("cost", "small", "dinov3", "op"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=96, help="pictures that the pyramid is trained on")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part == "cost":
        cost(args.repeats)
    elif args.part == "small":
        small(args.pictures, args.batch, args.seeds)
    elif args.part == "dinov3":
        dinov3()
    else:
        op(args.repeats * 4)


if __name__ == "__main__":
    main()
