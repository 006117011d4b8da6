"""Ways to adapt the bundled text-to-image model at equal steps: how much of what training all weights gains do they reach?

    python benchmarks/difffit.py compare [--data DIR] [--tasks "washed out" negative] [--seeds 3]
    python benchmarks/difffit.py rates       # the search for learning rates
    python benchmarks/difffit.py sampling    # seconds for one picture and for a set

Tasks: a washed-out style (easy: one scale and shift), the photo-negative and a woven canvas (hard), and photographs of clothes
(`cls_clothing`, CC0, in --data; left out without it). Every method sees the same 400 pictures in 100 steps of 32. Loss: of denoising
256 pictures held back (120 photographs), always at the same noise and timesteps; "gap" is the share of the way from the untrained
model's loss to that of all weights. Judge: how often 60 pictures of other captions show the asked shape and color, after the style is
undone; photographs are not in the world of the judge, there it reads what the model still knows of its own. Drift is peft's measure
for image generation: 1 - the mean cosine between features of pictures by the untrained and by the adapted model, same captions and
seeds (features here: the bundled MobileNetV2; pictures of a style: with the style undone, so that the wanted change does not count).
CPU times on one thread; memory is what training added to the resident peak of a fresh process (Linux). Files hold half-precision
numbers.

"No biases" is the bundled model without any, healed for 200 steps: modern transformers have none, and DiffFit has to create them.
Learning rates (`METHODS`) are the best of three or more by `rates`: on negatives of another seed, with the weights that the model had
before its longer training; methods without a search of their own use that of their like. Photographs are known to the model under
one unknown word only, so it learns clothes in general. `--steps` trains longer and writes files of its own.

Every run is recorded when it is done, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import functools
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmkit
from mmkit.adapters import save_adapter
from mmkit.data.drawn.scenes import caption, draw_scenes, random_scenes, read_caption
from mmkit.diffusion import Captioned, Denoiser, TextToImagePipeline, draw_domain, finetune
from mmkit.diffusion.domains import weave
from mmkit.diffusion.training import DenoisingLoss, Latents, ValidationLoss
from mmkit.storage import atomic_write, read_json, sha256_file, write_json, write_safetensors
from mmkit.weights import weight_entry

RESULTS = Path(__file__).parent / "results"
STEPS, BATCH, TRAIN, HELD, JUDGED = 100, 32, 400, 256, 60
Pictures = tuple[Tensor, list[str]]


@dataclass(frozen=True)
class Method:
    """An adapter ("full": all weights), its settings, its rate and whether it needs biases in the model (None: does not care)."""

    adapter: str
    settings: dict[str, Any] = field(default_factory=dict)
    lr: float = 3e-2
    biases: bool | None = None


_LINEAR = {"placement": "linear", "scale_blocks": "all"}
METHODS = {
    "biases": Method("bitfit", lr=9e-2, biases=True),
    "biases and tables": Method("difffit", {"placement": "none"}, biases=True),
    "DiffFit": Method("difffit", _LINEAR, biases=True),
    "DiffFit, every layer": Method("difffit", {"targets": "*"}, biases=True),
    "scales alone": Method("difffit", {**_LINEAR, "train_bias": False}, biases=False),
    "created biases": Method("difffit", {"placement": "none", "create_bias": True}, biases=False),
    "DiffFit, created biases": Method("difffit", {**_LINEAR, "create_bias": True}, biases=False),
    "IA3": Method("ia3", lr=9e-2),
    "OFT": Method("oft", lr=9e-3),
    "LoRA": Method("lora", {"r": 8}, lr=9e-3),
    "full": Method("full", lr=1e-3),
}
UNDO: dict[str, Callable[[Tensor], Tensor]] = {
    "washed out": lambda x: (x - 0.4225) / 0.55,
    "negative": lambda x: 1 - x,
    "canvas": lambda x: x / weave(x),
}
NO_BIASES = "washed out, no biases"
CLOTHING = "clothing"
HARD = ("negative", "canvas")
TASKS = ("washed out", "negative", CLOTHING, NO_BIASES, "canvas")


def methods_of(task: str) -> list[str]:
    """Names of the methods that make sense for a task."""
    return [name for name, m in METHODS.items() if m.biases in (None, task != NO_BIASES)]


# --- models and data ---------------------------------------------------------------------------------------------------------------


def base_model(task: str) -> TextToImagePipeline:
    """The untrained model of a task, fresh."""
    draw = TextToImagePipeline(device="cpu")
    if task == NO_BIASES:
        without_biases(draw.denoiser)
        draw.denoiser.load_state_dict(healed())
    return draw


def without_biases(model: nn.Module) -> nn.Module:
    """Take the biases out of all linear layers and convolutions, in place; returns the model."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.bias = None
    return model


