"""Which method: what each reaches with how much, measured on three data sets; the figures are those of `benchmarks/pareto.py`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gradio as gr

from mmkit.apps.frame import App, readable
from mmkit.apps.handlers import plain
from mmkit.charts import Dot, frontier, scatter_chart
from mmkit.errors import InputError
from mmkit.storage import read_json

FILE = Path(__file__).with_name("pareto.json")
AXES: dict[str, tuple[str, float, str]] = {
    "Accuracy": ("accuracy", 100, "test accuracy, %"),
    "Trained": ("bytes", 1, "bytes of what is trained"),
    "File": ("file", 1, "bytes of the saved adapter with its classifier"),
    "Training cost": ("cost", 1, "CPU time of the training, in forward passes over the same pictures"),
    "Memory": ("memory", 1, "bytes a step of 32 pictures holds besides the weights"),
    "Drift": ("drift", 100, "how far features of foreign pictures moved, %"),
}
"""Shown name -> field, factor, what it means."""
_LOG = {"bytes", "file", "memory"}

HELP = """
Each point is a way to adapt the same small network to the same few pictures. **Left and up is better**: the line joins the methods that
nothing smaller equals. Point at a dot for its figures, or read the table. One small network and three small sets tell which methods to
try first, not which wins on yours: `mmkit finetune --data photos/ --adapter ssf,lora,linear_probe` compares them there.
"""


@functools.cache
def measured() -> dict[str, Any]:
    """What the benchmark wrote."""
    return read_json(FILE)


@readable
def show(data: str, across: str, up: str) -> tuple[str, str]:
    """The chart and the table of one data set.

    Args:
        data: "mean of the three", "clothes", "scenes" or "digits".
        across, up: "Accuracy", "Trained", "File", "Training cost", "Memory" or "Drift".
    """
    sets = measured()["sets"]
    for name, value, known in (("Data set", data, sets), ("Across", across, AXES), ("Up", up, AXES)):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, not {value!r}.")
    rows = sorted(sets[data], key=lambda r: (r["bytes"], r["name"]))
    (field_x, factor_x, told_x), (field_y, factor_y, told_y) = AXES[across], AXES[up]
    dots = [Dot(r["name"], factor_x * r[field_x], factor_y * r[field_y], r["family"], _words(r)) for r in rows]
    sign = 1 if field_y == "accuracy" else -1  # of everything else less is better
    turn = -1 if field_x == "accuracy" else 1
    best = frontier([(turn * d.x, sign * d.y) for d in dots])
    log = (field_x in _LOG, field_y in _LOG)
    chart = scatter_chart(f"{up} by {across.lower()}", (told_x, told_y), dots, best, log, note=data)
    return chart, _table(rows, {rows[i]["name"] for i in best})


def _words(row: dict[str, Any]) -> str:
    return (
        f"{100 * row['accuracy']:.1f} % right, {row['bytes'] / 1000:,.0f} kB trained, {row['cost']:.1f} forward passes, "
        f"{row['memory'] / 1e6:.1f} MB, features moved by {100 * row['drift']:.0f} %"
    )


def _table(rows: list[dict[str, Any]], best: set[str]) -> str:
    head = "".join(
        f"<th>{t}</th>" for t in ("method", "family", "accuracy", "trained", "file", "cost", "memory", "drift", "rate")
    )
    body = []
    for r in sorted(rows, key=lambda r: -r["accuracy"]):
        cells = (
            f"{100 * r['accuracy']:.1f} %", f"{r['bytes'] / 1000:,.0f} kB", f"{r['file'] / 1000:,.0f} kB", f"{r['cost']:.1f}",
            f"{r['memory'] / 1e6:.1f} MB", f"{100 * r['drift']:.0f} %", f"{r['lr']:g}",
        )  # fmt: skip
        name = f"<b>{plain(r['name'])}</b>" if r["name"] in best else plain(r["name"])
        body.append(f"<tr><td>{name}</td><td>{plain(r['family'])}</td>{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    return (
        f'<div class="pareto-table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def build() -> None:
    """The page."""
    told = measured()
    gr.Markdown(HELP, elem_id="pareto-help")
    names = list(told["sets"])
    with gr.Row():
        data = gr.Radio(names, value=names[0], label="Data set", elem_id="pareto-data")
        across = gr.Dropdown(list(AXES), value="Trained", label="Across", elem_id="pareto-across")
        up = gr.Dropdown(list(AXES), value="Accuracy", label="Up", elem_id="pareto-up")
    first = show(names[0], "Trained", "Accuracy")
    chart = gr.HTML(first[0], elem_id="pareto-chart", padding=False)
    about = told["about"]
    gr.Markdown(
        f"{about['train']} training and {about['test']} test pictures of each set, {about['epochs']} epochs of `{about['backbone']}`, "
        f"{about['seeds']} seed(s): differences of two or three points may be chance. Bold names are on the line. Written by "
        "`python benchmarks/pareto.py`.",
        elem_id="pareto-note",
    )
    table = gr.HTML(first[1], elem_id="pareto-table", padding=False)
    gr.on(
        [data.change, across.change, up.change], show, [data, across, up], [chart, table], api_name="pareto",
        concurrency_id="pareto", show_progress="hidden",
    )  # fmt: skip


APP = App(
    "pareto",
    "Which method",
    "28 ways to adapt one network, side by side: accuracy, size, cost, memory, and what each does to the features of other pictures.",
    build,
    picture="pareto-chart",
)
