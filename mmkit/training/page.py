"""A training report as one HTML file that asks nobody for anything: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from mmkit.charts import Line, line_chart

SIDE = 112
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root {color-scheme: light dark; --bg: #f6f7f9; --card: #ffffff; --ink: #17202e; --soft: #5b6675; --line: #dfe4ea; --accent: #0d7d73;
--good: 13, 148, 136; --bad: 219, 39, 119; --bar: #0d9488; --wrong: #be185d}
@media (prefers-color-scheme: dark) {:root {--bg: #0e131a; --card: #171e28; --ink: #e8edf4; --soft: #9aa7b8; --line: #2b3543;
--accent: #2dd4bf; --good: 45, 212, 191; --bad: 244, 114, 182; --wrong: #f472b6}}
* {box-sizing: border-box}
body {margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif}
main {max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px}
header {display: flex; flex-wrap: wrap; align-items: end; justify-content: space-between; gap: 12px 32px; margin-bottom: 22px}
h1 {font-size: 26px; line-height: 1.2; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere} h1 + p {margin: 4px 0 0; color: var(--soft)}
h2 {font-size: 16px; margin: 0 0 14px}
section {background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px; margin-top: 18px; min-width: 0}
.figures {display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 14px}
.figures div {background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 12px 16px}
.figures b {display: block; font-size: 25px; line-height: 1.25; font-variant-numeric: tabular-nums; letter-spacing: -.01em}
.figures div:first-child b {color: var(--accent)} .figures span, .note {color: var(--soft); font-size: 13px}
.pair {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 18px 28px}
.wide {overflow-x: auto} .wide > :first-child {min-width: min-content}
table {border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums}
th {font-weight: 600; color: var(--soft); font-size: 13px; text-align: left; padding: 4px 10px 8px}
td {padding: 6px 10px; border-top: 1px solid var(--line)} td:first-child, th:first-child {padding-left: 0; overflow-wrap: anywhere}
.n {text-align: right; white-space: nowrap} .bar {min-width: 90px; width: 30%}
.bar i {display: block; height: 8px; border-radius: 4px; background: var(--bar)} .bar {background: none}
.matrix {width: auto; margin: 0 auto; font-size: 12px} .matrix td, .matrix th {border: 2px solid var(--card); padding: 0; text-align: center}
.matrix td {min-width: 30px; height: 30px; border-radius: 5px} .matrix th {padding: 2px 6px; font-weight: 500; max-width: 130px;
overflow: hidden; text-overflow: ellipsis; white-space: nowrap} .matrix tr > th:first-child {text-align: right}
.matrix thead th {height: 1px; vertical-align: bottom} .matrix thead span {writing-mode: vertical-rl; transform: rotate(180deg);
max-height: 110px; overflow: hidden; text-overflow: ellipsis} .small td {min-width: 11px; height: 13px; font-size: 0}
.wrong {display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 14px}
.wrong figure {margin: 0; min-width: 0} .wrong img {width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--bg); border-radius: 8px;
border: 1px solid var(--line); image-rendering: auto} .wrong figcaption {font-size: 13px; line-height: 1.35; margin-top: 6px; overflow-wrap: anywhere}
.wrong s {color: var(--wrong); text-decoration: none; font-weight: 600} .wrong small {display: block; color: var(--soft)}
dl {display: grid; grid-template-columns: max-content 1fr; gap: 6px 22px; margin: 0} dt {color: var(--soft)} dd {margin: 0; overflow-wrap: anywhere}
details {margin-top: 12px} summary {cursor: pointer; color: var(--soft)} code, pre {font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace}
pre {margin: 6px 0 14px; padding: 11px 14px; background: var(--bg); border: 1px solid var(--line); border-radius: 8px; overflow-x: auto}
.sites code {display: inline-block; margin: 0 10px 2px 0} a {color: var(--accent)}
.studio-chart {margin: 0} .studio-chart figcaption {display: flex; justify-content: space-between; gap: 12px}
.studio-chart em {font-style: normal; color: var(--soft); white-space: nowrap} .studio-chart svg {width: 100%; height: auto; display: block}
.studio-chart text {font-size: 11px; fill: var(--soft)} .studio-chart .grid {stroke: var(--line)}
.studio-chart div {display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; color: var(--soft)}
.studio-chart div i {display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 6px}
@media (max-width: 560px) {main {padding: 20px 12px 40px} section {padding: 16px 14px} dl {grid-template-columns: 1fr; gap: 0} dd {margin-bottom: 8px}
.figures {grid-template-columns: 1fr 1fr; gap: 10px}}
@media print {section {break-inside: avoid}}
"""


