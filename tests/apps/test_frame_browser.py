"""The frame in a browser: home, navigation, about; light and dark; nothing from other hosts."""

from __future__ import annotations

import pytest

from mmkit.registry import APPS

expect = pytest.importorskip("playwright.sync_api").expect

pytestmark = pytest.mark.browser


def test_home_leads_to_pages_and_about(launch, page, screenshot):
    page.goto(launch())
    expect(page.locator("#home-cards .studio-card")).to_have_count(len(APPS.names()))
    screenshot(page, "studio-home")
    page.locator("#home-cards .studio-card").first.click()
    expect(page.locator(".studio-header h1")).to_have_text(APPS.get(APPS.names()[0]).title)
    page.get_by_role("link", name="About").first.click()
    expect(page.locator("#about-notes")).to_contain_text("No telemetry")
    screenshot(page, "studio-about")
