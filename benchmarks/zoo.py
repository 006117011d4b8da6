"""Every adapter method on every family of timm, open_clip, diffusers and transformers: what attaches, acts, merges and comes off.

    python benchmarks/zoo.py                       # goes on where the last run stopped
    python benchmarks/zoo.py "timm/*vit*" --again  # a part of it, anew
    python benchmarks/zoo.py --methods lora ssf

Rules: no silent no-op, no wrong merge, no exception that is not of `mmkit.errors`. Results are written after every model.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import importlib
import json
import re
import resource
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import Animal, Skipped, zoo

from mmkit.adapters import Adapter, apply_adapter, list_adapters, load_adapter, save_adapter
from mmkit.errors import InputError, MMKitError
from mmkit.storage import atomic_write, read_json

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("attach", "reached", "identity", "moves", "gradients", "merge", "restore", "files")
MAY_REFUSE = ("attach", "reached", "merge")
CHEAP = (  # these first
    "ssf", "bitfit", "linear_probe", "lora", "ln_tuning", "ia3", "gmm", "zeroi2v", "dora", "loha", "oft",
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {  # small enough for small models
    "ssf": {"init_std": 0.0}, "zeroi2v": {"num_frames": 2, "dropout": 0.0},
    **{n: {"r": 2} for n in ("lora", "dora", "loha", "lokr", "hira", "delora", "gralora", "hra", "miss", "psoft", "randlora")},
    "oft": {"oft_block_size": 2}, "road": {"group_size": 2}, "c3a": {"block_size": 1}, "shira": {"r": 1},
    "fourierft": {"n_frequency": 4}, "waveft": {"n_frequency": 4},
}  # fmt: skip
UNUSED = {"gmm": "a model that classifies from its class token ignores the mask of its last layer"}


class Fault(Exception):
    """A rule is broken."""


class OutOfTime(BaseException):
    """Nobody may take it for an error of a model."""


class Facts:
    """What is known about a model before anything is attached.

    `unused` are the paths of modules whose parameters the output does not depend on: nothing that changes them can be trained.
    `twin` is a copy, and `direction` a random one in which the outputs are trained.
    """

    def __init__(self, animal: Animal):
        out = animal.run()
        self.output = out.detach()
        self.direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=out.dtype)
        (out * self.direction).sum().backward()
        self.unused = set()
        for path, m in animal.model.named_modules():
            own = [p for p in m.parameters(recurse=False) if p.requires_grad]
            if own and all(p.grad is None or not p.grad.abs().max() > 0 for p in own):
                self.unused.add(path)
        for p in animal.model.parameters():
            p.grad = None
        self.picture = picture_of(animal.model)
        self.twin = copy.deepcopy(animal.model)


# --- one method on one model ---------------------------------------------------------------------------------------------


class Trial:
    """One method on one model, column by column.

    `marks` has a letter per column: "o" in order, "r" refused by name, "F" fault, "-" not tried; `notes` say why.
    """

    def __init__(self, animal: Animal, method: str, facts: Facts):
        self.animal, self.method, self.facts = animal, method, facts
        self.model, self.twin = animal.model, facts.twin
        self.dtype = next(self.model.parameters()).dtype
        self.marks = dict.fromkeys(COLUMNS, "-")
        self.notes: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """All columns; the model is as before afterwards, or "restore" says what is not."""
        before, found = self.facts.output, self.facts.picture
        adapter = self.step("attach", self.attach)
        if adapter is not None:
            if adapter.starts_as_identity():
                self.step("identity", lambda: self.identity(adapter, before))
            fresh = [p.detach().clone() for _, p in adapter.trainable_parameters()]
            randomise(adapter)
            adapted = self.step("moves", lambda: self.moves(before))
            self.step("gradients", lambda: self.gradients(adapter, fresh))
            if adapted is not None:
                self.step("merge", lambda: self.merge(adapter, before, adapted))
                self.step("files", lambda: self.files(adapter, before, adapted))
            self.step("restore", adapter.detach)
        self.step("restore", lambda: self.restore(before, found), always=adapter is not None)
        return {"marks": "".join(self.marks.values()), **({"notes": self.notes} if self.notes else {})}

    def step(self, column: str, work: Any, *, always: bool = True) -> Any:
        """Do `work`; put down how it went."""
        try:
            result = work()
        except MMKitError as error:
            self.put(column, "r" if column in MAY_REFUSE else "F", error)
        except Exception as error:
            self.put(column, "F", error if isinstance(error, Fault) else f"{type(error).__name__}: {error}")
        else:
            if always and self.marks[column] in "-":
                self.marks[column] = "o"
            return result
        return None

    def put(self, column: str, mark: str, reason: Any) -> None:
        self.marks[column] = mark
        self.notes[column] = " ".join(str(reason).split())[:240]

    def attach(self) -> Adapter:
        """Attach; when the first call names modules that are never called, again without them, as the message says."""
        exclude: tuple[str, ...] = ()
        for _ in range(3):
            adapter = self._apply(self.model, exclude)
            try:
                self.animal.run()
            except InputError as error:
                adapter.detach()
                self.model.to(self.dtype)
                self.put("reached", "r", error)
                offered = re.search(r"exclude=(\(.*?\))", str(error))
                if not offered:
                    raise Fault(f"the first call names no way out: {error}") from error
                exclude += tuple(re.findall(r"'([^']*)'", offered[1]))
            except BaseException:
                adapter.detach()
                raise
            else:
                self.marks["reached"] = self.marks["reached"].replace("-", "o")
                return adapter
        raise Fault(f"the ways out that were offered, exclude={exclude}, do not lead out")

    def _apply(self, model: nn.Module, exclude: tuple[str, ...]) -> Adapter:
        """Attached in float32, as by a user, then made as exact as the model."""
        torch.manual_seed(3)
        settings = SETTINGS.get(self.method, {}) | ({"exclude": exclude} if exclude else {})
        model.float()
        try:
            return apply_adapter(model, self.method, **settings).to(self.dtype)
        finally:
            model.to(self.dtype)

    def identity(self, adapter: Adapter, before: Tensor) -> None:
        """Fresh equals base, to 1e-4 of the largest output: attaching holds each site to 1e-5, a deep model adds them up."""
        error = difference(self.animal.run(), before)
        if not error <= 1e-4:
            raise Fault(f"a fresh adapter changes the output by {error:.1e}")

    def moves(self, before: Tensor) -> Tensor:
        """A trained adapter changes the output, which is returned."""
        adapted = self.animal.run().detach()
        if not difference(adapted, before) > 1e-9:
            raise Fault("a randomised adapter changes nothing")
        return adapted

    def gradients(self, adapter: Adapter, fresh: list[Tensor]) -> None:
        """Every adapter tensor gets a gradient, no base tensor does.

        A ReLU or a gate can be shut by chance: tried ever nearer to the base, where `unused` tells which of them are.
        """
        own = adapter.trainable_parameters()
        values = [p.detach().clone() for _, p in own]
        none = {k for k, _ in own}
        for nearer in (0.002, 1e-5, 0.0):
            (self.animal.run() * self.facts.direction).sum().backward()
            leaked = [k for k, p in self.model.named_parameters() if p.grad is not None]
            none &= {k for k, p in own if p.grad is None or not p.grad.abs().max() > 0}
            for p in [*self.model.parameters(), *adapter.parameters()]:
                p.grad = None
            missed = sorted(k for k in none if not self._unused(k, len(none)))
            if leaked or not missed:
                break
            randomise(adapter, 6, nearer, fresh)
        with torch.no_grad():
            for (_, p), value in zip(own, values, strict=True):
                p.copy_(value)
        if leaked:
            raise Fault(f"base tensors get gradients: {leaked[:3]}")
        if missed:
            raise Fault(f"{len(missed)} of {len(own)} tensors get no gradient: {missed[:3]}")

    def _unused(self, key: str, count: int) -> bool:
        """Whether the model makes no use of what this tensor changes, adapter or not."""
        if self.method in UNUSED:
            return count <= 2
        return any(key.startswith(f"{path}.") for path in self.facts.unused)

    def merge(self, adapter: Adapter, before: Tensor, adapted: Tensor) -> None:
        """Merged equals adapted, to 1e-3 of what the adapter changes; unmerged equals adapted bit by bit."""
        adapter.merge()
        try:
            error, effect = difference(self.animal.run(), adapted), difference(adapted, before)
        finally:
            adapter.unmerge()
        if not error <= 1e-6 + 1e-3 * effect:
            raise Fault(f"merged is off by {error:.1e}, the adapter's effect is {effect:.1e}")
        if not torch.equal(self.animal.run(), adapted):
            raise Fault("unmerge does not restore the adapted model bit by bit")

    def files(self, adapter: Adapter, before: Tensor, adapted: Tensor) -> None:
        """Saved and loaded into a fresh copy: the same output."""
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(adapter, f"{folder}/adapter")
            loaded = load_adapter(self.twin.float(), f"{folder}/adapter").to(self.dtype)
            self.twin.to(self.dtype)
            try:
                error = difference(self.animal.run(self.twin), adapted)
            finally:
                loaded.detach()
        if not error <= 1e-9 + 1e-5 * difference(adapted, before):
            raise Fault(f"the loaded adapter answers differently, by {error:.1e}")

    def restore(self, before: Tensor, found: dict[str, Any]) -> None:
        """Detached: tensors and buffers bit-equal, keys, types, attributes, hooks and flags as they were found."""
        now = picture_of(self.model)
        if changed := [k for k in found | now if not same(found.get(k), now.get(k))]:
            raise Fault(f"not as before: {changed[:4]}")
        if not torch.equal(self.animal.run(), before):
            raise Fault("the detached model answers differently")


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value of `b`; infinite for NaN."""
    if a.shape != b.shape:
        return float("inf")
    value = float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-30))
    return value if value == value else float("inf")


