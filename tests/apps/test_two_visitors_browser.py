"""Two people at once on the pages that show something of their own: both get an answer."""

from __future__ import annotations

import pytest

from mmkit.registry import APPS

pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.browser

PAGES = ("medical", "piip", "points", "segment", "slam", "splats")
"""Not those that train for a while; a training for each visitor is in their own tests."""


@pytest.mark.parametrize("name", PAGES)
def test_both_are_answered(launch, new_page, settled, name):
    app, url = APPS.get(name), launch()
    visitors = [new_page(), new_page()]
    for page in visitors:
        page.goto(f"{url}/{name}")
    for page in visitors:
        settled(page)
    for page in visitors:
        page.locator(f"#{app.sample}:enabled").click()  # the second before the first has its answer
    for page in visitors:
        page.locator(f"#{app.picture}").locator("img, canvas, figure").first.wait_for()
        settled(page)
