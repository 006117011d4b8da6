"""The click-segmentation page in a browser: proposal, adding, removing, box, undo, a new picture, downloads."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from mmkit.apps.segment import SESSIONS
from mmkit.vision.clicks.metrics import iou
from mmkit.vision.clicks.result import rle_to_mask

expect = pytest.importorskip("playwright.sync_api").expect

pytestmark = pytest.mark.browser


QUICK_CLICKS = """(img, points) => {
  const box = img.getBoundingClientRect(), scale = Math.min(box.width / img.naturalWidth, box.height / img.naturalHeight);
  const left = box.left + (box.width - img.naturalWidth * scale) / 2, top = box.top + (box.height - img.naturalHeight * scale) / 2;
  for (const [x, y] of points)
    img.dispatchEvent(new MouseEvent("click", {bubbles: true, clientX: left + x * scale, clientY: top + y * scale}));
}"""
"""Clicks in one go, before the answer to the first can come."""


def disk(size, ball):
    rows, cols = np.indices(size[::-1])
    return (cols - ball[0]) ** 2 + (rows - ball[1]) ** 2 < 150**2


def photo(size=(960, 720), ball=(600, 360), color=(210, 60, 40), **options):
    """A ball on a meadow, as PNG bytes."""
    pixels = np.full((*size[::-1], 3), (60, 130, 70), np.uint8)
    pixels[disk(size, ball)] = color
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def load(page, **options):
    page.locator("#segment-picture input[type=file]").set_input_files(
        {"name": "photo.png", "mimeType": "image/png", "buffer": photo(**options)}
    )
    expect(page.locator("#segment-status")).to_contain_text("Proposed")


def wait_clicks(page, count):
    expect(page.locator("#segment-status")).to_contain_text(f"{count} click")


def download(page, name):
    expect(page.locator(f"#segment-{name}")).to_be_enabled()
    with page.expect_download() as file:
        page.locator(f"#segment-{name}").click()
    return file.value.path()


def test_a_photo_is_segmented_corrected_and_taken_home(launch, page, click_pixel, screenshot):
    page.goto(launch() + "/segment")
    load(page)
    expect(page.locator("#segment-cutout img")).to_be_visible()
    wait_clicks(page, 1)
    page.locator("#segment-clear").click()
    expect(page.locator("#segment-status")).to_contain_text("Click the object")
    click_pixel(page, "#segment-picture img", 600, 360)
    wait_clicks(page, 1)
    page.locator("#segment-mode label", has_text="Remove").click()
    click_pixel(page, "#segment-picture img", 90, 90)
    wait_clicks(page, 2)
    page.locator("#segment-undo").click()
    wait_clicks(page, 1)
    page.locator("#segment-redo").click()
    wait_clicks(page, 2)
    screenshot(page, "segment-ball")
    record = json.loads(download(page, "json").read_text())
    assert record["segmentation"]["size"] == [720, 960]
    assert sum(record["segmentation"]["counts"]) == 720 * 960
    assert Image.open(download(page, "png")).mode == "RGBA"


def test_a_right_click_removes_and_quick_clicks_are_all_counted(launch, page, click_pixel):
    page.goto(launch() + "/segment")
    load(page)
    page.locator("#segment-clear").click()
    expect(page.locator("#segment-status")).to_contain_text("Click the object")
    page.locator("#segment-picture img").first.evaluate(QUICK_CLICKS, [[540 + 40 * k, 360] for k in range(4)])
    wait_clicks(page, 4)
    click_pixel(page, "#segment-picture img", 90, 90, button="right")
    wait_clicks(page, 5)
    (*first, last) = list(SESSIONS._open.values())[-1].value.segmenter.clicks
    assert [positive for _, _, positive in first] == [True] * 4
    assert last == pytest.approx((90, 90, False), abs=2)
    assert page.locator("#segment-mode input:checked").input_value() == "Add"


def test_the_photo_can_be_clicked_with_the_keyboard(launch, page):
    page.goto(launch() + "/segment")
    load(page)
    page.locator("#segment-clear").click()
    expect(page.locator("#segment-status")).to_contain_text("Click the object")
    photo = page.get_by_role("group", name="Photo")
    photo.focus()
    expect(page.locator("#segment-cross")).to_be_visible()
    for key in ["ArrowRight"] * 3 + ["Shift+ArrowDown", "Enter"]:
        page.keyboard.press(key)
    wait_clicks(page, 1)
    for key in ["ArrowLeft"] * 20 + ["Shift+Enter"]:
        page.keyboard.press(key)
    wait_clicks(page, 2)
    page.keyboard.press("Backspace")
    wait_clicks(page, 3)
    page.wait_for_function("document.querySelector('#segment-picture img').naturalWidth")
    scale = 960 / page.locator("#segment-picture .image-frame img").evaluate("e => e.clientWidth")
    first, second, third = list(SESSIONS._open.values())[-1].value.segmenter.clicks
    assert first == pytest.approx((480 + 36 * scale, 360 + 2 * scale, True), abs=3)
    assert second == pytest.approx((480 - 204 * scale, 360 + 2 * scale, False), abs=3)
    assert third[2] is False
    page.locator("#segment-undo").focus()
    expect(page.locator("#segment-cross")).to_be_hidden()


def test_a_large_turned_photo_is_clicked_and_cut_out_in_its_own_pixels(launch, page, click_pixel):
    page.goto(launch() + "/segment")
    page.locator("#segment-model input").click()
    page.get_by_role("option", name="random-walker").click()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees: 1500 wide, 2600 high
    load(page, size=(2600, 1500), ball=(2200, 400), exif=exif)
    page.locator("#segment-clear").click()
    expect(page.locator("#segment-status")).to_contain_text("Click the object")
    shown = "document.querySelector('#segment-picture img').naturalWidth"  # 0 while it is being replaced
    width = page.wait_for_function(shown).json_value()
    ball = (1499 - 400, 2200)
    click_pixel(page, "#segment-picture img", ball[0] * width / 1500, ball[1] * width / 1500)
    wait_clicks(page, 1)
    found = rle_to_mask(json.loads(download(page, "json").read_text())["segmentation"])
    assert found.shape == (2600, 1500)
    assert iou(found, disk((1500, 2600), ball)) > 0.85
    assert Image.open(download(page, "png")).size == (1500, 2600)


@pytest.mark.parametrize("by", ["mouse", "keys"])
def test_a_click_while_the_picture_is_being_replaced_is_not_lost(launch, page, by):
    page.goto(launch() + "/segment")
    load(page)
    page.locator("#segment-clear").scroll_into_view_if_needed()  # so that the click on it moves nothing
    box, held = page.locator("#segment-picture img").first.bounding_box(), []
    page.route("**/image.jpeg", lambda route: held.append(route) if held is not None else route.continue_())
    page.locator("#segment-clear").click()
    page.wait_for_function("!document.querySelector('#segment-picture img').naturalWidth")
    if by == "mouse":
        page.mouse.click(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2)
    else:
        page.get_by_role("group", name="Photo").focus()
        for key in ["ArrowRight"] * 3 + ["Enter"]:
            page.keyboard.press(key)
    waiting, held = held, None
    for route in waiting:
        route.continue_()
    wait_clicks(page, 1)


def test_an_unreadable_file_is_explained_and_leaves_an_empty_page(launch, page):
    page.goto(launch() + "/segment")
    page.locator("#segment-model input").click()
    page.get_by_role("option", name="random-walker").click()
    load(page)
    page.locator("#segment-picture input[type=file]").set_input_files(
        {"name": "broken.png", "mimeType": "image/png", "buffer": b"no picture"}
    )
    expect(page.locator(".toast-body").first).to_contain_text("broken.png cannot be read as a picture")
    expect(page.locator("#segment-status")).to_contain_text("Drop a photo")
    expect(page.locator("#segment-picture img")).to_have_count(0)
    expect(page.locator("#segment-cutout img")).to_have_count(0)


def test_visitors_do_not_share_clicks(launch, new_page, click_pixel):
    pages = [new_page(), new_page()]
    for k, page in enumerate(pages):
        page.goto(launch() + "/segment")
        load(page, ball=(300 + 300 * k, 360))
    click_pixel(pages[0], "#segment-picture img", 90, 90)
    wait_clicks(pages[0], 2)
    click_pixel(pages[1], "#segment-picture img", 620, 360)
    wait_clicks(pages[1], 2)
    pages[0].locator("#segment-clear").click()
    expect(pages[0].locator("#segment-status")).to_contain_text("Click the object")
    click_pixel(pages[1], "#segment-picture img", 640, 360)
    wait_clicks(pages[1], 3)


def test_a_box_and_a_new_picture_start_over(launch, page, click_pixel):
    page.goto(launch() + "/segment")
    load(page)
    page.locator("#segment-mode label", has_text="Box").click()
    click_pixel(page, "#segment-picture img", 420, 180)
    expect(page.locator("#segment-status")).to_contain_text("opposite corner")
    click_pixel(page, "#segment-picture img", 780, 540)
    expect(page.locator("#segment-status")).to_contain_text("ms")
    page.locator("#segment-picture button[aria-label='Remove Image']").first.click()
    expect(page.locator("#segment-status")).to_contain_text("Drop a photo")
    expect(page.locator("#segment-cutout img")).to_have_count(0)
    load(page, ball=(330, 330))
    wait_clicks(page, 1)


def test_the_sample_photo_works(launch, page, screenshot):
    page.goto(launch() + "/segment")
    page.locator("#segment-sample").click()
    expect(page.locator("#segment-cutout img")).to_be_visible()
    expect(page.locator("#segment-status")).to_contain_text("ms")
    screenshot(page, "segment-sample")


def test_the_endpoint_segments_without_a_page(launch, tmp_path):
    from gradio_client import Client, handle_file

    (tmp_path / "photo.png").write_bytes(photo())
    client = Client(launch(), verbose=False)
    prompt = {"points": [[600, 360]], "labels": [1]}
    result = client.predict(handle_file(tmp_path / "photo.png"), prompt, "", api_name="/segment")
    assert sum(result["segmentation"]["counts"]) == 720 * 960
    with pytest.raises(Exception, match="outside"):
        client.predict(handle_file(tmp_path / "photo.png"), {"points": [[999, 1]]}, "", api_name="/segment")