def report_page(report: Mapping[str, Any], thumbnails: Sequence[Image.Image | None] = ()) -> str:
    """The page of a report as `finetune` writes it; every name in it is text, whatever it holds.

    Args:
        report: "title", "subtitle", "figures" [(name, value)], "history", "losses", "answers" (`Answers.report`, or None), "trained"
            [(name, value)], "sites", "next" [(what for, command)], "rows" (a table of several runs: a list of rows of cells, the
            heading first); what is missing is left out.
        thumbnails: a picture for each of the most wrong answers, or None.
    """
    answers = report.get("answers")
    parts = [
        _header(report),
        _compared(report.get("rows")),
        _curves(report.get("history") or [], report.get("losses") or []),
        _classes(answers) if answers else "",
        _wrong(answers, thumbnails) if answers else "",
        _trained(report),
        _next(report.get("next") or []),
    ]
    title = escape(str(report.get("title", "Report")))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>{_STYLE}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _header(report: Mapping[str, Any]) -> str:
    figures = "".join(
        f"<div><b>{escape(str(value))}</b><span>{escape(str(name))}</span></div>"
        for name, value in report.get("figures", ())
    )
    return (
        f"<header><div><h1>{escape(str(report.get('title', 'Report')))}</h1><p>{escape(str(report.get('subtitle', '')))}</p></div>"
        f'</header><div class="figures">{figures}</div>'
    )


def _section(title: str, body: str, note: str = "") -> str:
    told = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{body}{told}</section>"


def _compared(rows: Sequence[Sequence[Any]] | None) -> str:
    if not rows:
        return ""

    def line(cells: Sequence[Any], tag: str) -> str:
        kinds = ["", *[' class="n"'] * (len(cells) - 1)]
        return "".join(f"<{tag}{k}>{escape(str(c))}</{tag}>" for k, c in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows[1:])
    return _section(
        "Side by side",
        f'<div class="wide"><table><thead><tr>{line(rows[0], "th")}</tr></thead><tbody>{body}</tbody></table></div>',
    )


