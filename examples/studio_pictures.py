"""Take the pictures of the studio's pages that its home page shows: `python examples/studio_pictures.py [page ...]`.

With `--screens` also those of docs/studio.md: each page as it stands after that, and the home page.

Each page is opened in Chromium (`pip install playwright`; `CHROME_PATH` names the browser) and shown its own drawn or public-domain
sample; what it makes of it is saved as `apps/pictures/<page>.webp`. A page that names no `picture` is left out.
Look at the pictures before you commit them.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
from pathlib import Path

from PIL import Image, ImageChops, ImageOps
from playwright.sync_api import Browser, sync_playwright

from mmkit.apps import App, launch_studio
from mmkit.registry import APPS

FOLDER = Path(__file__).parent.parent / "apps" / "pictures"
SCREENS = Path(__file__).parent.parent / "docs" / "pictures"
SIZE = (480, 300)
GROUND = "#f8fafc"
BARE = "[data-testid=block-label], .icon-button-wrapper {visibility: hidden}"
"""What lies over a picture while it is taken: nothing."""


def take(browser: Browser, url: str, app: App, seconds: float) -> tuple[Image.Image, bool, Image.Image]:
    """What `app` shows of its sample, after `seconds`, whether it is a drawing on the page's own ground, and the whole page."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, device_scale_factor=2, color_scheme="light")
    page.set_default_timeout(120_000)
    page.goto(f"{url}{app.name}")
    if app.sample:
        page.locator(f"#{app.sample}:enabled").click()
    shown = page.locator(f"#{app.picture} img, #{app.picture} canvas, #{app.picture} figure").first
    shown.wait_for(timeout=120_000)
    page.wait_for_timeout(1000 * seconds)
    source = shown.get_attribute("src") or ""
    content = page.request.get(source).body() if source.startswith("http") else shown.screenshot(style=BARE)
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    if shown.evaluate("e => e.tagName") == "CANVAS":
        picture = trim(picture)
    drawing = shown.evaluate("e => e.tagName") in ("FIGURE", "CANVAS")
    screen = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    page.close(run_before_unload=False)
    return Image.alpha_composite(Image.new("RGBA", picture.size, GROUND), picture).convert("RGB"), drawing, screen


def keep_screen(screen: Image.Image, name: str) -> None:
    """The upper part of a page, small, for the documentation."""
    width, height = screen.size
    part = screen.convert("RGB").crop((0, 0, width, min(height, round(width * 1.1))))
    part.thumbnail((1024, 1200), Image.Resampling.LANCZOS)
    part.save(SCREENS / name, quality=75, method=6)
    print(f"{name}: {(SCREENS / name).stat().st_size / 1000:.0f} kB")


def trim(picture: Image.Image, margin: int = 24) -> Image.Image:
    """A thing before an even ground, with less of the ground around it."""
    ground = Image.new("RGB", picture.size, picture.convert("RGB").getpixel((4, picture.height // 2)))
    changed = ImageChops.difference(picture.convert("RGB"), ground).convert("L").point(lambda v: 255 * (v > 24))
    left, top, right, bottom = changed.getbbox() or (0, 0, *picture.size)
    return picture.crop((left - margin, top - margin, right + margin, bottom + margin))


def fit(picture: Image.Image, drawing: bool) -> Image.Image:
    """Cut to the card's proportions; a strip is wrapped into two rows; a drawing, and what is much wider or higher, is shown whole."""
    if picture.width > 5 * picture.height:
        half = picture.width // 2
        rows = Image.new("RGB", (half, 2 * picture.height + 6), GROUND)
        for row in range(2):
            rows.paste(picture.crop((row * half, 0, (row + 1) * half, picture.height)), (0, row * (picture.height + 6)))
        picture = rows
    if not drawing and 0.5 < picture.width * SIZE[1] / (picture.height * SIZE[0]) < 1.3:
        return ImageOps.fit(picture, SIZE, Image.Resampling.LANCZOS, centering=(0.5, 0.35))
    framed = ImageOps.expand(picture, picture.width // 16, GROUND) if drawing else picture
    return ImageOps.pad(framed, SIZE, Image.Resampling.LANCZOS, color=GROUND)


def main() -> None:
    """Take the pictures of the named pages, or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="default: all")
    parser.add_argument("--seconds", type=float, default=8, help="given to a page to finish what it shows")
    parser.add_argument("--screens", action="store_true", help="the whole pages as well, into docs/pictures")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    (SCREENS / "studio").mkdir(parents=True, exist_ok=True)
    studio, url = launch_studio(options.pages or None, block=False)
    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=os.environ.get("CHROME_PATH") or shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name in options.pages or APPS.names():
            app = APPS.get(name)
            if not app.picture:
                continue
            path = FOLDER / f"{name}.webp"
            picture, drawing, screen = take(browser, url, app, options.seconds)
            fit(picture, drawing).save(path, quality=80, method=6)
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
            if options.screens:
                keep_screen(screen, f"studio/{name}.webp")
        if options.screens and not options.pages:
            home = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
            home.goto(url)
            home.wait_for_timeout(3000)
            keep_screen(Image.open(io.BytesIO(home.screenshot(full_page=True))).crop((0, 0, 1280, 1000)), "home.webp")
        browser.close()
    studio.close()


if __name__ == "__main__":
    main()