@functools.cache
def healed() -> dict[str, Tensor]:
    """Weights of the denoiser that learned to live without biases."""
    draw = TextToImagePipeline(device="cpu")
    without_biases(draw.denoiser)
    generator = torch.Generator().manual_seed(77)
    scenes = random_scenes(3000, generator)
    plain = draw_scenes(scenes, generator, 24), caption(scenes, generator)
    finetune(plain, draw, "full", lr=1e-3, max_steps=200, batch_size=64, progress=False)
    return {k: v.detach().clone() for k, v in draw.denoiser.state_dict().items()}


def task_data(task: str, data: Path | None, seed: int) -> tuple[Pictures, Pictures]:
    """Pictures (N, 3, 24, 24) in 0..1 with captions: those to train on, those held back."""
    if task == CLOTHING:
        return photographs(data, "train"), photographs(data, "validation")
    domain = task.partition(",")[0]
    return draw_domain(domain, TRAIN, seed=1000 * seed + 1), draw_domain(domain, HELD, seed=1000 * seed + 2)


def photographs(data: Path | None, split: str) -> Pictures:
    """Photographs of clothes in the size of the model."""
    folder = Path(data or ".") / "cls_clothing"
    with (folder / "index.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    captions = [f"a {row['label']}" for row in rows]
    return Captioned([folder / row["path"] for row in rows], captions).tensor(24) / 2 + 0.5, captions


# --- measures ----------------------------------------------------------------------------------------------------------------------


def held_back_loss(draw: TextToImagePipeline, held: Pictures) -> float:
    """Denoising loss on pictures, at noise and timesteps that are always the same."""
    denoiser = Denoiser(draw.pipe).eval()
    distinct = list(dict.fromkeys(held[1]))
    loss = DenoisingLoss(denoiser.encode_captions([*distinct, *denoiser.empty_captions(1)]))
    latents = Latents(denoiser.encode_pictures(held[0] * 2 - 1), [distinct.index(c) for c in held[1]])
    with torch.no_grad():
        return ValidationLoss(loss)(denoiser, torch.utils.data.DataLoader(latents, batch_size=64))["loss"]


@functools.cache
def prompts() -> list[str]:
    """Captions that name shape and color."""
    generator = torch.Generator().manual_seed(4242)
    told = caption(random_scenes(4 * JUDGED, generator), generator)
    return [text for text in told if {"shape", "color"} <= read_caption(text).keys()][:JUDGED]


def drawn(draw: TextToImagePipeline, task: str) -> Tensor:
    """Pictures (JUDGED, 3, 24, 24) of `prompts()`, the domain undone."""
    made = draw(prompts(), seed=9000, batch_size=30).tensor()
    undo = UNDO.get(task.partition(",")[0], lambda x: x)
    return undo(made).clamp(0, 1)


@functools.cache
def features_of_base(no_biases: bool) -> Tensor:
    """Features of what the untrained model draws."""
    return features(base_model(NO_BIASES if no_biases else "")(prompts(), seed=9000, batch_size=30).tensor())


def features(pictures: Tensor) -> Tensor:
    """Unit features (N, 1280) of the bundled MobileNetV2."""
    model = _encoder()
    large = F.interpolate(pictures, (96, 96), mode="bilinear", antialias=True) * 2 - 1
    with torch.no_grad():
        found: Tensor = model.forward_head(model.forward_features(large), pre_logits=True)
    return F.normalize(found, dim=1)


@functools.cache
def _encoder() -> Any:
    return mmkit.load_weights("mobilenetv2").eval()


def looks(draw: TextToImagePipeline, task: str) -> dict[str, float]:
    """What judge and drift say of a model's pictures."""
    made = drawn(draw, task)
    right = mmkit.load_weights("scene_judge").obedience(made, prompts())  # type: ignore[operator]
    cosine = (features(made) * features_of_base(task == NO_BIASES)).sum(1).mean()
    return {"shape": right["shape"], "color": right["color"], "drift": round(1 - float(cosine), 4)}


def resident(key: str) -> float:
    """MB of this process: `VmRSS` now or `VmHWM` at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def forget_peak() -> float | None:
    """Give freed memory back and let the peak begin anew; MB resident now, or None where the system cannot (not Linux)."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def file_size(draw: TextToImagePipeline, adapter: Any) -> int:
    """Bytes of the tensors as they are sent, in half precision."""
    with tempfile.TemporaryDirectory() as folder:
        if adapter is not None:
            return (save_adapter(adapter, Path(folder) / "a", half=True) / "adapter_model.safetensors").stat().st_size
        file = Path(folder) / "all.safetensors"
        write_safetensors(file, {k: v.half() for k, v in draw.denoiser.state_dict().items()})
        return file.stat().st_size


# --- runs --------------------------------------------------------------------------------------------------------------------------


def adapt(task: str, method: Method, data: Path | None, seed: int, steps: int, seen: bool = True) -> dict[str, Any]:
    """Adapt once and measure; with `seen=False` the loss alone."""
    train, held = task_data(task, data, seed)
    draw, ticks = base_model(task), [time.process_time()]
    before = forget_peak()
    result = finetune(
        train, draw, method.adapter, settings=dict(method.settings), lr=method.lr, max_steps=steps, batch_size=BATCH, seed=seed,
        val=0, progress=False, on_step=lambda info: ticks.append(time.process_time()),
    )  # fmt: skip
    if result.fit.stopped != "finished":
        raise SystemExit(f"{result.fit.stopped} after {result.fit.steps} steps: this run is not recorded")
    seconds, peak = time.process_time() - ticks[0], None if before is None else resident("VmHWM") - before
    found: dict[str, Any] = {"loss": round(held_back_loss(draw, held), 5)}
    if seen:
        found |= looks(draw, task)
        found |= {
            "trained": result.trained,
            "file_bytes": file_size(draw, result.adapter),
            "cpu_seconds": round(seconds, 1),
            "step_ms": round(1000 * statistics.median(b - a for a, b in itertools.pairwise(ticks[1:])), 1),
            "peak_mb": peak and round(peak, 1),
        }
    return found


def untrained(task: str, data: Path | None, seed: int, seen: bool = True) -> dict[str, Any]:
    """The same measures before any training."""
    draw = base_model(task)
    found = {"loss": round(held_back_loss(draw, task_data(task, data, seed)[1]), 5)}
    return found | looks(draw, task) if seen else found


def apart(call: Callable[..., Any], *args: Any) -> Any:
    """The answer of a call in a process of its own, so that its memory is its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(call, args)


def key_of(steps: int) -> dict[str, Any]:
    """What runs must have in common to stand beside each other."""
    return {
        "steps": steps,
        "batch": BATCH,
        "pictures": TRAIN,
        "weights": sha256_file(weight_entry("text_to_image_scenes").path),
    }


def known(path: Path, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report so far, and its runs where they are of this model and these steps."""
    report = read_json(path) if path.exists() else {}
    return report, report.get("runs", {}) if report.get("key") == key_of(steps) else {}


def record(path: Path, steps: int, name: str, found: dict[str, Any]) -> None:
    """Add a run and write both files anew."""
    report, runs = known(path, steps)
    runs[name] = found
    write_report(path, steps, report, runs)
    print(name, found, flush=True)


def write_report(path: Path, steps: int, report: dict[str, Any], runs: dict[str, Any]) -> None:
    """The runs with their means, as JSON and as tables."""
    report |= {"key": key_of(steps), "runs": runs, "rows": summary(runs)}
    write_json(path, report)
    write_table(path.with_suffix(".md"), report)


def run_tasks(args: argparse.Namespace, path: Path) -> None:
    """Everything that is not recorded yet, seed by seed."""
    for task in args.tasks:
        features_of_base(task == NO_BIASES)  # here, and not in every process
    for seed in range(args.seeds):
        for task in args.tasks:
            for name in ["untrained", *methods_of(task)]:
                key = f"{task} / {name} / {seed}"
                if key in known(path, args.steps)[1] or name not in ("untrained", *args.methods):
                    continue
                if name == "untrained":
                    record(path, args.steps, key, apart(untrained, task, args.data, seed))
                else:
                    record(path, args.steps, key, apart(adapt, task, METHODS[name], args.data, seed, args.steps))
    write_report(path, args.steps, *known(path, args.steps))


def search_rates(args: argparse.Namespace, path: Path) -> None:
    """Rates per method on negatives of another seed, three and more while the highest is the best: the lowest loss counts."""
    tried: dict[str, dict[str, float]] = read_json(path).get("rates", {}) if path.exists() else {}
    for name in (n for n in args.methods if METHODS[n].biases is not False):
        method, losses = METHODS[name], tried.setdefault(name, {})
        middle = {"full": 1e-3, "oft": 3e-3, "lora": 3e-3}.get(method.adapter, 1e-2)
        rates = [middle / 3, middle, middle * 3]
        while rates:
            lr = f"{rates.pop(0):.1e}"
            if lr not in losses:
                own = Method(method.adapter, method.settings, float(lr))
                losses[lr] = apart(adapt, "negative", own, None, 100, STEPS, False)["loss"]
                write_json(path, (read_json(path) if path.exists() else {}) | {"rates": tried})
                print(name, lr, losses[lr], flush=True)
            if not rates and min(losses, key=losses.__getitem__) == max(losses, key=float):
                rates = [3 * float(lr)]


def time_sampling(path: Path) -> None:
    """CPU and wall seconds for one picture and for sets, 16 steps with guidance, after a first call."""
    draw, found = TextToImagePipeline(device="cpu"), {}
    draw(prompts()[:1], steps=2)
    for count in (1, 6, 16):
        cpu, wall = time.process_time(), time.perf_counter()
        draw(prompts()[:count])
        found[str(count)] = {
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "wall_seconds": round(time.perf_counter() - wall, 2),
        }
    report = read_json(path) if path.exists() else {}
    report["sampling"] = {"threads": torch.get_num_threads(), "pictures": found}
    write_json(path, report)
    print(report["sampling"])


# --- tables ------------------------------------------------------------------------------------------------------------------------


def summary(runs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By task and method: means over the seeds whose untrained and full runs are there, and the share of the gap between them."""
    rows: dict[str, dict[str, Any]] = {}
    for key, found in runs.items():
        task, name, seed = key.split(" / ")
        base, full = (runs.get(f"{task} / {other} / {seed}") for other in ("untrained", "full"))
        if base and full:
            gap = (base["loss"] - found["loss"]) / (base["loss"] - full["loss"])
            rows.setdefault(task, {}).setdefault(name, []).append(found | {"gap": gap})
    return {task: {name: _mean(found) for name, found in methods.items()} for task, methods in rows.items()}


def _mean(found: list[dict[str, Any]]) -> dict[str, Any]:
    means = {
        k: round(statistics.mean(r[k] for r in found), 4) for k in found[0] if all(r.get(k) is not None for r in found)
    }
    gaps = [round(r["gap"], 4) for r in found if "gap" in r]
    return means | {"seeds": len(found)} | ({"gap_range": [min(gaps), max(gaps)]} if gaps else {})


_HEADS = "| method | trained | gap closed | range | loss | shape | color | drift | step ms | CPU s | peak MB | file kB | seeds |"


def write_table(path: Path, report: dict[str, Any]) -> None:
    """The same as Markdown."""
    lines = [
        "# Adapting the bundled text-to-image model",
        "",
        f"{report['key']['steps']} steps of {BATCH}, {TRAIN} pictures; CPU, one thread.",
        "",
    ]
    for task, rows in report["rows"].items():
        lines += [f"## {task}", "", _HEADS, "|" + "---|" * 13, *(_line(name, r) for name, r in rows.items()), ""]
    lines += ["## In short", "", *in_short(report["rows"]), ""]
    lines += ["## What was aimed at", "", *goals(report["rows"])]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def in_short(rows: dict[str, dict[str, Any]]) -> list[str]:
    """One line per method: trained, gap closed in each task, size and time; the README shows the same lines."""
    tasks = [task for task in TASKS if task in rows and task != NO_BIASES]
    lines = [f"| | trained | {' | '.join(tasks)} | file kB | CPU s |", "|---" * (4 + len(tasks)) + "|"]
    for name in methods_of(""):
        found = [rows[task].get(name, {}) for task in tasks]
        if all("gap" in r for r in found) and found:
            gaps = " | ".join(f"{r['gap']:.0%}" for r in found)
            seconds = statistics.mean(r["cpu_seconds"] for r in found)
            size = f"{found[0]['file_bytes'] / 1000:,.0f}"
            lines.append(f"| {name} | {found[0]['trained']:,.0f} | {gaps} | {size} | {seconds:.0f} |")
    return lines


def goals(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The aims and what was found, as a Markdown list."""
    lines = []

    def add(text: str, found: float, met: bool, form: str = ".1f") -> None:
        lines.append(f"- {text}: {found:{form}}, {'reached' if met else 'missed'}")

    for task, found in rows.items():
        ours, plain, full = (found.get(name, {}) for name in ("DiffFit", "biases", "full"))
        if not ("gap" in ours and "gap" in plain):
            continue
        if task == "washed out":
            add("washed out, DiffFit closes 95 % of the gap", 100 * ours["gap"], ours["gap"] >= 0.95)
            share = 100 * ours["trained"] / full["trained"]
            add("with at most 2 % of the parameters", share, share <= 2, ".2f")
        elif task in HARD:
            more = 100 * (ours["gap"] - plain["gap"])
            add(f"{task}, DiffFit closes 10 points more of the gap than biases alone", more, more >= 10)
    every = [found["DiffFit"] for found in rows.values() if "DiffFit" in found]
    kilobytes, seconds = (max(r[k] for r in every) for k in ("file_bytes", "cpu_seconds")) if every else (0, 0)
    add("file of DiffFit at most 50 kB", kilobytes / 1000, kilobytes <= 50_000)
    add("adaptation by DiffFit at most 60 CPU seconds", seconds, seconds <= 60)
    return lines


def _line(name: str, r: dict[str, Any]) -> str:
    def show(key: str, form: str, factor: float = 1.0) -> str:
        return format(factor * r[key], form) if key in r else ""

    low, high = r.get("gap_range", (0, 0))
    cells = (
        name, show("trained", ",.0f"), show("gap", ".1%"), f"{low:.1%} to {high:.1%}" if "gap_range" in r else "",
        show("loss", ".4f"), show("shape", ".0%"), show("color", ".0%"), show("drift", ".3f"), show("step_ms", ".0f"),
        show("cpu_seconds", ".1f"), show("peak_mb", ".0f"), show("file_bytes", ".1f", 1e-3), str(r["seeds"]),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("compare", "rates", "sampling"))
    parser.add_argument("--data", type=Path, help="folder that holds cls_clothing")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / ("difffit.json" if args.steps == STEPS else f"difffit_{args.steps}.json")
    if args.command == "rates":
        search_rates(args, path)
    elif args.command == "sampling":
        time_sampling(path)
    else:
        if CLOTHING in args.tasks and not (args.data and (args.data / "cls_clothing" / "index.csv").is_file()):
            print(f"{CLOTHING} is left out: --data must be a folder that holds cls_clothing/index.csv.")
            args.tasks.remove(CLOTHING)
        run_tasks(args, path)


if __name__ == "__main__":
    main()
