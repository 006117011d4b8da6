"""Fixtures for browser tests: one headless Chromium, pages that refuse the outside world, and a studio per set of pages."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parent.parent.parent
SCREENSHOTS = ROOT / "screenshots"
CHROME = os.environ.get("CHROME_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
TIMEOUT_MS = 30_000

collect_ignore_glob = [] if importlib.util.find_spec("gradio") else ["test_*.py"]


@pytest.fixture(scope="session")
def launch() -> Iterator[Callable[..., str]]:
    """`launch("finetune", ...)` starts a studio with these pages (once) and returns its URL, without a slash at the end."""
    from mmkit.apps import frame

    running: dict[Any, tuple[Any, str]] = {}

    def start(*names: str, **options: Any) -> str:
        key = (names, tuple(sorted(options.items())))
        if key not in running:
            running[key] = frame.launch_studio(names, block=False, **options)
        return running[key][1].rstrip("/")

    yield start
    for studio, _ in running.values():
        studio.close(verbose=False)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium; tests are skipped where it or playwright is missing (`CHROME_PATH` names another binary)."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if not sys.platform.startswith("linux") or not CHROME:
        pytest.skip("no Chromium found; install it or set CHROME_PATH")
    sync_api.expect.set_options(timeout=TIMEOUT_MS)
    with sync_api.sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=CHROME, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chrome
        chrome.close()


@pytest.fixture
def new_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """`new_page()` opens a page in a context of its own (another visitor).

    At the end of the test there must have been no request to another host and no JavaScript error.
    """
    contexts, outside, errors = [], [], []

    def guard(route: Any) -> None:
        target = urlsplit(route.request.url)
        if target.scheme in ("data", "blob") or target.hostname in ("127.0.0.1", "localhost"):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    def make(width: int = 1280, height: int = 900, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **options)
        contexts.append(context)
        context.route("**/*", guard)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        return page

    yield make
    for context in contexts:
        context.close()
    assert not outside, f"requests to other hosts: {outside}"
    assert not errors, f"JavaScript errors: {errors}"


@pytest.fixture
def page(new_page: Callable[..., Any]) -> Any:
    """One page of one visitor."""
    return new_page()


@pytest.fixture(scope="session")
def screenshot() -> Callable[[Any, str], Path]:
    """`screenshot(page, "gmm-result")` writes screenshots/gmm-result.png of the whole page."""

    def take(page: Any, name: str) -> Path:
        SCREENSHOTS.mkdir(exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        page.screenshot(path=path, full_page=True)
        return path

    return take


@pytest.fixture(scope="session")
def click_pixel() -> Callable[..., None]:
    """`click_pixel(page, "#seg-image img", x, y)` clicks an image at a pixel of its source (letterboxing accounted for)."""

    def click(page: Any, selector: str, x: float, y: float, **options: Any) -> None:
        img = page.locator(selector).first
        box = img.bounding_box()
        width, height = img.evaluate("e => [e.naturalWidth, e.naturalHeight]")
        scale = min(box["width"] / width, box["height"] / height)
        left, top = (box["width"] - width * scale) / 2, (box["height"] - height * scale) / 2
        img.click(position={"x": left + x * scale, "y": top + y * scale}, **options)

    return click
