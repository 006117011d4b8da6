"""The medical page in a browser: samples, slices, a dropped picture with its truth, downloads, refusals."""

from __future__ import annotations

import gzip
import io
import json

import nibabel
import numpy as np
import pytest
from PIL import Image

from mmkit.apps.medical import model_choices
from mmkit.data.drawn.scans import sample_picture

expect = pytest.importorskip("playwright.sync_api").expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(len(model_choices()) < 2, reason="the bundled models are not installed"),
]


def shown(page) -> np.ndarray:
    """The pixels of the view."""
    view = page.locator("#medical-view img")
    view.wait_for()
    return np.asarray(Image.open(io.BytesIO(page.request.get(view.get_attribute("src")).body())).convert("RGB"))


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def drop(page, box: str, name: str, content: bytes) -> None:
    page.locator(f"{box} input[type=file]").set_input_files(
        {"name": name, "mimeType": "application/octet-stream", "buffer": content}
    )


def test_sample_volume_is_looked_through_and_taken_home(launch, page, screenshot) -> None:
    page.goto(launch() + "/medical")
    page.locator("#medical-sample-volume").click()
    expect(page.locator("#medical-status")).to_contain_text(
        "voxels", timeout=120_000
    )  # the first scan loads its kernels
    before = shown(page)
    expect(page.locator("#medical-measures")).to_contain_text("bright blob", timeout=120_000)
    screenshot(page, "medical-volume")
    old = page.locator("#medical-view img").get_attribute("src")
    slider = page.locator("#medical-slice input[type=number]")
    slider.fill("2")
    slider.press("Enter")
    page.wait_for_function("old => document.querySelector('#medical-view img').src !== old", arg=old)
    assert not np.array_equal(before, shown(page))
    with page.expect_download() as download:
        page.locator("#medical-mask").click()
    path = download.value.path()
    assert nibabel.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes())).shape == (48, 48, 40)


def test_a_dropped_picture_is_measured_against_its_truth(launch, page, screenshot) -> None:
    picture, truth = sample_picture(5)
    page.goto(launch() + "/medical")
    drop(page, "#medical-file", "cells.png", png(picture))
    expect(page.locator("#medical-status")).to_contain_text("256 x 256 pixels", timeout=120_000)
    expect(page.locator("#medical-measures")).to_contain_text("nucleus", timeout=120_000)
    painted = np.asarray(Image.fromarray(shown(page)).resize((256, 256)))  # small pictures are shown enlarged
    red = painted[..., 0].astype(int) - painted[..., 1] > 20
    assert 2 * (red & (truth > 0)).sum() / (red.sum() + (truth > 0).sum()) > 0.6
    page.locator("#medical-truth-box button").first.click()
    drop(page, "#medical-truth", "truth.png", png(truth))
    expect(page.locator("#medical-show")).to_contain_text("Ground truth")
    with page.expect_download() as download:
        page.locator("#medical-json").click()
    assert json.loads(download.value.path().read_text())["classes"][0]["dice"] > 0.6
    screenshot(page, "medical-picture")


def test_the_page_fits_a_phone(launch, page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(launch() + "/medical")
    page.locator("#medical-sample-volume").click()
    expect(page.locator("#medical-measures")).to_contain_text("bright blob", timeout=120_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_broken_file_is_explained_and_leaves_no_old_result(launch, page) -> None:
    page.goto(launch() + "/medical")
    page.locator("#medical-sample-picture").click()
    expect(page.locator("#medical-measures")).to_contain_text("nucleus", timeout=120_000)
    drop(page, "#medical-file", "scan.nii", b"not a volume")
    expect(page.locator(".toast-body").first).to_contain_text("cannot be read as a NIfTI volume")
    expect(page.locator("#medical-status")).to_have_text("No result: see the message.")
    expect(page.locator("#medical-measures")).not_to_contain_text("nucleus")
    expect(page.locator("#medical-view img")).to_have_count(0)
    expect(page.locator("#medical-mask")).to_be_disabled()
