"""A visitor walks through the Fine-tune lab: plan, train, stop, try, merge, download."""

from __future__ import annotations

import re
import zipfile

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]

STATUS = "#finetune-status textarea, #finetune-status input"


def test_walk(launch, page, screenshot, tmp_path):
    from playwright.sync_api import expect

    page.goto(launch() + "/finetune")
    page.locator("#finetune-map table").wait_for()
    expect(page.locator("#finetune-figures")).to_contain_text("numbers are trained")
    page.locator("#finetune-adapter label", has_text="Linear probe").click()
    expect(page.locator("#finetune-figures")).to_contain_text("1,290")
    expect(page.locator("#finetune-map")).to_contain_text("frozen")
    page.locator("#finetune-adapter label", has_text="SSF").click()
    expect(page.locator("#finetune-figures")).not_to_contain_text("1,290")
    screenshot(page, "finetune-plan")

    page.locator("#finetune-train:enabled").click()
    expect(page.locator(STATUS)).to_have_value(re.compile("step .* right"))  # one epoch is over
    expect(page.locator("#finetune-loss svg path[stroke]")).to_have_count(1)
    screenshot(page, "finetune-training")
    page.locator("#finetune-stop:enabled").click()
    expect(page.locator(STATUS)).to_have_value(re.compile(r"stopped after \d+ steps"))
    expect(page.locator("#finetune-train")).to_be_enabled()

    page.locator("#finetune-shown img").nth(3).click()
    expect(page.locator("#finetune-label")).to_contain_text("%")
    page.locator("#finetune-merge").click()
    expect(page.locator("#finetune-merge-text")).to_contain_text("on 64 of 64 pictures")
    with page.expect_download() as download:
        page.locator("#finetune-download").click()
    download.value.save_as(tmp_path / "adapter.zip")
    assert "adapter_model.safetensors" in zipfile.ZipFile(tmp_path / "adapter.zip").namelist()
    screenshot(page, "finetune-result")


def test_another_visitor_and_small_dark_screen(launch, new_page, screenshot):
    """A second browser sees nothing of the first; the page works on a phone in the dark."""
    phone = new_page(width=390, height=844, color_scheme="dark")
    phone.goto(launch() + "/finetune")
    phone.locator("#finetune-map table").wait_for()
    assert phone.locator("#finetune-result").count() == 0 or not phone.locator("#finetune-result").is_visible()
    assert phone.evaluate("document.documentElement.scrollWidth") <= 400
    screenshot(phone, "finetune-phone")


def test_own_pictures_from_a_zip(launch, page, screenshot, tmp_path):
    from PIL import Image
    from playwright.sync_api import expect

    url = launch() + "/finetune"
    for archive, names, text in (
        ("evil.zip", ["../up/1.png", "b/1.png"], "points outside"),
        ("good.zip", [f"{kind}/{i}.png" for kind in ("cats", "dogs") for i in range(5)], "2 classes"),
    ):
        with zipfile.ZipFile(tmp_path / archive, "w") as target:
            for i, name in enumerate(names):
                Image.new("RGB", (24, 24), (20 * i, 90, 120)).save(tmp_path / "one.png")
                target.write(tmp_path / "one.png", name)
        page.goto(url)
        page.locator("#finetune-map table").wait_for()
        page.locator("#finetune-source label", has_text="My pictures").click()
        expect(page.locator("#finetune-data")).to_contain_text("Upload a zip")
        expect(page.locator("#finetune-train")).to_be_disabled()
        page.locator("#finetune-zip input[type=file]").set_input_files(tmp_path / archive)
        expect(page.locator("#finetune-data")).to_contain_text(text)
    expect(page.locator("#finetune-train")).to_be_enabled()
    screenshot(page, "finetune-zip")
