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
