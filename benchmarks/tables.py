"""Write the figures of README and docs from the files that the benchmarks wrote: `python benchmarks/tables.py`, `--check` only looks.

A figure stands between two comments, the first of which says where it comes from, how it is scaled and how it is printed:

    <!-- =slam "drawn room: cpu_small" ate_rmse x100 .2f -->0.08<!-- / -->

The first word is a file of benchmarks/results (or `weights`, the manifest of bundled weights by name), then come keys: of a mapping, with
wildcards; a position in a list; `method=ssf` for the entries of a list that have it, several
in a row for those that have all. Several values become their mean. `a:b` divides.
A table stands between `<!-- table performance -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import re
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FIGURE = re.compile(r"<!-- =(.*?) -->(.*?)<!-- / -->", re.S)
TABLE = re.compile(r"<!-- table (\w+) -->\n(.*?)<!-- end -->", re.S)

PERFORMANCE = (  # what, where, how long beside it: each a figure of FIGURE's kind
    ("a ViT-S with an SSF adapter, merged", "the same without", "adapters rows 'model=ssf merged' ratio_median .2f"),
    ("with LoRA, merged", "the same without", "adapters rows 'model=lora merged' ratio_median .2f"),
    ("with LoRA, attached", "the same without", "adapters rows model=lora ratio_median .2f"),
    ("`fit`, a step of `tiny_vit`", "a loop written by hand", "fit_overhead rows case=tiny_vit ratio .2f"),
    ("a video ViT by ZeroI2V, merged", "the image ViT", "video cost time_merged_over_image .2f"),
    ("PIIP-TSB at 368 pixels", "its large model alone", "piip cost rows PIIP-TSB cpu_seconds_over_single .2f"),
    ("rasteriser, 50,000 Gaussians, with gradients", "plain torch",
     "rasterizer cpu rows 1 ms both : rasterizer cpu rows 1 torch_ms both .3f"),
    ("selective scan, 4,096 steps, 128 channels", "mambapy's parallel scan",
     "selective_scan rows 5 ms cpu : selective_scan rows 5 ms 'mambapy pscan' .2f"),
    ("farthest points, 8 clouds of 8,192", "open3d", "point_ops rows 1 mmkit : point_ops rows 1 open3d .2f"),
    ("neighbours, 8 clouds of 8,192", "open3d", "point_ops rows 4 mmkit : point_ops rows 4 open3d .2f"),
)  # fmt: skip


@functools.cache
def _file(name: str) -> Any:
    if name == "weights":
        entries = json.loads((ROOT / "mmkit/weights/manifest.json").read_text(encoding="utf-8"))
        return {entry["name"]: entry for entry in entries}
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))


def _step(value: Any, key: str) -> list[Any]:
    """What `key` finds in one value: nothing, or one or several entries."""
    if isinstance(value, dict) and "=" in key:
        name, _, wanted = key.partition("=")
        return [value] if str(value.get(name)) == wanted else []
    if isinstance(value, dict):
        return [value[k] for k in value if k == key] or [v for k, v in value.items() if fnmatch.fnmatchcase(k, key)]
    if isinstance(value, list) and key.lstrip("-").isdigit():
        return [value[int(key)]]
    if isinstance(value, list):
        name, _, wanted = key.partition("=")
        return [entry for entry in value if str(entry.get(name)) == wanted]
    return []


def _number(words: list[str]) -> float:
    scale = 1.0
    if words[-1].startswith("x"):
        scale = float(words.pop()[1:])
    found = [_file(words[0])]
    for key in words[1:]:
        found = [entry for value in found for entry in _step(value, key)]
    if not found:
        raise KeyError(f"{' '.join(words)}: no such result")
    return scale * statistics.fmean(float(v) for v in found)


def figure(where: str) -> str:
    """The figure that `where` names, as it is printed. Raises `KeyError` when the results have none."""
    *words, how = shlex.split(where)
    if ":" in words:
        middle = words.index(":")
        return format(_number(words[:middle]) / _number(words[middle + 1 :]), how)
    if words[-1] == "x100":  # rounded as a share, as the benchmarks print it
        return format(_number(words[:-1]), how.replace("f", "%")).removesuffix("%")
    return format(_number(words), how)


def table(name: str) -> str:
    """A table: `performance`, `weights` (what is bundled), `defaults` (what it can do), `reproduced`, `point_peft` or `difffit`."""
    if name == "performance":
        lines = ["| | beside | time it takes | measured by |", "|---|---|---|---|"]
        for what, beside, where in PERFORMANCE:
            lines.append(f"| {what} | {beside} | × {figure(where)} | `{where.split()[0]}` |")
    elif name == "weights":
        lines = ["| name | what it can do | score | trained on | license |", "|---|---|---|---|---|"]
        for entry in _file("weights").values():
            score = ", ".join(f"{key} {value}" for key, value in list(entry["score"].items())[:4])
            lines.append(f"| `{entry['name']}` | {entry['summary']} | {score} | {entry['data']} | {entry['license']} |")
    elif name == "defaults":
        lines = (ROOT / "benchmarks/results/defaults.md").read_text(encoding="utf-8").splitlines()
    elif name == "reproduced":
        lines = [
            "| weights | made again: score | bundled file: score | apart | made twice | CPU minutes |",
            "|---|---|---|---|---|---|",
        ]
        twice = {True: "the same file", False: "another file", None: "not tried"}
        for weights, row in sorted(_file("reproduce").items()):
            scores = [
                ", ".join(f"{k} {v}" for k, v in list(row[of].items())[:3])
                for of in ("score", "score of the bundled file")
            ]
            apart = "nothing: the same bytes" if row["same"] else f"{100 * row['difference']:.1f} %"
            lines.append(
                f"| `{weights}` | {scores[0]} | {scores[1]} | {apart} | {twice[row.get('same again')]} | {row['cpu_minutes']} |"
            )
    elif name == "point_peft":
        lines = ["| accuracy, mean of 3 seeds | trained | drawn scans | real meshes, any pose |", "|---|---|---|---|"]
        for method in ("linear probe", "LoRA", "PointGST", "Point-PEFT", "IDPT", "full", "from scratch"):
            runs = f"runs '{method} / ?'"
            shares = [figure(f"point_peft {data} {runs} accuracy x100 .1f") for data in ("scans", "meshes")]
            lines.append(
                f"| {method} | {figure(f'point_peft scans {runs} trained ,.0f')} | {shares[0]} % | {shares[1]} % |"
            )
    elif name == "difffit":
        text = (ROOT / "benchmarks/results/difffit.md").read_text(encoding="utf-8")
        lines = [line for line in text.split("## In short")[1].split("##")[0].splitlines() if line.startswith("|")]
    else:
        raise KeyError(f"no table {name!r}")
    return "".join(line + "\n" for line in lines)


def documents() -> list[Path]:
    """README and the pages of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rewritten(text: str) -> str:
    """The same text with the figures and tables of the results as they are."""
    text = FIGURE.sub(lambda m: f"<!-- ={m[1]} -->{figure(m[1])}<!-- / -->", text)
    return TABLE.sub(lambda m: f"<!-- table {m[1]} -->\n\n{table(m[1])}\n<!-- end -->", text)


def main() -> None:
    """Write, or say what would change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail when something would change")
    check = parser.parse_args().check
    stale = []
    for path in documents():
        old = path.read_text(encoding="utf-8")
        new = rewritten(old)
        if new != old:
            stale.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(new, encoding="utf-8")
    if stale:
        print(("stale: " if check else "written: ") + ", ".join(stale))
    sys.exit(bool(stale) and check)


if __name__ == "__main__":
    main()