def randomise(adapter: Adapter, seed: int = 5, size: float = 0.05, start: list[Tensor] | None = None) -> None:
    """Stand in for training: move every adapter tensor (from `start`) to float32 values, which files keep exactly."""
    generator = torch.Generator().manual_seed(seed)
    own = [p for _, p in adapter.trainable_parameters()]
    with torch.no_grad():
        for p, value in zip(own, own if start is None else start, strict=True):
            p.copy_(value.float() + size * torch.randn(p.shape, generator=generator))


def picture_of(model: nn.Module) -> dict[str, Any]:
    """Everything that `detach` must leave as it was."""
    seen: dict[str, Any] = {f"key {k}": v.detach().clone() for k, v in model.state_dict().items()}
    seen |= {f"buffer {k}": b.detach().clone() for k, b in model.named_buffers()}
    seen |= {f"flag {k}": p.requires_grad for k, p in model.named_parameters()}
    for path, m in model.named_modules():
        hooks = [len(getattr(m, k)) for k in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        seen[f"module {path}"] = (type(m), sorted(m.__dict__), list(m._modules), list(m._parameters), hooks, m.training)
    return seen


def same(a: Any, b: Any) -> bool:
    """Equal; tensors bit by bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    return type(a) is type(b) and a == b


# --- the sweep --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` when the block uses more CPU time."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"more than {seconds:.0f} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def visit(maker: Any, methods: list[str], seconds: float) -> dict[str, Any]:
    """The row of one family: the model that stands for it and what every method did, or why there is none."""
    start = time.process_time()
    row: dict[str, Any] = {}
    try:
        with within(seconds):
            animal = maker()
            size = sum(p.numel() for p in animal.model.parameters())
            row = {"model": animal.name, "parameters": size, "methods": {}}
            facts = Facts(animal)
            for method in methods:
                row["methods"][method] = Trial(animal, method, facts).run()
    except Skipped as skip:
        row = {"skipped": str(skip)}
    except (OutOfTime, MemoryError) as error:
        row["stopped"] = str(error) or "out of memory"
    return row | {"cpu_seconds": round(time.process_time() - start, 1)}


def plan(pattern: str, wanted: list[str] | None) -> list[tuple[str, Any, list[str]]]:
    """(family, maker, methods), cheapest families first as far as an earlier run can tell (a variant is like its family)."""
    methods = wanted or [*CHEAP, *(n for n in list_adapters() if n not in CHEAP)]
    cost = {key: row["cpu_seconds"] / len(row["methods"]) for key, row in saved().items() if row.get("methods")}

    def expected(family: tuple[str, Any, list[str]]) -> float:
        module, _, name = family[0].rpartition("/")
        return cost.get(family[0], cost.get(f"{module}/{name.partition('_')[0]}", float("inf")))

    return sorted(((key, m, methods) for key, m in zoo() if fnmatch.fnmatch(key, pattern)), key=expected)


def sweep(pattern: str, wanted: list[str] | None, again: bool, seconds: float, total: float) -> None:
    """Do what is not in the table yet, within `total` seconds of CPU time."""
    for key, maker, methods in plan(pattern, wanted):
        row = saved().get(key, {})
        done = () if again else methods if "skipped" in row else row.get("methods", ())
        missing = [m for m in methods if m not in done]
        if not missing:
            continue
        if time.process_time() > total:
            print("out of time; run again to go on")
            break
        row = visit(maker, missing, seconds)
        table = saved()
        kept = table.get(key, {})
        seconds_before = 0.0 if again else kept.get("cpu_seconds", 0.0)
        table[key] = row | {
            "methods": {**kept.get("methods", {}), **row.get("methods", {})},
            "cpu_seconds": round(row["cpu_seconds"] + seconds_before, 1),
        }
        write(table)
        print(line(key, row), flush=True)
    page = report(saved())
    (RESULTS / "zoo.md").write_text(page, encoding="utf-8")


def saved() -> dict[str, Any]:
    """The rows so far, by family."""
    path = RESULTS / "zoo.json"
    return read_json(path)["families"] if path.is_file() else {}


def write(table: dict[str, Any]) -> None:
    """`zoo.json`, a line for every family."""
    head = json.dumps({"versions": versions(), "columns": COLUMNS})[:-1]
    rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(r)}" for k, r in sorted(table.items()))
    with atomic_write(RESULTS / "zoo.json") as temporary:
        temporary.write_text(f'{head}, "families": {{\n{rows}\n}}}}\n', encoding="utf-8")


def versions() -> dict[str, str]:
    """What the table was made with."""
    return {p: version(p) for p in ("torch", "timm", "open_clip_torch", "diffusers", "transformers", "peft")}


def line(key: str, row: dict[str, Any]) -> str:
    """One family for the terminal: faults in full."""
    marks = Counter("".join(m["marks"] for m in row.get("methods", {}).values()))
    text = f"{key:44} {row.get('model', ''):40} {row['cpu_seconds']:5} s  {dict(marks)} {row.get('skipped', '')}{row.get('stopped', '')}"
    faults = [f"    {m} {c}: {n}" for m, c, n in notes(row, "F")]
    return "\n".join([text, *faults])


def notes(row: dict[str, Any], mark: str) -> Iterator[tuple[str, str, str]]:
    """(method, column, reason) of everything marked so."""
    for method, result in row.get("methods", {}).items():
        for column, letter in zip(COLUMNS, result["marks"], strict=True):
            if letter == mark:
                yield method, column, result.get("notes", {}).get(column, "")


# --- the page ---------------------------------------------------------------------------------------------------------------


def report(table: dict[str, Any]) -> str:
    """`zoo.md`: per library a table of counts, then every fault, what was refused and why, and who is missing."""
    text = [
        "# The zoo\n",
        "Written by `python benchmarks/zoo.py`. Each cell counts models: in order / refused by name / faults. `reached` counts first "
        "calls; a refusal there names modules that the model never calls, and all further columns are those of the retry without them.\n",
        ", ".join(f"{k} {v}" for k, v in versions().items()) + "\n",
    ]
    for library in ("timm", "open_clip", "diffusers", "transformers"):
        rows = {k: r for k, r in table.items() if k.startswith(f"{library}/") and r.get("methods")}
        largest = max((r["parameters"] for r in rows.values()), default=0) / 1e6
        text.append(f"\n## {library}: {len(rows)} models, up to {largest:.0f}M parameters\n")
        text += ["| method | models | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
        for method in list_adapters():
            marks = [r["methods"][method]["marks"] for r in rows.values() if method in r["methods"]]
            if marks:
                cells = [" / ".join(str(sum(m[i] == c for m in marks)) for c in "orF") for i in range(len(COLUMNS))]
                text.append(f"| {method} | {len(marks)} | " + " | ".join(cells) + " |")
    faults = [f"- {k} ({r['model']}), {m}, {c}: {n}" for k, r in table.items() for m, c, n in notes(r, "F")]
    text += ["\n## Faults\n", *(faults or ["None."])]
    text += ["\n## Refused by name\n", *_refusals(table)]
    missing = [
        f"- {k}: {r.get('skipped') or r.get('stopped')}" for k, r in table.items() if "skipped" in r or "stopped" in r
    ]
    return "\n".join([*text, "\n## Not in the table\n", *(missing or ["None."])]) + "\n"


def _refusals(table: dict[str, Any]) -> list[str]:
    """Kinds of refusals with their counts and one example each."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for key, row in table.items():
        for method, column, note in notes(row, "r"):
            kind = re.sub(r"[\[\(].*|\d+", "", note)[:60]
            found.setdefault((method, column, kind), []).append(f"{key}: {note}")
    return [f"- {m}, {c}, {len(v)} models, such as {v[0]}" for (m, c, _), v in sorted(found.items())] or ["None."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="*", help='families, such as "timm/*vit*"')
    parser.add_argument("--methods", nargs="+", help="only these, on every family")
    parser.add_argument("--again", action="store_true", help="also those that are in the table")
    parser.add_argument("--seconds", type=float, default=60, help="CPU time for one family")
    parser.add_argument("--total", type=float, default=2400, help="CPU time for all")
    parser.add_argument("--memory", type=float, default=24, help="address space in GB")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for library in ("timm", "peft"):  # so that the first model does not pay for it
        importlib.import_module(library)
    limit = int(options.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sweep(options.pattern, options.methods, options.again, options.seconds, options.total)


if __name__ == "__main__":
    main()
