"""The SLAM page in a browser: the sample while it is mapped, levels, a clicked class, a dropped zip, refusals."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmkit.pointcloud.slam import SyntheticRoom
from mmkit.pointcloud.splats import load_splats

pytestmark = pytest.mark.browser


def shown(page) -> np.ndarray:
    """The pixels of the view."""
    view = page.locator("#slam-view img")
    view.wait_for()
    return np.asarray(Image.open(io.BytesIO(page.request.get(view.get_attribute("src")).body())).convert("RGB"))


def source(page) -> str:
    return page.locator("#slam-view img").get_attribute("src")


def changed(page, old: str) -> np.ndarray:
    page.wait_for_function("old => document.querySelector('#slam-view img').src !== old", arg=old)
    return shown(page)


def fill(page, field: str, value: int) -> None:
    box = page.locator(f"#{field} input[type=number]")
    box.fill(str(value))
    box.press("Enter")


def packed(path: Path, frames: int = 4, *, camera: bool = True) -> Path:
    """A recording of the drawn room as a person would zip it: one folder inside."""
    room = SyntheticRoom(frames=frames, width=64, height=48)
    with zipfile.ZipFile(path, "w") as archive:
        for i, frame in enumerate(room):
            far, ids = (frame.depth.numpy() * 1000).astype(np.uint16), frame.labels.numpy().astype(np.uint8)
            for name, values in (("color", frame.color.numpy()), ("depth", far), ("labels", ids)):
                buffer = io.BytesIO()
                Image.fromarray(values).save(buffer, "PNG")
                archive.writestr(f"my room/{name}/{i}.png", buffer.getvalue())
        archive.writestr("my room/tree.json", json.dumps(room.tree.to_dict()))
        if camera:
            K = room.K
            archive.writestr(
                "my room/camera.json", json.dumps({"fx": K[0, 0], "fy": K[1, 1], "cx": K[0, 2], "cy": K[1, 2]})
            )
    return path


def test_the_sample_is_mapped_explored_and_taken_home(launch, page, screenshot, audit, tmp_path) -> None:
    page.goto(launch("slam") + "/slam")
    fill(page, "slam-frames", 5)
    fill(page, "slam-effort", 12)
    page.locator("#slam-sample").click()
    page.locator("#slam-status", has_text="Frame ").wait_for(timeout=120_000)  # live
    page.locator("#slam-status", has_text="5 frames of the drawn room").wait_for(timeout=120_000)
    told = page.locator("#slam-status").inner_text()
    assert float(told.rpartition("mIoU")[2].strip()) > 0.2, told
    assert page.locator("#slam-storage", has_text="24 classes in 3 levels").count() == 1
    assert page.locator("#slam-path path").count() >= 2
    color = shown(page)
    assert color.max() > 150
    screenshot(page, "slam-color")
    old = source(page)
    page.locator("#slam-show").get_by_label("Labels").click()
    fine = changed(page, old)
    old = source(page)
    fill(page, "slam-level", 1)
    coarse = changed(page, old)
    colors = [len(np.unique(x.reshape(-1, 3), axis=0)) for x in (fine, coarse)]
    assert colors[1] < colors[0]
    screenshot(page, "slam-labels")
    old = source(page)
    page.locator("#slam-view img").click(position={"x": 150, "y": 150})
    picked = changed(page, old)
    assert (picked.std(-1) < 1).mean() > 0.05  # the rest is grey
    assert page.locator("#slam-class input").input_value() != "Everything"
    with page.expect_download() as download:
        page.locator("#slam-download").click()
    path = tmp_path / "map.ply"
    download.value.save_as(path)
    assert b"property int label" in path.read_bytes()[:2000]
    assert len(load_splats(path)) > 1000
    audit(page)


def test_a_zip_of_ones_own_and_one_without_a_camera(launch, page, screenshot, tmp_path) -> None:
    page.goto(launch("slam") + "/slam")
    page.locator("#slam-file input[type=file]").set_input_files(packed(tmp_path / "room.zip"))
    page.get_by_text("room.zip").first.wait_for()
    fill(page, "slam-effort", 5)
    page.locator("#slam-run").click()
    page.locator("#slam-status", has_text="4 frames of your recording").wait_for(timeout=120_000)
    screenshot(page, "slam-zip")
    page.reload()
    page.locator("#slam-file input[type=file]").set_input_files(packed(tmp_path / "bare.zip", camera=False))
    page.get_by_text("bare.zip").first.wait_for()
    page.locator("#slam-run").click()
    page.get_by_text("none of the layouts").wait_for()
    page.locator("#slam-status", has_text="see the message").wait_for()
