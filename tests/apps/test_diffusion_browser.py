"""The page "New styles" in a browser: the model draws by itself, is adapted to a style, and both rows are compared."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.browser

STATUS = "#diffusion-status textarea, #diffusion-status input"


def test_a_style_is_adapted_and_compared(launch, page, screenshot, audit):
    expect = pytest.importorskip("playwright.sync_api").expect
    page.goto(f"{launch()}/diffusion")
    page.wait_for_function("document.querySelector('#diffusion-before img')?.naturalWidth > 600", timeout=120_000)
    page.locator("#diffusion-steps input[type=number]").fill("25")
    page.locator("#diffusion-steps input[type=number]").press("Enter")
    page.locator("#diffusion-run").click()
    status = page.locator(STATUS).first
    expect(status).to_have_value(re.compile("Done after 25 steps"), timeout=180_000)
    expect(page.locator("#diffusion-figures")).to_contain_text("parameters trained")
    expect(page.locator("#diffusion-download")).to_be_enabled()
    before, after = (page.locator(f"#diffusion-{name} img").get_attribute("src") for name in ("before", "after"))
    assert page.request.get(before).body() != page.request.get(after).body()
    screenshot(page, "diffusion-adapted")
    audit(page, [("dark", 390)])

    strength = page.locator("#diffusion-strength input[type=number]")
    strength.fill("0")
    strength.press("Enter")
    expect(page.locator("#diffusion-after img")).not_to_have_attribute("src", after)
    none = page.locator("#diffusion-after img").get_attribute("src")
    assert page.request.get(none).body() == page.request.get(before).body()

    page.get_by_label("My pictures", exact=True).check()
    page.locator("#diffusion-run").click()
    expect(page.locator(".toast-body").first).to_contain_text("Bring 10 to 50 pictures; 0 are here.")
    expect(page.locator("#diffusion-after img")).to_have_count(0)
    expect(status).to_have_value(re.compile("Nothing was trained"))
