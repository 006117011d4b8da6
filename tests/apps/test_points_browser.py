"""The page of point clouds in a browser: drawn and dropped clouds, colors, refusals, the few-shot lab."""

from __future__ import annotations

import io
import random
import re

import numpy as np
import pytest
from PIL import Image

from mmkit.apps.points import drawn_cloud
from mmkit.weights import list_weights

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif("point_shapes" not in list_weights(), reason="the bundled models are not installed"),
]


def text_of(cloud: np.ndarray) -> bytes:
    return "\n".join(" ".join(f"{v:.5f}" for v in p) for p in cloud).encode()


def drop(page, name: str, content: bytes) -> None:
    page.locator("#points-file input[type=file]").set_input_files(
        {"name": name, "mimeType": "application/octet-stream", "buffer": content}
    )


def wait_for_points(page, other_than: bytes = b"") -> bytes:
    """Waits until the view shows a thing in several colors, and another picture than before; returns the picture."""
    for _ in range(200):
        picture = page.locator("#points-view canvas").screenshot()
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB").resize((60, 40))).reshape(-1, 3)
        if len(np.unique(pixels // 16, axis=0)) > 20 and picture != other_than:
            return picture
        page.wait_for_timeout(100)
    raise AssertionError("the view stays empty, or as it was")


def test_a_cloud_is_drawn_dropped_colored_and_refused(launch, page, screenshot, monkeypatch) -> None:
    monkeypatch.setattr("mmkit.apps.points.random", random.Random(0))  # a thing of one part has one color
    page.goto(launch() + "/points")
    page.locator("#points-draw").click()
    status = page.locator("#points-status textarea")
    page.wait_for_function(
        "() => /A drawn/.test(document.querySelector('#points-status textarea').value)", timeout=120_000
    )
    groups = wait_for_points(page)
    screenshot(page, "points-drawn")
    page.locator("#points-color label", has_text="Parts").click()
    page.locator("#points-parts li").first.wait_for()
    wait_for_points(page, groups)
    drop(page, "chair.xyz", text_of(drawn_cloud("chair", False, 3)))
    page.wait_for_function("() => /chair.xyz/.test(document.querySelector('#points-status textarea').value)")
    assert re.search(r"2,048 points", status.input_value())
    assert page.locator("#points-label", has_text="chair").count()
    wait_for_points(page)
    screenshot(page, "points-parts")
    page.locator("#points-file button[aria-label='Clear'], #points-file button[aria-label='Remove file']").first.click()
    page.wait_for_function("() => /Drop a mesh/.test(document.querySelector('#points-status textarea').value)")
    drop(page, "broken.ply", b"not a cloud")
    page.locator(".toast-body", has_text="broken.ply").wait_for()


def test_classes_are_taught_from_a_few_examples(launch, page, screenshot) -> None:
    page.goto(launch() + "/points")
    page.locator("#points-draw").click()
    page.wait_for_function(
        "() => /A drawn/.test(document.querySelector('#points-status textarea').value)", timeout=120_000
    )
    page.locator("#points-classes input[type=number]").fill("3")
    page.locator("#points-classes input[type=number]").press("Enter")
    page.locator("#points-fill").click()
    page.locator("#points-told", has_text="3 classes, 15 examples").wait_for()
    page.locator("#points-adapt").click()
    page.locator("#points-told", has_text=re.compile(r"unseen scans")).wait_for(timeout=120_000)
    page.locator("#points-ask").click()
    page.locator("#points-found img").nth(4).wait_for()
    screenshot(page, "points-lab")
