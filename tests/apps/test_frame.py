"""The shell over HTTP: what must stay closed, upload limits, sessions of their own, readable errors."""

from __future__ import annotations

import struct
import zlib

import gradio as gr
import httpx
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from mmkit.apps import App, build_studio, launch_studio, readable, server
from mmkit.errors import InputError
from mmkit.ops.compiling import KERNELS
from mmkit.registry import APPS

PROBES = [
    "gradio_api/file=/etc/passwd",
    "gradio_api/file=pyproject.toml",
    "gradio_api/file=apps/frame.py",
    "gradio_api/file=../../../../etc/passwd",
    "gradio_api/file=.gitignore",
    "gradio_api/file=%2fetc%2fpasswd",
    "gradio_api/file=..%2f..%2f..%2fetc%2fpasswd",
    "static/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    "gradio_api/proxy=http://127.0.0.1:22",
    "gradio_api/proxy=http%3A%2F%2F169.254.169.254%2Flatest",
    "gradio_api/stream/x/y/z/..%2f..%2fetc%2fpasswd",
    "monitoring",
    "gradio_api/runs",
]


def _build_probe() -> None:
    """A page that shows every way a handler can end."""
    image = gr.Image(label="Picture", elem_id="probe-image")
    out = gr.Textbox(elem_id="probe-out")
    state = gr.State(0)
    gr.Button("a").click(lambda x: "none" if x is None else str(x.shape), image, out, api_name="probe_shape")

    @readable
    def known(text: str) -> str:
        raise InputError(f"<b>{text}</b> is wrong")

    def unknown(text: str) -> str:
        raise RuntimeError(f"secret {text}")

    def count(n: int) -> tuple[int, str]:
        return n + 1, str(n + 1)

    gr.Button("b").click(known, out, out, api_name="probe_known")
    gr.Button("c").click(unknown, out, out, api_name="probe_unknown")
    gr.Button("d").click(count, state, [state, out], api_name="probe_count")


PROBE = App("probe", "Probe", "For tests.", _build_probe)


@pytest.fixture(scope="module")
def url():
    APPS._known["probe"] = PROBE
    studio, url = launch_studio(["probe"], block=False, max_file_size="1mb")
    yield url
    studio.close(verbose=False)
    APPS._known.pop("probe")


@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False)


@pytest.mark.parametrize("path", PROBES)
def test_closed_paths(url, path):
    assert 400 <= httpx.get(url + path).status_code < 500


def test_pages_and_loopback(url):
    assert url.startswith("http://127.0.0.1:")
    for path in ("", "probe", "about"):
        assert httpx.get(url + path).status_code == 200


def test_large_upload_is_refused_and_small_one_works(url, client, tmp_path):
    files = {"files": ("big.bin", b"0" * 1_500_000)}
    assert httpx.post(url + "gradio_api/upload", files=files).status_code == 413
    Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(tmp_path / "small.png")
    assert client.predict(handle_file(tmp_path / "small.png"), api_name="/probe_shape") == "(10, 20, 3)"
    assert client.predict(None, api_name="/probe_shape") == "none"


def test_unreadable_and_huge_pictures_are_messages(client, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(Exception, match="cannot be read as a picture"):
        client.predict(handle_file(tmp_path / "text.png"), api_name="/probe_shape")
    (tmp_path / "huge.png").write_bytes(_png_header(40_000, 25_000))
    with pytest.raises(Exception, match="1000000000 pixels"):
        client.predict(handle_file(tmp_path / "huge.png"), api_name="/probe_shape")
    (tmp_path / "large.png").write_bytes(_png_header(10_000, 6_401))
    with pytest.raises(Exception, match="the limit is 64 million"):
        client.predict(handle_file(tmp_path / "large.png"), api_name="/probe_shape")


def _png_header(width: int, height: int) -> bytes:
    """The start of a PNG that claims this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 100))


def test_known_errors_are_escaped_and_others_keep_quiet(client):
    with pytest.raises(Exception, match="&lt;b&gt;x&lt;/b&gt; is wrong"):
        client.predict("x", api_name="/probe_known")
    with pytest.raises(Exception) as caught:
        client.predict("x", api_name="/probe_unknown")
    assert "secret" not in str(caught.value)


def test_sessions_do_not_share_state(url, client):
    first = [client.predict(api_name="/probe_count") for _ in range(2)]
    assert first == ["1", "2"]
    assert Client(url, verbose=False).predict(api_name="/probe_count") == "1"


def test_readable_generators_stream_and_report():
    @readable
    def stream(n):
        yield 1
        if n:
            raise InputError("<no>")

    assert list(stream(0)) == [1]
    with pytest.raises(gr.Error, match="&lt;no&gt;"):
        list(stream(1))


def test_unknown_page_names_the_nearest():
    with pytest.raises(InputError, match="finetune"):
        build_studio(["finetun"])


def test_taken_port_is_a_clear_error(url):
    with pytest.raises(InputError, match="another port"):
        launch_studio(["finetune"], port=int(url.rstrip("/").rsplit(":", 1)[1]), block=False)


def test_pages_load_ahead_one_by_one_and_one_that_fails_holds_up_no_other(monkeypatch, capsys):
    loaded = []

    def broken() -> None:
        raise InputError("this model's folder is gone")

    pages = [App("first", "", "", gr.Markdown, load=broken), App("none", "", "", gr.Markdown)]
    pages.append(App("last", "", "", gr.Markdown, load=lambda: loaded.append("last")))
    monkeypatch.setattr(server, "cpu_kernels", loaded.append)
    for page in pages:
        monkeypatch.setitem(APPS._known, page.name, page)
    server.load_ahead(["first", "none", "last"])
    assert loaded == [*KERNELS, "last"]
    assert "all models are loaded" in capsys.readouterr().out


def test_no_handler_starts_another_several_times_at_once():
    """What one handler sets must not be several `change` triggers of another: those runs overtake each other, and the page keeps
    the answer to half of the new values (gradio's `always_last` holds back a trigger only once the run before it is under way)."""
    studio = build_studio()
    runs = list(studio.fns.values())
    for answering in runs:
        changes = {block for block, event in answering.targets if event == "change"}
        for setting in runs:
            both = changes & {c._id for c in setting.outputs}
            assert len(both) < 2, (setting.name, answering.name, [studio.blocks[b].label for b in both])


def test_what_a_slider_does_its_reset_button_does():
    """Gradio's reset button sends `release`, not `input`."""
    studio = build_studio()
    heard = {}
    for run in studio.fns.values():
        for block, event in run.targets:
            heard.setdefault(block, set()).add(event)
    sliders = {b: heard[b] for b, block in studio.blocks.items() if isinstance(block, gr.Slider) and b in heard}
    assert sliders
    deaf = [studio.blocks[b].label for b, events in sliders.items() if not events & {"release", "change"}]
    assert not deaf, deaf


def test_every_page_builds_without_loading_a_model():
    """All registered pages build quickly, keep their prefix, and name every public endpoint."""
    studio = build_studio()
    config = studio.get_config_file()
    ids = [c["props"].get("elem_id") for c in config["components"]]
    for name in APPS.names():
        assert f"{name}-header" in ids
    named = [i for i in ids if i]
    assert len(named) == len(set(named)), sorted({i for i in named if named.count(i) > 1})
    public = [d["api_name"] for d in config["dependencies"] if d["api_visibility"] == "public"]
    assert not [n for n in public if "lambda" in str(n)], public
