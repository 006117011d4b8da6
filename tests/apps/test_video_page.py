"""The page Video: its chart of scores over time."""

from __future__ import annotations

from mmkit.charts import heat_chart


def test_names_of_classes_stand_whole_beside_the_chart_or_are_seen_to_be_cut():
    names = ["moves left", "the whole picture moves", "a name that is longer than half of the chart is wide"]
    shown = heat_chart("Scores", names, [(0.0, 2.0, (0.1, 0.2, 0.7))])
    assert ">moves left</text>" in shown
    assert ">the whole picture moves</text>" in shown
    assert names[2] not in [part.split("</text>")[0].split(">")[-1] for part in shown.split("<text")]
    assert "…</text>" in shown
    rows = [float(part.split('"')[0]) for part in shown.split('<rect class="heat" x="')[1:]]
    assert min(rows) > 8 + 23 * 6
