"""A training report as one HTML file that asks nobody for anything: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from mmkit.charts import Line, line_chart

SIDE = 112
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = Path(__file__).with_name("report.css")


def report_page(report: Mapping[str, Any], thumbnails: Sequence[Image.Image | None] = ()) -> str:
    """The page of a report as `finetune` writes it; every name in it is text, whatever it holds.

    Args:
        report: "title", "subtitle", "figures" [(name, value)], "history", "losses", "answers" (`Answers.report`, or None), "trained"
            [(name, value)], "sites", "next" [(what for, command)], "rows" (a table of several runs: a list of rows of cells, the
            heading first), "measure" (what of the history is drawn, default "accuracy"), "table" (title, rows, note), "pictures"
            (title, [(caption, name, wide picture)]); what is missing is left out.
        thumbnails: a picture for each of the most wrong answers, or None.
    """
    answers = report.get("answers")
    parts = [
        _header(report),
        _table("Side by side", report.get("rows") or []),
        _curves(report.get("history") or [], report.get("losses") or [], report.get("measure", "accuracy")),
        _table(*report.get("table", ("", []))),
        _pictures(*report.get("pictures", ("", []))),
        _classes(answers) if answers else "",
        _wrong(answers, thumbnails) if answers else "",
        _trained(report),
        _next(report.get("next") or []),
    ]
    title, style = escape(str(report.get("title", "Report"))), _STYLE.read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>{style}</style></head>'
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


def _table(title: str, rows: Sequence[Sequence[Any]], note: str = "") -> str:
    if not rows:
        return ""

    def line(cells: Sequence[Any], tag: str) -> str:
        kinds = ["", *[' class="n"'] * (len(cells) - 1)]
        return "".join(f"<{tag}{k}>{escape(str(c))}</{tag}>" for k, c in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows[1:])
    head = f"<thead><tr>{line(rows[0], 'th')}</tr></thead>"
    return _section(title, f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>', note)


def _pictures(title: str, rows: Sequence[tuple[str, str, Image.Image]]) -> str:
    figures = [
        f'<figure><img alt="{escape(name)}" src="{data_uri(picture, 3 * SIDE)}">'
        f"<figcaption>{escape(caption)}<small>{escape(name)}</small></figcaption></figure>"
        for caption, name, picture in rows
    ]
    return _section(title, f'<div class="wrong strips">{"".join(figures)}</div>') if rows else ""


def _curves(history: Sequence[Mapping[str, float]], losses: Sequence[tuple[int, float]], measure: str) -> str:
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
    measured = [h for h in history if measure in h]
    right = [(h["epoch"], 100 * h[measure]) for h in measured]
    if right:
        best = max(
            range(len(right)), key=lambda i: (right[i][1], -measured[i].get("val_loss", measured[i].get("loss", 0.0)))
        )
        low = max(0.0, min(v for _, v in right) // 10 * 10 - 10)
        span = (min(right[0][0], 1.0), max(right[-1][0], right[0][0] + 1))
        note = f"best {right[best][1]:.1f} % after {right[best][0]:g}"
        charts.append(
            line_chart(
                f"{measure.capitalize()}, %", "epoch", [Line("", right, mark=best)], span, (low, 100.0), "{:.0f}", note
            )
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
    body = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table class="matrix{small}">{body}</table></div>'


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
