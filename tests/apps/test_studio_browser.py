"""In a browser: names are text, nothing asks another host, bad numbers give the buttons back, and states do not mix."""

from __future__ import annotations

import http.server
import re
import threading
import zipfile

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from mmkit.apps import App, launch_studio
from mmkit.errors import InputError
from mmkit.registry import APPS

pytestmark = pytest.mark.browser

STATUS = "#finetune-status textarea, #finetune-status input"


@pytest.fixture
def listener():
    """(address, requests): a host of its own on loopback, which must stay lonely."""
    calls = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            calls.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", calls
    server.shutdown()


def _evil(host: str) -> str:
    return f'<img src="http://{host}/i.png" onerror="document.title=1">![m](http://{host}/m.png)[l](http://{host}/l)http://{host}/u'


def _build_names(name: str) -> None:
    """Every kind of place where a name is shown."""
    picture = Image.new("RGB", (20, 20), "red")
    show = gr.Button("Show", elem_id="names-show")
    fail = gr.Button("Fail", elem_id="names-fail")
    outputs = [
        gr.Label(elem_id="names-label"), gr.Dataframe(headers=["a", "b"], interactive=False, elem_id="names-table"),
        gr.Gallery(elem_id="names-gallery"), gr.Textbox(elem_id="names-text"), gr.Dropdown(elem_id="names-choice"),
        gr.JSON(elem_id="names-json"), gr.Radio(elem_id="names-radio"),
    ]  # fmt: skip

    def answer() -> list:
        gr.Info(name)
        gr.Warning(name)
        return [
            {name: 0.9, "other": 0.1}, [[name, "1"]], [(picture, name)], name, gr.Dropdown([name], value=name), {name: name},
            gr.Radio([name], label=name),
        ]  # fmt: skip

    def refuse() -> None:
        raise InputError(f"{name} cannot be used.")

    show.click(answer, outputs=outputs)
    fail.click(refuse, outputs=outputs[3])


def _is_text(page, calls) -> None:
    page.wait_for_timeout(1000)
    assert page.locator("img[src*='/i.png'], img[src*='/m.png'], a[href*='/l'], a[href$='/u'], [onerror]").count() == 0
    assert page.title() != "1"
    assert calls == []


def test_names_are_text_wherever_a_page_shows_them(new_page, listener, screenshot):
    expect = pytest.importorskip("playwright.sync_api").expect
    host, calls = listener
    name = _evil(host)
    APPS._known["names"] = App("names", "Names", "For tests.", lambda: _build_names(name))
    studio, url = launch_studio(["names"], block=False)
    try:
        page = new_page()
        page.goto(f"{url}names")
        page.locator("#names-show").click()
        expect(page.locator("#names-text textarea, #names-text input").first).to_have_value(name)
        expect(page.locator("#names-label")).to_contain_text("![m]")
        expect(page.locator(".toast-body").first).to_contain_text("![m]")
        _is_text(page, calls)
        page.locator("#names-fail").click()
        expect(page.locator(".toast-body", has_text="cannot be used").first).to_contain_text("![m]")
        _is_text(page, calls)
        screenshot(page, "studio-names")
    finally:
        studio.close(verbose=False)
        APPS._known.pop("names")


def _pictures(folder, names):
    """A zip with a class for every name."""
    path = folder / "classes.zip"
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as target:
        for level, name in enumerate(names):
            for i in range(6):
                noise = rng.integers(0, 60, (24, 24, 3)) + 90 * level
                Image.fromarray(noise.astype(np.uint8)).save(folder / "one.png")
                target.write(folder / "one.png", f"{name}/{i}.png")
    return path


@pytest.mark.slow
def test_class_names_of_a_zip_are_text_from_the_plan_to_the_result(launch, page, listener, tmp_path):
    expect = pytest.importorskip("playwright.sync_api").expect
    calls = listener[1]
    name = '![m](&#47;m.png)<img src=x onerror="document.title=1">[l](javascript:l)'.replace(":", "")
    archive = _pictures(tmp_path, [name, "plain"])
    page.goto(launch() + "/finetune")
    page.locator("#finetune-map table").wait_for()
    page.get_by_label("My pictures (zip)").check()
    bad = tmp_path / f"{_evil('x').replace('/', '')}.zip"
    bad.write_text("no zip")
    page.locator("#finetune-zip input[type=file]").set_input_files(bad)
    expect(page.locator("#finetune-data")).to_contain_text("not a zip")
    _is_text(page, calls)
    page.locator("#finetune-zip button[aria-label*='lear'], #finetune-zip button[aria-label*='emove']").first.click()
    page.locator("#finetune-zip input[type=file]").set_input_files(archive)
    expect(page.locator("#finetune-data")).to_contain_text("2 classes")
    page.locator("#finetune-adapter label", has_text="Linear probe").click()
    page.locator("#finetune-train:enabled").click()
    expect(page.locator(STATUS)).to_have_value(re.compile("finished after"), timeout=90_000)
    page.locator("#finetune-shown img").first.click()
    expect(page.locator("#finetune-label")).to_contain_text("%")
    _is_text(page, calls)


def test_bad_numbers_name_the_field_and_give_the_buttons_back(launch, page, screenshot):
    expect = pytest.importorskip("playwright.sync_api").expect
    page.goto(launch() + "/finetune")
    page.locator("#finetune-map table").wait_for()
    page.locator("#finetune-settings button").first.click()
    fields = {
        "Learning rate": ("#finetune-lr input", ["5", "-1", "1e30"], ""),
        "Seed": ("#finetune-seed input", ["-3", "1e30", ""], "0"),
    }
    for field, (selector, values, good) in fields.items():
        for value in values:
            page.locator(selector).fill(value)
            page.locator(selector).blur()
            page.locator("#finetune-train:enabled").click()
            expect(page.locator(".toast-body", has_text=field).first).to_be_visible()
            expect(page.locator("#finetune-train")).to_be_enabled()
            expect(page.locator("#finetune-stop")).to_be_disabled()
            page.locator(".toast-close").first.click()
            expect(page.locator(".toast-body")).to_have_count(0)
        page.locator(selector).fill(good)
        page.locator(selector).blur()


def test_a_click_meant_for_the_old_photo_does_not_land_on_the_new_one(launch, page, tmp_path, click_pixel):
    from mmkit.apps.segment import SESSIONS

    rng = np.random.default_rng(0)
    for name in ("first", "second"):
        Image.fromarray(rng.integers(0, 255, (300, 300, 3), np.uint8)).save(tmp_path / f"{name}.png")
    page.goto(launch() + "/segment")
    page.locator("#segment-picture input[type=file]").set_input_files(tmp_path / "first.png")
    page.locator("#segment-picture img").wait_for()
    page.locator("#segment-status", has_text="1 click").wait_for()
    page.locator("#segment-png:enabled").wait_for()  # all is quiet
    held = next(reversed(SESSIONS._open))
    owner = SESSIONS._open[held].owner
    SESSIONS.add(SESSIONS.get(held), "of the next photo")
    SESSIONS._open["of the next photo"].owner = owner
    SESSIONS.drop(held)  # as when another photo arrives while the page still shows this one
    click_pixel(page, "#segment-picture img", 150, 150)
    page.locator(".toast-body", has_text="This photo has gone").first.wait_for()
    assert len(SESSIONS.get("of the next photo").segmenter.clicks) == 1
    SESSIONS.drop("of the next photo")
