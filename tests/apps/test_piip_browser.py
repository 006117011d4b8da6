"""The page "Inverted pyramids" in a browser: a sample, clicks and sliders change what is shown, bad resolutions are explained."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.browser


def set_slider(page, name, value):
    box = page.locator(f"#piip-{name} input[type=number]")
    box.fill(str(value))
    box.press("Enter")


def test_resolutions_and_clicks_change_what_is_shown(launch, page, screenshot, click_pixel):
    expect = pytest.importorskip("playwright.sync_api").expect
    page.goto(f"{launch('piip')}/piip")
    costs = page.locator("#piip-costs")
    loaded = 60_000  # the bars wait for the model
    expect(costs).to_contain_text("Inverted pyramid", timeout=loaded)
    page.locator("#piip-sample").click()
    status = page.locator("#piip-status")
    expect(status).to_contain_text("The large model has 16 x 16 cells, the small model 32 x 32", timeout=loaded)
    page.wait_for_function("document.querySelector('#piip-reads img')?.naturalWidth == 640")
    page.wait_for_function("document.querySelector('#piip-change2 img')?.naturalWidth == 320")
    screenshot(page, "piip-start")

    picture = page.locator("#piip-reads img")
    before = picture.get_attribute("src")
    click_pixel(page, "#piip-reads img", 80, 560)
    expect(picture).not_to_have_attribute("src", before, timeout=30_000)

    bars = costs.inner_text()
    set_slider(page, "small", 384)
    expect(status).to_contain_text("the small model 48 x 48", timeout=30_000)
    expect(costs).not_to_have_text(bars)
    page.get_by_label("ViT-S and ViT-L").check()
    expect(costs).to_contain_text("361 M", timeout=loaded)
    set_slider(page, "small", 128)
    set_slider(page, "large", 256)
    expect(page.locator(".toast-body")).to_contain_text("smallest picture to the largest", timeout=30_000)
    expect(status).to_contain_text("No answer")


def test_the_page_is_whole_on_a_phone_and_in_the_dark(launch, new_page, screenshot):
    expect = pytest.importorskip("playwright.sync_api").expect
    page = new_page(width=390, height=844, color_scheme="dark")
    page.goto(f"{launch('piip')}/piip?__theme=dark")
    page.locator("#piip-sample").click()
    expect(page.locator("#piip-status")).to_contain_text("cells", timeout=60_000)
    page.wait_for_function("document.querySelector('#piip-change2 img')?.naturalWidth == 320")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    screenshot(page, "piip-phone-dark")
