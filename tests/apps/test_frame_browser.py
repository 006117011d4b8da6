"""The frame in a browser: home, navigation, about; light and dark; nothing from other hosts."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.browser


def test_home_leads_to_pages_and_about(launch, page, screenshot):
    page.goto(launch("finetune"))
    page.locator("#home-cards .studio-card").first.wait_for()
    screenshot(page, "studio-home")
    page.locator("#home-cards .studio-card").first.click()
    page.locator("#finetune-header h1").wait_for()
    page.get_by_role("link", name="About").first.click()
    page.locator("#about-notes").wait_for()
    page.wait_for_timeout(500)
    screenshot(page, "studio-about")


@pytest.mark.slow
def test_every_page_opens_and_asks_nobody_else(launch, page, screenshot):
    """The whole studio: each page shows its header, raises no error and sends no request to another host."""
    from mmkit.registry import APPS

    url = launch(*APPS.names())
    page.goto(url)
    page.locator("#home-cards .studio-card").nth(len(APPS.names()) - 1).wait_for()
    screenshot(page, "studio-all")
    for name in APPS.names():
        page.goto(f"{url}/{name}")
        page.locator(f"#{name}-header h1").wait_for()
        page.wait_for_timeout(300)
