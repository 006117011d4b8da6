"""What the fine-tune lab shows, as pure functions: HTML, tables and curves out of a plan, a run and its report."""

from __future__ import annotations

import base64
import html
import io
import math
from typing import Any

from PIL import Image

from mmkit.backbones import backbone_info
from mmkit.charts import Line, line_chart
from mmkit.vision.classification import Prepared


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
            ("file to take away, about", size(4 * trained)),
        ]
    )


def result_figures(report: dict[str, Any]) -> str:
    """Accuracy, trained numbers, file size, time and merge error of a finished run."""
    right = "-" if report["accuracy"] is None else percent(report["accuracy"])
    items = [
        ("held-back pictures right", right),
        ("numbers trained", f"{report['trainable_parameters']:,}"),
        ("file to take away", size(report["file_size"])),
        ("training time", f"{report['seconds']:.1f} s"),
    ]
    if report["merge_error"] is not None:
        items.append(("merge error (logits)", f"{report['merge_error']:.0e}" if report["merge_error"] else "0"))
    return figures(items)


RUN_HEADERS = ["Run", "Pictures", "Backbone", "Right", "Trained", "File", "Seconds", "Ended"]


def runs_table(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Rows under `RUN_HEADERS`, newest first."""
    return [
        [
            r["run"], r["pictures"], r["backbone"], "-" if r["accuracy"] is None else percent(r["accuracy"]),
            f"{r['trainable_parameters']:,}", size(r["file_size"]), f"{r['seconds']:.1f}", r["stopped"],
        ]
        for r in reversed(runs)
    ]  # fmt: skip


def loss_curve(losses: list[tuple[int, float]], total: int = 0, points: int = 150) -> str:
    """Training loss over the steps, up to `total`; long runs are averaged down to `points` points."""
    count = -(-len(losses) // points) or 1
    chunks = [losses[i : i + count] for i in range(0, len(losses), count)]
    line = [(float(c[-1][0]), sum(y for _, y in c) / len(c)) for c in chunks]
    top = max((y for _, y in line), default=1.0)
    last = f"{losses[-1][1]:.3f}" if losses else ""
    right = max(total, losses[-1][0] if losses else 1, 2)
    return line_chart(
        "Training loss", "step", [Line("", line)], (1, right), (0, math.ceil(2 * top) / 2 or 1.0), note=last
    )


Curve = tuple[str, list[tuple[float, float]]]
"""A run's name, and (epoch, share of held-back pictures that are right) at each evaluation."""


def accuracy_curve(runs: list[Curve], pictures: str = "", epochs: float = 1) -> str:
    """Share of held-back pictures that are right, a line per run on the same `pictures`. The ring marks the epoch that is kept."""
    shown = [(name, points) for name, points in runs if points]
    right = max([epochs, 2, *(points[-1][0] for _, points in shown)])
    lines = [Line(name, points, mark=best_epoch(points)) for name, points in shown]
    note = f"best {percent(runs[-1][1][best_epoch(runs[-1][1])][1])}" if runs and runs[-1][1] else ""
    title = "Held-back pictures right" + (f", {pictures}" if pictures else "")
    return line_chart(title, "epoch", lines, (0, right), (0, 1), "{:.0%}", note)


def best_epoch(points: list[tuple[float, float]]) -> int:
    """Index of the evaluation whose weights are kept: the first of the best."""
    return max(range(len(points)), key=lambda i: (points[i][1], -i))


def strip(pictures: list[tuple[Image.Image, str]], side: int = 56) -> str:
    """Small pictures in a row with their names, inside the page itself."""
    cells = []
    for picture, name in pictures:
        small = picture.copy()
        small.thumbnail((2 * side, 2 * side))
        file = io.BytesIO()
        small.save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
        text = html.escape(name)
        cells.append(f'<div><img src="data:image/png;base64,{data}" alt="Example of {text}"><span>{text}</span></div>')
    return f'<div class="ft-strip">{"".join(cells)}</div>'


def percent(share: float) -> str:
    """0.9123 -> "91.2 %"."""
    return f"{100 * share:.1f} %"


def size(count: float) -> str:
    """Bytes for people: "12 kB", "3.4 MB"."""
    return f"{count / 1e3:,.0f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"
