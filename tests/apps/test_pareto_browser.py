"""The page "Which method" in a browser: data set and axes change chart and table, names answer to the pointer and the keyboard."""

from __future__ import annotations

import pytest

from mmkit.apps.pareto import measured

pytestmark = pytest.mark.browser


def test_data_set_and_axes_change_the_chart_and_dots_say_their_names(launch, page, screenshot, audit):
    expect = pytest.importorskip("playwright.sync_api").expect
    page.goto(f"{launch()}/pareto")
    rows = measured()["sets"]["digits"]
    expect(page.locator("#pareto-chart g circle")).to_have_count(len(measured()["sets"]["mean of the three"]))
    page.locator("#pareto-data").get_by_text("digits").click()
    expect(page.locator("#pareto-chart em")).to_have_text("digits")
    best = max(rows, key=lambda r: r["accuracy"])
    expect(page.locator("#pareto-table tbody tr").first).to_contain_text(best["name"])
    dot = page.locator("#pareto-chart g.dot").first
    expect(dot.locator("text")).to_be_hidden()
    dot.locator("circle").hover()
    expect(dot.locator("text")).to_be_visible()
    assert dot.get_attribute("aria-label").split(": ")[0] in {r["name"] for r in rows}
    screenshot(page, "pareto-hover")
    page.get_by_label("Up", exact=True).click()
    page.get_by_role("option", name="Drift").click()
    expect(page.locator("#pareto-chart figcaption")).to_contain_text("Drift by trained")
    audit(page, [("dark", 390)])
