"""The page "Video" in a browser: a clip draws itself, its answer appears, backwards turns it round, merging is measured."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mmkit.video import write_video

pytestmark = pytest.mark.browser

STATUS = "#video-status textarea, #video-status input"


def test_a_clip_is_drawn_classified_reversed_and_merged(launch, page, screenshot, tmp_path, monkeypatch):
    from mmkit.apps import video

    monkeypatch.setattr(video.random, "getrandbits", lambda bits: 7)  # not every clip is read rightly; this one is
    expect = pytest.importorskip("playwright.sync_api").expect
    page.goto(f"{launch()}/video")
    status = page.locator(STATUS).first
    expect(status).to_have_value(re.compile(r"24 frames, 2\.0 s .* played forwards"))
    page.wait_for_function("document.querySelector('#video-strip img')?.naturalWidth > 400")
    page.locator("#video-direction input").click()
    page.get_by_role("option", name="moves right").click()
    page.locator("#video-draw").click()
    expect(status).to_have_value(re.compile("forwards: moves right"))
    page.wait_for_timeout(800)
    screenshot(page, "video-forwards")
    page.get_by_label("Backwards").check()
    expect(status).to_have_value(re.compile("backwards: moves left"))
    page.get_by_label("Adapters merged").check()
    page.get_by_role("tab", name="Merged or not").click()
    page.locator("#video-compare").click()
    expect(page.locator("#video-verdict textarea, #video-verdict input").first).to_have_value(
        re.compile("Largest difference")
    )
    screenshot(page, "video-merged")
    page.get_by_role("tab", name="Heads").click()
    expect(page.locator("#video-heads")).to_contain_text("own frame")
    screenshot(page, "video-heads")
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"not a video")
    page.locator("#video-clip button[aria-label='Clear']").first.click()
    page.locator("#video-clip input[type=file]").set_input_files(bad)
    message = page.locator(".toast-body").filter(has_text="not a readable video").first
    expect(message).to_contain_text("bad.mp4 is not")
    expect(message).not_to_contain_text("/")
    expect(status).to_have_value("No answer: see the message.")
    expect(page.locator("#video-strip img")).to_have_count(0)
    expect(page.locator("#video-label")).not_to_contain_text("moves")


def test_a_file_that_the_browser_cannot_play_is_shown_all_the_same_and_classified_once(
    launch, page, tmp_path, monkeypatch
):
    from mmkit.apps import video

    asked, classify = [], video.classify
    monkeypatch.setattr(video, "classify", lambda clip, *rest: asked.append(clip) or classify(clip, *rest))
    expect = pytest.importorskip("playwright.sync_api").expect
    avi = write_video(tmp_path / "old camera.avi", np.full((30, 64, 96, 3), 99, np.uint8), codec="mpeg4", options={})
    page.goto(f"{launch()}/video")
    status = page.locator(STATUS).first
    expect(status).to_have_value(re.compile("24 frames"))
    page.locator("#video-clip button[aria-label='Clear']").first.click()
    page.locator("#video-clip input[type=file]").set_input_files(avi)
    expect(status).to_have_value(re.compile("30 frames"))
    page.wait_for_function("document.querySelector('#video-clip video')?.currentSrc.endsWith('.mp4')")
    page.wait_for_timeout(1000)
    assert [clip for clip in asked if clip and "camera" in clip] == asked[-1:]


def test_the_scores_stand_over_true_time():
    from types import SimpleNamespace

    import numpy as np

    from mmkit.apps.video import timeline

    windows = [SimpleNamespace(start=a, end=b, scores=np.array([c, 1 - c])) for a, b, c in ((0, 4, 1.0), (4, 5, 0.25))]
    chart = timeline(SimpleNamespace(windows=windows, class_names=("moves", "<b>")))
    widths = [float(w) + 1 for w in re.findall(r'<rect [^>]*width="([\d.]+)"', chart)]  # a gap of 1 between stretches
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.02)
    assert re.findall(r'fill-opacity="([\d.]+)"', chart) == ["1.00", "0.28", "0.04", "0.76"]
    assert "&lt;b&gt;, 4.0 to 5.0 s: 75%" in chart


def test_a_phone_shows_the_whole_width(launch, page):
    expect = pytest.importorskip("playwright.sync_api").expect
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{launch()}/video")
    expect(page.locator(STATUS).first).to_have_value(re.compile("24 frames"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(page.get_by_role("tab", name="Heads")).to_be_visible()


def test_the_endpoints_work_without_the_page(launch):
    from gradio_client import Client, handle_file

    client = Client(launch(), verbose=False)
    clip = client.predict("moves up", api_name="/video_draw")
    path = clip["video"] if isinstance(clip, dict) else clip
    label, *_, status = client.predict(handle_file(path), 2, "Backwards", "Adapters merged", api_name="/video_classify")
    assert label["label"] == "moves down"
    assert "backwards" in status
    with pytest.raises(Exception, match="list of choices"):
        client.predict("sideways", api_name="/video_draw")
