"""The page "Forgetting" in a browser: a concept is erased, compared, switched off and brought back."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.browser

STATUS = "#erasure-status textarea, #erasure-status input"


def test_a_concept_is_erased_compared_and_brought_back(launch, page, screenshot, audit):
    expect = pytest.importorskip("playwright.sync_api").expect
    page.goto(f"{launch()}/erasure")
    page.wait_for_function("document.querySelector('#erasure-before img')?.naturalWidth > 600", timeout=120_000)
    page.locator("#erasure-prompts textarea").fill("a red circle\na blue square")
    steps = page.locator("#erasure-steps input[type=number]")
    steps.fill("25")
    steps.press("Enter")
    page.locator("#erasure-run").click()
    status = page.locator(STATUS).first
    expect(status).to_have_value(re.compile("Done after 25 steps"), timeout=240_000)
    expect(page.locator("#erasure-bars figure")).to_have_count(1)
    expect(page.locator("#erasure-bars")).to_contain_text("1.00")
    expect(page.locator("#erasure-download")).to_be_enabled()

    def picture(name):
        return page.request.get(page.locator(f"#erasure-{name} img").get_attribute("src")).body()

    assert len({picture("before"), picture("after"), picture("edited")}) == 3
    screenshot(page, "erasure-erased")
    audit(page, [("dark", 390)])

    shown = page.locator("#erasure-after img").get_attribute("src")
    page.get_by_label("Erase circle", exact=True).uncheck()
    expect(page.locator("#erasure-after img")).not_to_have_attribute("src", shown)
    assert picture("after") == picture("before"), "switched off, the model is as it came"

    page.locator("#erasure-back").click()
    expect(status).to_have_value("Nothing is erased.")
    expect(page.get_by_label("Erase circle", exact=True)).to_have_count(0)
    expect(page.locator("#erasure-after img")).to_have_count(0)
