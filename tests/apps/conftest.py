"""Fixtures for browser tests: one headless Chromium, pages that refuse the outside world, and one studio."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from mmkit.registry import APPS

ROOT = Path(__file__).parent.parent.parent
SCREENSHOTS = ROOT / "screenshots"
CHROME = os.environ.get("CHROME_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
TIMEOUT_MS = 60_000

collect_ignore_glob = [] if importlib.util.find_spec("gradio") else ["test_*.py"]


@pytest.fixture(scope="session")
def launch() -> Iterator[Callable[..., str]]:
    """`launch("gmm")` starts the whole studio, once for all tests, and returns its URL, without a slash at the end; with options, another.

    The pages a test names must be in it.
    """
    from mmkit.apps import server

    running: dict[Any, tuple[Any, str]] = {}

    def start(*pages: str, **options: Any) -> str:
        for name in pages:
            APPS.get(name)
        key = tuple(sorted(options.items()))
        if key not in running:
            running[key] = server.launch_studio(block=False, **options)
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


NOISE = re.compile(
    r"^BJS - |^AbortError: New model is being loaded"
)  # Babylon: tries WebGPU before WebGL, drops a model for the next


@pytest.fixture
def new_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """`new_page()` opens a page in a context of its own (another visitor).

    At the end of the test there must have been no request to another host, no JavaScript error and nothing red in the console.
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
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" and not NOISE.match(m.text) else None)
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
def settled() -> Callable[[Any], None]:
    """`settled(page)` waits until the page stands and nothing on it is being computed."""

    def wait(page: Any) -> None:
        page.locator("h1").first.wait_for()
        page.wait_for_timeout(600)
        page.wait_for_function(
            """() => ![...document.querySelectorAll('[data-testid="status-tracker"]')].some(
                e => !e.classList.contains('hide') && e.checkVisibility() && e.innerText.trim())"""
        )

    return wait


SCREENS = [(theme, width) for theme in ("light", "dark") for width in (1280, 390)]


@pytest.fixture(scope="session")
def audit() -> Callable[..., None]:
    """`audit(page)` fails when the page, as it stands, has text below 4.5 : 1, a button or picture without a name, or more width than
    the screen, in the light or the dark, at 1280 or 390 pixels."""
    script = (Path(__file__).parent / "audit.js").read_text(encoding="utf-8")

    def check(page: Any, screens: Iterable[tuple[str, int]] = SCREENS) -> None:
        found = []
        for theme, width in screens:
            page.emulate_media(color_scheme=theme, reduced_motion="reduce")
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(200)
            found += [f"{theme}, {width} px: {line}" for line in page.evaluate(script, 4.5)]
        assert not found, "\n".join([page.url, *found])

    return check


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
        measured = (
            "s => { const e = document.querySelector(s); return e?.naturalWidth && [e.naturalWidth, e.naturalHeight] }"
        )
        width, height = page.wait_for_function(measured, arg=selector).json_value()  # 0 while it is being replaced
        box = img.bounding_box()
        scale = min(box["width"] / width, box["height"] / height)
        left, top = (box["width"] - width * scale) / 2, (box["height"] - height * scale) / 2
        img.click(position={"x": left + x * scale, "y": top + y * scale}, **options)

    return click
