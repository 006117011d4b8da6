"""The page "Distance masks" in a browser: a picture appears by itself, sliders and clicks change what is shown."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.browser

STATUS = "#gmm-status textarea, #gmm-status input"


def set_slider(page, name, value):
    box = page.locator(f"#gmm-{name} input[type=number]")
    box.fill(str(value))
    box.press("Enter")


def test_bending_a_mask_changes_what_the_page_shows(launch, page, screenshot, click_pixel):
    expect = pytest.importorskip("playwright.sync_api").expect
    page.goto(f"{launch()}/gmm")
    status = page.locator(STATUS).first
    loaded = 60_000  # the first picture waits for the model
    expect(status).to_have_value(re.compile(r"Layer 1, head 1, patch \(4, 4\)"), timeout=loaded)
    page.wait_for_function("document.querySelector('#gmm-mask img')?.naturalWidth == 384")
    legend = page.get_by_text("blue", exact=True)
    assert legend.evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(33, 102, 172)"  # the map's own blue
    screenshot(page, "gmm-start")

    before = page.locator("#gmm-mask img").get_attribute("src")
    click_pixel(page, "#gmm-mask img", 360, 30)  # top right: row 1, column 8 of 8
    expect(status).to_have_value(re.compile(r"patch \(1, 8\)"), timeout=30_000)
    expect(page.locator("#gmm-mask img")).not_to_have_attribute("src", before)

    set_slider(page, "layer", 2)
    expect(status).to_have_value(re.compile("Layer 2"), timeout=30_000)
    page.get_by_label("The whole model").check()
    before = page.locator("#gmm-mask img").get_attribute("src")
    set_slider(page, "sigma", 0.1)
    expect(page.locator("#gmm-mask img")).not_to_have_attribute("src", before, timeout=30_000)
    page.wait_for_timeout(500)
    expect(page.locator("#gmm-edited")).to_contain_text("%")
    screenshot(page, "gmm-edited")

    page.locator("#gmm-reset").click()
    expect(page.locator("#gmm-sigma input[type=number]")).to_have_value("1")


def test_the_endpoint_gives_what_the_pipeline_gives(launch, tmp_path):
    import numpy as np
    from gradio_client import Client, handle_file
    from PIL import Image

    import mmkit
    from mmkit.apps.gmm import GRID, HEADS, LAYERS, draw_picture

    explorer = mmkit.pipeline("mask-explorer")
    assert (len(explorer.model.blocks), explorer.model.config["num_heads"], explorer.grid) == (
        LAYERS,
        HEADS,
        (GRID, GRID),
    )
    path = tmp_path / "star.png"
    draw_picture().save(path)
    arguments = (2, 1, 3, 5, -1, 0.5, "This head")
    client = Client(launch(), verbose=False)
    result = client.predict(handle_file(path), *arguments, api_name="/gmm_explore")
    view = explorer(path, 1, 0, (2, 4), alpha_scale=-1, sigma_scale=0.5)
    shown = result[0]["path"] if isinstance(result[0], dict) else result[0]
    np.testing.assert_array_equal(np.asarray(Image.open(shown).convert("RGB")), np.asarray(view.mask_image()))
    with pytest.raises(Exception, match="greater than maximum"):
        client.predict(handle_file(path), 1, 1, 99, 1, 1, 1, "This head", api_name="/gmm_explore")
