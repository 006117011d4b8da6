"""The splat page in a browser: the sample from several sides, a dropped file, a live fit, downloads, refusals."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit.pointcloud.splats import GaussianModel, load_splats, save_splats

pytestmark = pytest.mark.browser


def shown(page) -> np.ndarray:
    """The pixels of the view."""
    view = page.locator("#splats-view img")
    view.wait_for()
    return np.asarray(Image.open(io.BytesIO(page.request.get(view.get_attribute("src")).body())).convert("RGB"))


def changed(page, old: str) -> None:
    page.wait_for_function("old => document.querySelector('#splats-view img').src !== old", arg=old)


def test_the_sample_is_turned_and_taken_home(launch, page, screenshot, audit, tmp_path) -> None:
    page.goto(launch("splats") + "/splats")
    page.locator("#splats-sample").click()
    page.locator("#splats-status", has_text="Gaussians").wait_for(
        timeout=120_000
    )  # the first view compiles its kernels
    before = shown(page)
    assert before.max() > 150
    screenshot(page, "splats-sample")
    old = page.locator("#splats-view img").get_attribute("src")
    slider = page.locator("#splats-azimuth input[type=number]")
    slider.fill("-120")
    slider.press("Enter")
    changed(page, old)
    assert np.abs(before.astype(int) - shown(page)).mean() > 3
    old = page.locator("#splats-view img").get_attribute("src")
    page.locator("#splats-show").get_by_label("Depth").click()
    changed(page, old)
    screenshot(page, "splats-depth")
    with page.expect_download() as download:
        page.locator("#splats-download").click()
    path = tmp_path / "scene.ply"
    download.value.save_as(path)
    assert len(load_splats(path)) > 1000
    audit(page)


def test_a_dropped_file_and_a_damaged_one(launch, page, tmp_path) -> None:
    g = torch.Generator().manual_seed(0)
    model = GaussianModel.from_points(torch.randn(200, 3, generator=g), torch.rand(200, 3, generator=g))
    page.goto(launch("splats") + "/splats")
    box = page.locator("#splats-file input[type=file]")
    box.set_input_files(save_splats(model, tmp_path / "x.spz"))
    page.locator("#splats-status", has_text="200 Gaussians").wait_for(timeout=120_000)
    page.reload()
    (tmp_path / "y.ply").write_bytes(b"ply\nnonsense")
    page.locator("#splats-file input[type=file]").set_input_files(tmp_path / "y.ply")
    page.get_by_text("not a readable PLY file").wait_for()
    page.locator("#splats-status", has_text="see the message").wait_for()


def test_a_scene_is_fitted_while_one_watches(launch, page, screenshot) -> None:
    page.goto(launch("splats") + "/splats")
    steps = page.locator("#splats-steps input[type=number]")
    steps.fill("50")
    steps.press("Enter")
    page.locator("#splats-fit").click()
    page.locator("#splats-status", has_text="fitted to 18 pictures in 50 steps").wait_for(timeout=120_000)
    assert shown(page).max() > 60
    screenshot(page, "splats-fit")
