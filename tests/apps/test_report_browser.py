"""The page of a fine-tuning report in a browser: it runs nothing, asks nobody, fits every width and follows the theme."""

from __future__ import annotations

import re

import pytest

from mmkit.data import load_digits
from mmkit.vision.classification import prepare, train_prepared

pytestmark = pytest.mark.browser


def test_the_page_runs_nothing_asks_nobody_and_fits_every_width(browser, tmp_path):
    digits = load_digits((0, 1)).subset(range(40))
    digits.class_names = ["zero", "<script>document.title='ran'</script><img src=x onerror=alert(1)>"]
    train_prepared(
        prepare(digits, "tiny_vit", "linear_probe"), output_dir=tmp_path / "out", epochs=2, lr=1e-6, progress=False
    )
    for scheme, width in (("light", 1280), ("dark", 360)):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        asked: list[str] = []
        page.on("request", lambda r, asked=asked: asked.append(r.url))
        page.on("dialog", lambda d, asked=asked: (asked.append("a name ran"), d.dismiss()))
        page.goto(f"file://{tmp_path}/out/report.html")
        assert page.title() == "linear_probe on tiny_vit"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert [u for u in asked if not u.startswith(("data:", "file:"))] == []
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) > 380) == (scheme == "light")
        page.close()
