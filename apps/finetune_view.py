"""What the Fine-tune lab shows, as pure functions: HTML, tables and curves out of a plan, a run and its report."""

from __future__ import annotations

import html
from typing import Any

import pandas as pd

from mmkit.backbones import backbone_info
from mmkit.finetune import Prepared


def trained_sites(prepared: Prepared) -> list[tuple[str, int]]:
    """(module path, trained numbers) in the order of the model; parameters outside any site count under their own module."""
    if prepared.adapter is None:
        named: Any = [(k, p) for k, p in prepared.model.named_parameters() if p.requires_grad]
        sites: list[str] = []
    else:
        named, sites = prepared.adapter.trainable_parameters(), prepared.adapter.site_paths
    counts: dict[str, int] = {}
    for name, parameter in named:
        owners = [s for s in sites if name.startswith(f"{s}.")]
        owner = max(owners, key=len) if owners else name.rpartition(".")[0] or name
        counts[owner] = counts.get(owner, 0) + parameter.numel()
    order = {name: i for i, (name, _) in enumerate(prepared.model.named_modules())}
    return sorted(counts.items(), key=lambda item: order.get(item[0], len(order)))


def model_map(prepared: Prepared) -> str:
    """The model from input to output as a column of bars: what stays frozen, and how many numbers are trained where."""
    blocks = backbone_info(prepared.model).blocks
    total: dict[str, int] = {}
    for name, parameter in prepared.model.named_parameters():
        part = _part(name, blocks)
        total[part] = total.get(part, 0) + parameter.numel()
    trained: dict[str, list[tuple[str, int]]] = {}
    for path, count in trained_sites(prepared):
        trained.setdefault(_part(f"{path}.", blocks), []).append((path, count))
    most = max((sum(n for _, n in sites) for sites in trained.values()), default=1)
    rows = []
    for part in [*total, *(p for p in trained if p not in total)]:
        sites = trained.get(part, [])
        count = sum(n for _, n in sites)
        inside = ", ".join(dict.fromkeys(p.removeprefix(part).lstrip(".") or "whole" for p, _ in sites))
        width = max(2, round(100 * count / most)) if count else 0
        rows.append(
            f'<tr class="{"on" if count else "off"}"><td>{html.escape(part)}</td><td><i style="width:{width}%"></i></td>'
            f"<td>{f'{count:,}' if count else 'frozen'}</td><td>{html.escape(inside)}</td></tr>"
        )
    head = "<tr><th>Part of the model</th><th></th><th>Trained</th><th>At</th></tr>"
    return f'<div class="ft-map"><table>{head}{"".join(rows)}</table></div>'


def _part(name: str, blocks: tuple[str, ...]) -> str:
    return next((b for b in blocks if name.startswith(f"{b}.")), name.split(".")[0])


def figures(items: list[tuple[str, str]]) -> str:
    """A row of large figures with a label under each: (label, figure)."""
    cells = "".join(f"<div><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>" for k, v in items)
    return f'<div class="ft-figures">{cells}</div>'


def plan_figures(prepared: Prepared) -> str:
    """Trained and total numbers, their share, and the size of the file they will take."""
    plan = prepared.describe()
    trained, total = plan["trainable_parameters"], plan["total_parameters"]
    sites = len(trained_sites(prepared))
    return figures(
        [
            ("numbers are trained", f"{trained:,}"),
            (f"of {total:,} in the model", f"{100 * trained / total:.1f} %"),
            ("places in the model", str(sites)),
            ("to take away", size(4 * trained)),
        ]
    )


def result_figures(report: dict[str, Any]) -> str:
    """Accuracy, trained numbers, file size, time and merge error of a finished run."""
    items = [
        (
            "of the held-back pictures right",
            "not measured" if report["accuracy"] is None else percent(report["accuracy"]),
        ),
        ("numbers trained", f"{report['trainable_parameters']:,}"),
        ("to take away", size(report["file_size"])),
        ("of training", f"{report['seconds']:.1f} s"),
    ]
    if report["merge_error"] is not None:
        items.append(("change of a logit by merging", f"{report['merge_error']:.0e}"))
    return figures(items)


RUN_HEADERS = ["Run", "Method", "Backbone", "Right", "Trained numbers", "File", "Seconds", "Ended"]


def runs_table(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Rows under `RUN_HEADERS`, newest first."""
    return [
        [
            r["run"], r["method"], r["backbone"], "-" if r["accuracy"] is None else percent(r["accuracy"]),
            f"{r['trainable_parameters']:,}", size(r["file_size"]), f"{r['seconds']:.1f}", r["stopped"],
        ]
        for r in reversed(runs)
    ]  # fmt: skip


def loss_curve(losses: list[tuple[int, float]], points: int = 200) -> pd.DataFrame:
    """Columns step, loss; long runs are averaged down to `points` rows."""
    frame = pd.DataFrame(losses, columns=["step", "loss"]).astype({"step": int, "loss": float})
    if len(frame) > points:
        frame = frame.groupby(frame.index * points // len(frame)).agg({"step": "max", "loss": "mean"})
    return frame


def accuracy_curve(runs: list[tuple[str, list[tuple[float, float]]]]) -> pd.DataFrame:
    """Columns epoch, right (percent), run for `(run, [(epoch, accuracy)])`."""
    rows = [(epoch, 100 * accuracy, name) for name, points in runs for epoch, accuracy in points]
    return pd.DataFrame(rows, columns=["epoch", "right", "run"]).astype({"epoch": float, "right": float})


def percent(share: float) -> str:
    """0.9123 -> "91.2 %"."""
    return f"{100 * share:.1f} %"


def size(count: float) -> str:
    """Bytes for people: "12 kB", "3.4 MB"."""
    return f"{count / 1e3:,.0f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"


CSS = """<style>
.ft-figures {display: flex; flex-wrap: wrap; gap: 8px 36px; padding: 6px 2px;}
.ft-figures div {display: flex; flex-direction: column;}
.ft-figures b {font-size: 1.7em; line-height: 1.25; color: var(--body-text-color); font-variant-numeric: tabular-nums;}
.ft-figures span {color: var(--body-text-color-subdued); font-size: .9em;}
.ft-map {max-height: 330px; overflow-y: auto;}
.ft-map table {width: 100%; border-collapse: collapse; font-size: .9em;}
.ft-map th {text-align: left; font-weight: 600; padding: 3px 8px; color: var(--body-text-color-subdued);}
.ft-map td {padding: 3px 8px; border-top: 1px solid var(--border-color-primary); font-variant-numeric: tabular-nums;}
.ft-map td:nth-child(1) {white-space: nowrap; font-family: var(--font-mono);}
.ft-map td:nth-child(2) {width: 26%;}
.ft-map td:nth-child(3) {white-space: nowrap; text-align: right;}
.ft-map td:nth-child(4) {color: var(--body-text-color-subdued); font-family: var(--font-mono); font-size: .92em;}
.ft-map i {display: block; height: 12px; border-radius: 3px; background: var(--color-accent);}
.ft-map tr.off td {color: var(--body-text-color-subdued);}
</style>"""
"""Style of the pieces above, inside the page that uses them."""