def _curves(history: Sequence[Mapping[str, float]], losses: Sequence[tuple[int, float]]) -> str:
    charts = []
    points = [(float(s), float(v)) for s, v in losses]
    if len(points) > 1:
        top = sorted(v for _, v in points)[int(0.98 * (len(points) - 1))] * 1.05
        lines = [Line("each step", points), Line("mean of the epoch", [(h["step"], h["train_loss"]) for h in history])]
        held = [
            (h["step"], h["val_loss" if "val_loss" in h else "loss"]) for h in history if "val_loss" in h or "loss" in h
        ]
        lines += [Line("held-out pictures", held)] if held else []
        top = max(top, *(v for _, v in held)) if held else top
        charts.append(line_chart("Loss", "step", lines, (points[0][0], points[-1][0]), (0.0, max(top, 1e-6))))
    right = [(h["epoch"], 100 * h["accuracy"]) for h in history if "accuracy" in h]
    if right:
        best = max(range(len(right)), key=lambda i: right[i][1])
        low = max(0.0, min(v for _, v in right) // 10 * 10 - 10)
        span = (min(right[0][0], 1.0), max(right[-1][0], right[0][0] + 1))
        note = f"best {right[best][1]:.1f} % after {right[best][0]:g}"
        charts.append(
            line_chart("Accuracy, %", "epoch", [Line("", right, mark=best)], span, (low, 100.0), "{:.0f}", note)
        )
    return _section("Curves", f'<div class="pair">{"".join(charts)}</div>') if charts else ""


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _classes(answers: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><td>{escape(r["class"])}</td><td class="n">{r["n"]:,}</td><td class="n">{_percent(r["precision"])}</td>'
        f'<td class="n">{_percent(r["recall"])}</td><td class="bar"><i style="width:{100 * (r["f1"] or 0):.0f}%"></i></td></tr>'
        for r in answers["per_class"]
    )
    head = '<th>class</th><th class="n">n</th><th class="n">precision</th><th class="n">recall</th><th>F1</th>'
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    matrix = _matrix(answers) or _confused(answers)
    note = "Precision: of what it calls so, how much is. Recall: of what is so, how much it finds. Rows of the matrix are the truth."
    return _section(
        f"Class by class, of {answers['n']:,} {answers.get('of', 'held-out')} examples",
        f'<div class="pair">{table}{matrix}</div>',
        note,
    )


def _matrix(answers: Mapping[str, Any]) -> str:
    table = answers.get("confusion")
    if not table:
        return ""
    names = [r["class"] for r in answers["per_class"]]
    head = "".join(f'<th scope="col" title="{escape(n)}"><span>{escape(n)}</span></th>' for n in names)
    rows = []
    for i, row in enumerate(table):
        cells = []
        total = sum(row) or 1
        for j, n in enumerate(row):
            told = escape(f"{names[i]}, answered {names[j]}: {n}")
            ground = f"rgba(var(--{'good' if i == j else 'bad'}), {0.12 + 0.6 * n / total:.2f})" if n else "transparent"
            cells.append(f'<td title="{told}" style="background:{ground}">{n or ""}</td>')
        rows.append(f'<tr><th scope="row" title="{escape(names[i])}">{escape(names[i])}</th>{"".join(cells)}</tr>')
    small = " small" if len(names) > 20 else ""
    return f'<div class="wide"><table class="matrix{small}"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _confused(answers: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><td>{escape(c["truth"])}</td><td>{escape(c["answer"])}</td><td class="n">{c["n"]}</td></tr>'
        for c in answers["confused"]
    )
    head = '<th>most often confused</th><th>answered</th><th class="n">n</th>'
    return f"<div><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def data_uri(image: Image.Image, side: int = SIDE) -> str:
    """A small copy of a picture for an `img` tag; what is smaller is enlarged by whole factors, so that its pixels are seen."""
    picture = image.convert("RGB")
    factor = side // max(picture.size)
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((2 * side, 2 * side))
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=78)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _wrong(answers: Mapping[str, Any], thumbnails: Sequence[Image.Image | None]) -> str:
    found = answers["most_wrong"]
    if not found:
        return _section("Most wrong", f'<p class="note">None: all {answers["n"]:,} answers are right.</p>')
    figures = []
    for i, row in enumerate(found):
        picture = thumbnails[i] if i < len(thumbnails) else None
        shown = f'<img alt="{escape(row["file"])}" src="{data_uri(picture)}">' if picture is not None else ""
        figures.append(
            f"<figure>{shown}<figcaption><s>{escape(row['answer'])}</s> {100 * row['score']:.0f} %<br>is {escape(row['truth'])}"
            f"<small>{escape(row['file'])}</small></figcaption></figure>"
        )
    return _section("Most wrong, the surest first", f'<div class="wrong">{"".join(figures)}</div>')


def _trained(report: Mapping[str, Any]) -> str:
    facts = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in report.get("trained", ()))
    sites = report.get("sites") or []
    shown = " ".join(f"<code>{escape(str(s))}</code>" for s in sites)
    where = f'<details><summary>{len(sites)} places</summary><p class="sites">{shown}</p></details>' if sites else ""
    settings = report.get("settings")
    how = (
        f"<details><summary>run.toml: all settings</summary><pre>{escape(str(settings))}</pre></details>"
        if settings
        else ""
    )
    return _section("What was trained", f"<dl>{facts}</dl>{where}{how}") if facts else ""


def _next(commands: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<div>{escape(what)}</div><pre>{escape(command)}</pre>" for what, command in commands)
    return _section("Next", body) if body else ""
