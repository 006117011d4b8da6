"""The click-segmentation page in a browser: proposal, adding, removing, box, undo, a new picture, downloads."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.browser


def photo(size=(960, 720), ball=(600, 360), color=(210, 60, 40)):
    """A ball on a meadow, as PNG bytes."""
    rows, cols = np.indices(size[::-1])
    pixels = np.full((*size[::-1], 3), (60, 130, 70), np.uint8)
    pixels[(cols - ball[0]) ** 2 + (rows - ball[1]) ** 2 < 150**2] = color
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def load(page, **options):
    page.locator("#segment-picture input[type=file]").set_input_files(
        {"name": "photo.png", "mimeType": "image/png", "buffer": photo(**options)}
    )
    page.locator("#segment-status", has_text="Proposed").wait_for()


def wait_clicks(page, count):
    page.locator("#segment-status", has_text=f"{count} click").wait_for()


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
    with page.expect_download() as download:
        page.locator("#segment-json").click()
    record = json.loads(download.value.path().read_text())
    assert record["segmentation"]["size"] == [720, 960]
    assert sum(record["segmentation"]["counts"]) == 720 * 960
    with page.expect_download() as download:
        page.locator("#segment-png").click()
    assert Image.open(download.value.path()).mode == "RGBA"


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
    assert page.locator("#segment-cutout img").count() == 0
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
