"""What the Fine-tune lab shows, as pure functions: HTML, tables and curves out of a plan, a run and its report."""

from __future__ import annotations

import base64
import html
import io
import math
from typing import Any

from PIL import Image

from mmkit.backbones import backbone_info
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


RUN_HEADERS = ["Run", "Backbone", "Right", "Trained", "File", "Seconds", "Ended"]


def runs_table(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Rows under `RUN_HEADERS`, newest first."""
    return [
        [
            r["run"], r["backbone"], "-" if r["accuracy"] is None else percent(r["accuracy"]),
            f"{r['trainable_parameters']:,}", size(r["file_size"]), f"{r['seconds']:.1f}", r["stopped"],
        ]
        for r in reversed(runs)
    ]  # fmt: skip


COLORS = ("#0d9488", "#d97706", "#7c3aed", "#db2777", "#2563eb", "#65a30d")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 196, 40, 14, 8, 36


def loss_curve(losses: list[tuple[int, float]], total: int = 0, points: int = 150) -> str:
    """Training loss over the steps, up to `total`; long runs are averaged down to `points` points."""
    count = -(-len(losses) // points) or 1
    chunks = [losses[i : i + count] for i in range(0, len(losses), count)]
    line = [(float(c[-1][0]), sum(y for _, y in c) / len(c)) for c in chunks]
    top = max((y for _, y in line), default=1.0)
    last = f"{losses[-1][1]:.3f}" if losses else ""
    right = max(total, losses[-1][0] if losses else 1, 2)
    return _chart("Training loss", "step", [("", line)], (1, right), (0, math.ceil(2 * top) / 2 or 1.0), "{:.2f}", last)


def accuracy_curve(runs: list[tuple[str, list[tuple[float, float]]]], epochs: float = 1) -> str:
    """Share of held-back pictures that are right, over the epochs, for `(run, [(epoch, accuracy)])`; runs have their own colors."""
    shown = [(name, points) for name, points in runs if points]
    right = max([epochs, 2, *(points[-1][0] for _, points in shown)])
    last = percent(runs[-1][1][-1][1]) if runs and runs[-1][1] else ""
    return _chart("Held-back pictures right", "epoch", shown, (0, right), (0, 1), "{:.0%}", last)


def _chart(
    title: str,
    axis: str,
    series: list[tuple[str, list[tuple[float, float]]]],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    number: str,
    last: str,
) -> str:
    """Lines as inline SVG in the page's colors, with the newest value in the title and a legend for named series."""

    def x(v: float) -> float:
        return LEFT + (v - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)

    def y(v: float) -> float:
        return HEIGHT - BOTTOM - (v - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)

    parts = []
    ticks = {round(x_range[0] + i / 4 * (x_range[1] - x_range[0])) for i in range(5)}
    parts += [f'<text x="{x(t):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{t}</text>' for t in sorted(ticks)]
    for i in range(5):
        v = y_range[0] + i / 4 * (y_range[1] - y_range[0])
        parts.append(f'<path class="grid" d="M{LEFT} {y(v):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{number.format(v)}</text>')
    first = max(0, len(series) - len(COLORS))
    for i, (_, points) in enumerate(series[first:]):
        path = "L".join(f"{x(a):.1f} {y(min(max(b, y_range[0]), y_range[1])):.1f}" for a, b in points)
        end = path.rpartition("L")[2].split(" ") if path else None
        parts.append(f'<path d="M{path}" fill="none" stroke="{COLORS[i]}" stroke-width="2"/>' if path else "")
        parts.append(f'<circle cx="{end[0]}" cy="{end[1]}" r="3" fill="{COLORS[i]}"/>' if end else "")
    legend = "".join(
        f'<span><i style="background:{COLORS[i]}"></i>{html.escape(name)}</span>'
        for i, (name, _) in enumerate(series[first:])
        if name
    )
    return (
        f'<figure class="ft-chart"><figcaption><b>{title}</b><em>{last}</em></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} {last}">{"".join(parts)}'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{axis}</text></svg><div>{legend}</div></figure>'
    )


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


CSS = """<style>
.ft-figures {display: flex; flex-wrap: wrap; gap: 8px 26px; padding: 2px;}
.ft-figures div {display: flex; flex-direction: column;}
.ft-figures b {font-size: 1.45em; line-height: 1.25; color: var(--body-text-color); font-variant-numeric: tabular-nums;}
.ft-figures span {color: var(--body-text-color-subdued); font-size: .9em;}
.ft-map {max-height: 330px; overflow-y: auto;}
.ft-map table {width: 100%; border-collapse: collapse; font-size: .9em; border: 0 !important; margin: 0 !important;}
.ft-map tr {border: 0 !important; background: none !important;}
.ft-map th, .ft-map td {text-align: left; padding: 4px 8px !important; border: 0 !important; color: var(--body-text-color);}
.ft-map td {border-top: 1px solid var(--border-color-primary) !important; font-variant-numeric: tabular-nums;}
.ft-map th {font-weight: 600; color: var(--body-text-color-subdued);}
.ft-map td:nth-child(1) {white-space: nowrap; font-family: var(--font-mono);}
.ft-map td:nth-child(2) {width: 24%;}
.ft-map th:nth-child(3), .ft-map td:nth-child(3) {white-space: nowrap; text-align: right;}
.ft-map td:nth-child(4) {color: var(--body-text-color-subdued); font-family: var(--font-mono); font-size: .92em;}
.ft-map i {display: block; height: 12px; border-radius: 3px; background: var(--color-accent);}
.ft-map tr.off td {color: var(--body-text-color-subdued);}
.ft-chart {margin: 0;}
.ft-chart figcaption {display: flex; justify-content: space-between; color: var(--body-text-color);}
.ft-chart em {font-style: normal; font-variant-numeric: tabular-nums;}
.ft-chart svg {width: 100%; height: auto; display: block;}
.ft-chart text {font-size: 11px; fill: var(--body-text-color-subdued);}
.ft-chart .grid {stroke: var(--border-color-primary); stroke-width: 1;}
.ft-chart div {display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .9em; min-height: 1.4em; color: var(--body-text-color);}
.ft-chart div i {display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 5px;}
.ft-strip {display: flex; flex-wrap: wrap; gap: 8px;}
.ft-strip div {display: flex; flex-direction: column; align-items: center; width: 56px;}
.ft-strip img {width: 56px; height: 56px; object-fit: cover; border-radius: 6px;}
.ft-strip span {font-size: .85em; max-width: 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;}
#finetune-image img {object-fit: contain; width: 100%; height: 100%; image-rendering: pixelated;}
</style>"""
"""Style of the pieces above, inside the page that uses them."""
