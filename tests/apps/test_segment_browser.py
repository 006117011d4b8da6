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
    page.locator("#segment-status", has_text="Proposed").wait_for()


def wait_clicks(page, count):
    page.locator("#segment-status", has_text=f"{count} click").wait_for()


def download(page, name):
    page.locator(f"#segment-{name}:not([disabled])").wait_for()
    with page.expect_download() as file:
        page.locator(f"#segment-{name}").click()
    return file.value.path()


def test_a_photo_is_segmented_corrected_and_taken_home(launch, page, click_pixel, screenshot):
    page.goto(launch("segment") + "/segment")
    load(page)
    page.locator("#segment-cutout img").wait_for()
    wait_clicks(page, 1)
    page.locator("#segment-clear").click()
    page.locator("#segment-status", has_text="Click the object").wait_for()
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
    page.goto(launch("segment") + "/segment")
    load(page)
    page.locator("#segment-clear").click()
    page.locator("#segment-status", has_text="Click the object").wait_for()
    page.locator("#segment-picture img").first.evaluate(QUICK_CLICKS, [[540 + 40 * k, 360] for k in range(4)])
    wait_clicks(page, 4)
    click_pixel(page, "#segment-picture img", 90, 90, button="right")
    wait_clicks(page, 5)
    (*first, last) = list(SESSIONS._open.values())[-1].segmenter.clicks
    assert [positive for _, _, positive in first] == [True] * 4
    assert last == pytest.approx((90, 90, False), abs=2)
    assert page.locator("#segment-mode input:checked").input_value() == "Add"


def test_a_large_turned_photo_is_clicked_and_cut_out_in_its_own_pixels(launch, page, click_pixel):
    page.goto(launch("segment") + "/segment")
    page.locator("#segment-model input").click()
    page.get_by_role("option", name="random-walker").click()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees: 1500 wide, 2600 high
    load(page, size=(2600, 1500), ball=(2200, 400), exif=exif)
    page.locator("#segment-clear").click()
    page.locator("#segment-status", has_text="Click the object").wait_for()
    width = page.locator("#segment-picture img").first.evaluate("e => e.naturalWidth")
    ball = (1499 - 400, 2200)
    click_pixel(page, "#segment-picture img", ball[0] * width / 1500, ball[1] * width / 1500)
    wait_clicks(page, 1)
    found = rle_to_mask(json.loads(download(page, "json").read_text())["segmentation"])
    assert found.shape == (2600, 1500)
    assert iou(found, disk((1500, 2600), ball)) > 0.85
    assert Image.open(download(page, "png")).size == (1500, 2600)


def test_an_unreadable_file_is_explained_and_leaves_an_empty_page(launch, page):
    page.goto(launch("segment") + "/segment")
    page.locator("#segment-model input").click()
    page.get_by_role("option", name="random-walker").click()
    load(page)
    page.locator("#segment-picture input[type=file]").set_input_files(
        {"name": "broken.png", "mimeType": "image/png", "buffer": b"no picture"}
    )
    page.get_by_text("broken.png cannot be read as a picture").first.wait_for()
    page.locator("#segment-status", has_text="Drop a photo").wait_for()
    page.locator("#segment-picture img").wait_for(state="detached")
    page.locator("#segment-cutout img").wait_for(state="detached")


def test_visitors_do_not_share_clicks(launch, new_page, click_pixel):
    pages = [new_page(), new_page()]
    for k, page in enumerate(pages):
        page.goto(launch("segment") + "/segment")
        load(page, ball=(300 + 300 * k, 360))
    click_pixel(pages[0], "#segment-picture img", 90, 90)
    wait_clicks(pages[0], 2)
    click_pixel(pages[1], "#segment-picture img", 620, 360)
    wait_clicks(pages[1], 2)
    pages[0].locator("#segment-clear").click()
    pages[0].locator("#segment-status", has_text="Click the object").wait_for()
    click_pixel(pages[1], "#segment-picture img", 640, 360)
    wait_clicks(pages[1], 3)


def test_a_box_and_a_new_picture_start_over(launch, page, click_pixel):
    page.goto(launch("segment") + "/segment")
    load(page)
    page.locator("#segment-mode label", has_text="Box").click()
    click_pixel(page, "#segment-picture img", 420, 180)
    page.locator("#segment-status", has_text="opposite corner").wait_for()
    click_pixel(page, "#segment-picture img", 780, 540)
    page.locator("#segment-status", has_text="ms").wait_for()
    page.locator("#segment-picture button[aria-label='Remove Image']").first.click()
    page.locator("#segment-status", has_text="Drop a photo").wait_for()
    page.locator("#segment-cutout img").wait_for(state="detached")
    load(page, ball=(330, 330))
    wait_clicks(page, 1)


def test_the_sample_photo_works(launch, page, screenshot):
    page.goto(launch("segment") + "/segment")
    page.locator("#segment-sample").click()
    page.locator("#segment-cutout img").wait_for()
    page.locator("#segment-status", has_text="ms").wait_for()
    screenshot(page, "segment-sample")


def test_the_endpoint_segments_without_a_page(launch, tmp_path):
    from gradio_client import Client, handle_file

    (tmp_path / "photo.png").write_bytes(photo())
    client = Client(launch("segment"), verbose=False)
    prompt = {"points": [[600, 360]], "labels": [1]}
    result = client.predict(handle_file(tmp_path / "photo.png"), prompt, "", api_name="/segment")
    assert sum(result["segmentation"]["counts"]) == 720 * 960
    with pytest.raises(Exception, match="outside"):
        client.predict(handle_file(tmp_path / "photo.png"), {"points": [[999, 1]]}, "", api_name="/segment")
