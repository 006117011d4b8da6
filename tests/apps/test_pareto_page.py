"""The page "Which method": what it shows is what the benchmark wrote, and only that is asked for."""

from __future__ import annotations

import re
from pathlib import Path

import gradio
import pytest

from mmkit.apps import pareto
from mmkit.charts import Dot, frontier, scatter_chart
from mmkit.storage import read_json

ROOT = Path(__file__).parent.parent.parent


def test_the_packaged_figures_are_those_of_the_benchmark():
    told, kept = pareto.measured(), read_json(ROOT / "benchmarks/results/pareto.json")
    assert kept["about"].items() <= told["about"].items()
    for name in ("digits", "scenes", "clothes"):
        for row in told["sets"][name]:
            runs = [r for k, r in kept["runs"].items() if k.startswith(f"{name} / {row['name']} / ")]
            assert len(runs) == row["seeds"]
            for field in ("accuracy", "bytes", "drift", "memory"):
                assert row[field] == pytest.approx(sum(r[field] for r in runs) / len(runs), abs=1e-4)
    assert len(told["sets"]["mean of the three"]) >= 25


def test_every_choice_is_drawn_and_others_are_refused():
    for data in pareto.measured()["sets"]:
        for across in pareto.AXES:
            for up in pareto.AXES:
                chart, table = pareto.show(data, across, up)
                assert chart.count("<circle") == len(pareto.measured()["sets"][data])
                assert "nan" not in chart
                assert table.count("<tr>") == 1 + len(pareto.measured()["sets"][data])
    for wrong in (("x", "Trained", "Accuracy"), ("digits", "x", "Accuracy"), ("digits", "Trained", "x")):
        with pytest.raises(gradio.Error, match="must be one of"):
            pareto.show(*wrong)


def test_a_frontier_is_what_nothing_smaller_equals_and_names_are_text():
    points = [(1.0, 5.0), (2.0, 4.0), (3.0, 9.0), (0.5, 1.0), (4.0, 9.0)]
    brute = [
        i for i, (x, y) in enumerate(points) if not any((a <= x and b >= y) and (a, b) != (x, y) for a, b in points)
    ]
    assert sorted(frontier(points)) == brute
    chart = scatter_chart(
        "t", ("x", "y"), [Dot("<b>&", 1.0, 2.0, "<i>", "<u>"), Dot("n", 1.0, 2.0)], [0], (True, False)
    )
    assert not re.search(r"<[biu]>", chart.split("<svg")[1])
