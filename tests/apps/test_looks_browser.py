"""Every page of the studio, in the light and the dark, wide and narrow: readable, named, within the screen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmkit.registry import APPS
from mmkit.weights import list_weights

expect = pytest.importorskip("playwright.sync_api").expect

pytestmark = pytest.mark.browser

PICTURES = Path(__file__).parents[2] / "apps" / "pictures"

BAD = """<body style="background: white"><p style="color: #999">faint</p><p style="color: #333; opacity: .5">faded</p>
<svg><text y="20" fill="#aaa">pale</text></svg><input placeholder="hint" style="width: 2000px"><button></button><img src="data:,"
style="width: 9px; height: 9px"></body>"""


def test_the_audit_sees_what_is_wrong(page, audit):
    page.set_content(BAD)
    with pytest.raises(AssertionError) as caught:
        audit(page, [("light", 390)])
    for fault in ('2.85: "faint"', '"faded"', '"pale"', "no label: text", "no name: button", "no alt text", "px wide"):
        assert fault in str(caught.value), fault


@pytest.mark.parametrize("name", ["", *APPS.names(), "about"])
def test_a_page_is_readable_named_and_within_the_screen_at_rest_and_at_work(launch, page, audit, settled, name):
    page.goto(f"{launch()}/{name}")
    settled(page)
    audit(page)
    app = APPS.get(name) if name in APPS.names() else None
    if app and app.sample:
        page.set_viewport_size({"width": 1280, "height": 900})
        page.locator(f"#{app.sample}:enabled").click()
        page.locator(f"#{app.picture} img, #{app.picture} canvas, #{app.picture} figure").first.wait_for()
        settled(page)
        audit(page)


def test_a_phone_has_one_row_with_a_menu(launch, new_page):
    page = new_page(width=390, height=844)
    page.goto(f"{launch()}/about?__theme=dark")
    navigation = page.get_by_role("navigation", name="Pages")
    expect(navigation).to_be_visible()
    assert navigation.bounding_box()["height"] < 70
    expect(page.get_by_role("link", name="Video")).to_have_count(0)  # in the closed menu
    navigation.get_by_text("Pages").click()
    expect(navigation.get_by_role("link", name="About")).to_have_attribute("aria-current", "page")
    navigation.get_by_role("link", name="Video").click()
    expect(page.locator("#video-header h1")).to_be_visible()
    expect(page).to_have_url(re.compile("__theme=dark"))  # the chosen theme goes along


def test_on_a_phone_the_page_goes_on_to_what_a_button_started(launch, new_page):
    page = new_page(width=390, height=844)
    page.goto(f"{launch()}/medical")
    expect(page.locator("#medical-view")).not_to_be_in_viewport()
    page.locator("#medical-sample-picture").click()
    expect(page.locator("#medical-view")).to_be_in_viewport(ratio=0.9)


def test_leaving_own_work_asks_first_and_nothing_else_does(launch, page, tmp_path):
    asked, answers = [], ["dismiss", "accept"]
    page.on("dialog", lambda dialog: (asked.append(dialog.type), getattr(dialog, answers.pop(0))()))
    url = f"{launch()}/medical"
    page.goto(url)
    page.locator("#medical-sample-picture").click()
    page.reload()
    assert asked == []
    (tmp_path / "notes.png").write_bytes(b"mine")
    page.locator("#medical-file input[type=file]").set_input_files(tmp_path / "notes.png")
    expect(page.locator(".toast-body").first).to_contain_text("notes.png")
    page.get_by_role("link", name="About").click()
    page.locator("#medical-sample-picture").click()  # who stays has a page that lives
    page.locator("#medical-view img").first.wait_for()
    assert asked == ["beforeunload"]
    page.get_by_role("link", name="About").click()
    expect(page.locator("#about-header")).to_be_visible()
    assert asked == ["beforeunload"] * 2


def test_the_home_page_shows_a_picture_of_every_page_and_what_is_bundled(launch, page):
    page.goto(launch())
    for name in APPS.names():
        card = page.locator(f'.studio-card[href="{name}"]')
        expect(card).to_contain_text(APPS.get(name).title)
        expect(card.locator("img")).to_have_js_property("naturalWidth", 480)
        assert (PICTURES / f"{name}.webp").stat().st_size < 40_000
    for weights in list_weights():
        expect(page.locator("#home-bundle")).to_contain_text(weights)
