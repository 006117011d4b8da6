"""Who may talk to the studio, whose files are whose, what it says when it refuses, and what it stops when nobody listens."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator

import gradio as gr
import httpx
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from mmkit.apps import App, launch_studio, limits, output_folder, visitors
from mmkit.apps.guard import without_markup
from mmkit.apps.handlers import number, plain, readable, wanted, with_limit
from mmkit.apps.server import _checker, read_passwords
from mmkit.errors import InputError
from mmkit.registry import APPS

EVIL = 'a"<img src=http://127.0.0.1:9/x onerror=alert(1)>![b](http://127.0.0.1:9/y)[c](javascript:d)'
RUNNING: dict[str, bool] = {}


def _build() -> None:
    text = gr.Textbox(label="Text")
    file = gr.File(label="A file", type="filepath")
    image = gr.Image(label="A picture", type="pil")
    rate = gr.Number(label="Learning rate", minimum=0, maximum=1)
    out, result = gr.Textbox(), gr.File()

    def store(words: str) -> str:
        path = output_folder() / "result.txt"
        path.write_text(words)
        return str(path)

    def several(words: str) -> Iterator[str]:
        for i in range(3):
            yield store(f"{words} {i}")

    def read(path: str) -> str:
        return "" if path is None else open(path).read()

    def size(picture: Image.Image) -> str:
        return str(picture.size)

    def fail(words: str) -> str:
        raise InputError(words)

    def broken(words: str) -> str:
        raise KeyError("secret")

    def endless(words: str) -> str:
        RUNNING[words] = True
        check = wanted()
        try:
            for i in range(600):
                time.sleep(0.05)
                check()
                yield str(i)
        finally:
            RUNNING[words] = False

    def plodding(words: str) -> str:
        RUNNING[words] = True
        check = wanted()
        try:
            for _ in range(600):
                time.sleep(0.05)
                check()
        finally:
            RUNNING[words] = False
        return "done"

    for name, fn, given, back in (
        ("store", store, text, result), ("several", several, text, result), ("read", read, file, out),
        ("size", size, image, out), ("fail", fail, text, out),
        ("broken", broken, text, out), ("endless", endless, text, out), ("plodding", plodding, text, out),
        ("rate", str, rate, out),
    ):  # fmt: skip
        gr.Button(name).click(fn, given, back, api_name=name, concurrency_limit=4)


@pytest.fixture(scope="module")
def url():
    APPS._known["gate"] = App("gate", "Gate", "For tests.", _build)
    studio, url = launch_studio(["gate"], block=False, max_file_size="1mb", allow_hosts=["studio.example"])
    yield url.rstrip("/")
    studio.close(verbose=False)
    APPS._known.pop("gate")


@pytest.fixture
def client(url):
    return Client(url, verbose=False)


@pytest.fixture
def browser_like(url):
    """`browser_like()` is another visitor, with a cookie."""

    def make(**headers):
        one = httpx.Client(base_url=url, headers=headers)
        one.get("/gate")
        return one

    return make


def _upload(visitor, name="mine.txt", content=b"private"):
    return visitor.post("/gradio_api/upload", files={"files": (name, content)}).json()[0]


def _file(path):
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def _index(visitor, name):
    """The number of an endpoint."""
    return next(fn["id"] for fn in visitor.get("/config").json()["dependencies"] if fn["api_name"] == name)


def _ask(visitor, name, *data):
    """The last event of a call of an endpoint, as text."""
    event = visitor.post(f"/gradio_api/call/{name}", json={"data": list(data)})
    if event.status_code != 200:
        return event.text
    return visitor.get(f"/gradio_api/call/{name}/{event.json()['event_id']}").text


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:7860"},
        {"host": ""},
        {"origin": "http://localhost:9999"},
        {"origin": "http://127.0.0.1:9"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"},
    ],
)
def test_other_names_and_other_sites_are_refused_everywhere(url, headers):
    files = {"files": ("x.txt", b"x")}
    for answer in (
        httpx.get(url + "/config", headers=headers),
        httpx.post(url + "/gradio_api/upload", files=files, headers=headers),
        httpx.post(url + "/gradio_api/queue/join", json={"data": [], "fn_index": 0, "session_hash": "a"}, headers=headers),
        httpx.post(url + "/gradio_api/call/fail", json={"data": ["x"]}, headers=headers),
        httpx.post(url + "/gradio_api/cancel", json={"session_hash": "a", "fn_index": 0, "event_id": "b"}, headers=headers),
        httpx.options(url + "/config", headers={"access-control-request-method": "GET", **headers}),
    ):  # fmt: skip
        assert answer.status_code in (400, 403, 421)
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_own_names_own_pages_and_allowed_names_are_let_in(url):
    port = url.rsplit(":", 1)[1]
    for headers in (
        {"host": f"localhost:{port}", "origin": f"http://localhost:{port}"},
        {"host": "studio.example", "origin": "https://studio.example"},
        {"host": "studio.example:8080", "origin": "http://studio.example:8080"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},  # a link somewhere else
    ):
        answer = httpx.get(url + "/config", headers=headers)
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers


def test_headers_of_pages_and_files(url, browser_like):
    page = httpx.get(url + "/gate")
    policy = page.headers["content-security-policy"]
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    assert "sha256-" in policy
    assert "frame-ancestors 'none'" in policy
    cookie = page.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    one = browser_like()
    file = one.get(f"/gradio_api/file={_upload(one, 'x.html', b'<script>1</script>')}")
    assert file.headers["content-disposition"].startswith("attachment")
    assert file.headers["content-security-policy"].endswith("sandbox")
    assert file.headers["cache-control"] == "no-store"
    for answer in (page, file, httpx.get(url + "/theme.css"), httpx.get(url + "/nothing")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_files_are_for_their_visitor_only(url, browser_like):
    one, other, nobody = browser_like(), browser_like(), httpx.Client(base_url=url)
    path = _upload(one)
    assert one.get(f"/gradio_api/file={path}").text == "private"
    assert other.get(f"/gradio_api/file={path}").status_code == 403
    assert nobody.get(f"/gradio_api/file={path}").status_code == 403
    assert '"private"' in _ask(one, "read", _file(path))
    assert "not an upload or a result of this session" in _ask(other, "read", _file(path))
    result = json.loads(_ask(one, "store", "words").split("data: ")[-1])[0]
    assert one.get(f"/gradio_api/file={result['path']}").text == "words"
    assert other.get(f"/gradio_api/file={result['path']}").status_code == 403
    assert '"words"' in _ask(one, "read", _file(result["path"]))


def test_every_file_that_a_handler_yields_is_the_visitors(url, browser_like):
    one, other = browser_like(), browser_like()
    body = {"data": ["words"], "fn_index": _index(one, "several"), "session_hash": "yields1"}
    assert one.post("/gradio_api/queue/join", json=body).status_code == 200
    with one.stream("GET", "/gradio_api/queue/data?session_hash=yields1") as stream:
        shown = stream.read().decode()
    assert '["replace", ["path"], ' in shown or '["replace",["path"],' in shown  # gradio sends what differs
    files = sorted(set(re.findall(r'"(/[^"]+/result\.txt)"', shown)))
    assert sorted(one.get(f"/gradio_api/file={f}").text for f in files) == ["words 0", "words 1", "words 2"]
    assert {other.get(f"/gradio_api/file={f}").status_code for f in files} == {403}


def test_sessions_and_events_are_for_their_visitor_only(url, browser_like):
    one, other = browser_like(), browser_like()
    body = {"data": ["x"], "fn_index": 0, "session_hash": "mine123"}
    assert one.post("/gradio_api/queue/join", json=body).status_code == 200
    assert other.post("/gradio_api/queue/join", json=body).status_code == 403
    assert other.get("/gradio_api/queue/data?session_hash=mine123").status_code == 403
    assert other.get("/gradio_api/heartbeat/mine123").status_code == 403
    assert other.get("/gradio_api/call/fail/mine123").status_code == 404
    cancel = {"session_hash": "mine123", "fn_index": 0, "event_id": "x"}
    assert other.post("/gradio_api/cancel", json=cancel).status_code == 403
    with one.stream("GET", "/gradio_api/queue/data?session_hash=mine123") as stream:
        assert "process_completed" in stream.read().decode()
    event = one.post("/gradio_api/call/fail", json={"data": ["x"]}).json()["event_id"]
    assert other.get(f"/gradio_api/call/fail/{event}").status_code == 403


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "pyproject.toml", "http://127.0.0.1:9/x.png", "http://169.254.169.254/latest", "file:///etc/passwd",
     "//127.0.0.1:9/x", "\\\\host\\share", "~/.ssh/id_rsa", "../../etc/passwd", "data:image/png;base64,AAAA", "", None],
)  # fmt: skip
def test_a_request_names_no_foreign_files_and_no_addresses(browser_like, path):
    for name in ("read", "size"):
        answer = _ask(browser_like(), name, _file(path))
        assert "not an upload" in answer
    answer = _ask(browser_like(), "size", {"path": "x", "url": "data:image/png;base64,AAAA"})
    assert "Upload the file instead" in answer


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/x.png", "https://example.com/x.png", "//127.0.0.1:9/x"])
def test_the_server_fetches_nothing_for_anybody(url, path):
    assert httpx.get(f"{url}/gradio_api/file={path}").status_code == 403
    assert httpx.get(f"{url}/gradio_api/proxy={path}").status_code == 404


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"", 400), (b"{", 400), (b"[1]", 400), (b"[" * 100_000, 400), (b'{"data": 5}', 422), (b"\xff\xfe", 400),
     (b'{"data": ["' + b"x" * 4_000_000 + b'"]}', 413)],
)  # fmt: skip
def test_malformed_requests_are_refused(url, content, status):
    answer = httpx.post(f"{url}/gradio_api/call/fail", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status


@pytest.mark.parametrize(
    "path", ["process_recording", "vibe-edit", "vibe-code", "proxy=x", "deep_link", "run-history/connect", "dev/reload"]
)
def test_what_the_studio_does_not_need_is_shut(url, path):
    assert httpx.post(f"{url}/gradio_api/{path}", json={}).status_code == 404
    assert httpx.get(f"{url}/gradio_api/{path}").status_code == 404


def test_uploads_keep_to_their_limit_and_to_the_quota(url, browser_like, monkeypatch):
    one = browser_like()
    many = [("files", (f"{i}.bin", b"0" * 300_000)) for i in range(5)]  # each is small enough
    assert one.post("/gradio_api/upload", files=many).status_code == 413

    def unannounced():
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        for _ in range(30):
            yield b"0" * 100_000
        yield b"\r\n--b--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=b"}
    for _ in range(4):  # whether gradio or the guard sees it first depends on how the bytes arrive
        assert one.post("/gradio_api/upload", content=unannounced(), headers=headers).status_code == 413
    monkeypatch.setattr(limits, "DISK_QUOTA", "1kb")
    refused = one.post("/gradio_api/upload", files={"files": ("x", b"0" * 2000)})
    assert refused.status_code == 507
    assert "storage is full" in refused.text
    assert "after 60 minutes" in refused.text


def test_every_error_has_a_text_without_markup(client, browser_like):
    with pytest.raises(Exception, match="&lt;img") as caught:
        client.predict(EVIL, api_name="/fail")
    assert "<" not in str(caught.value)
    with pytest.raises(Exception, match=r"Something broke in the studio \(KeyError\)") as caught:
        client.predict("x", api_name="/broken")
    assert "secret" not in str(caught.value)
    one = browser_like()
    for name, value in (
        ("fail", {"a": 1}),
        ("rate", "<b>x</b>"),
        ("rate", 5),
        ("size", 3),
        ("read", "x"),
        ("store", [1]),
    ):
        answer = _ask(one, name, value)
        assert "event: complete" in answer or '"error": "' in answer, (name, answer)
        assert "<b>" not in answer
    wrong_count = _ask(one, "fail", 1, 2, 3)
    assert '"error": "' in wrong_count


@pytest.mark.parametrize("value", [5, -3, 1e30, "x", float("nan"), float("inf")])
def test_a_field_is_named_when_its_number_is_bad(client, browser_like, value):
    content = json.dumps({"data": [value]})
    one = browser_like()
    event = one.post("/gradio_api/call/rate", content=content, headers={"content-type": "application/json"}).json()
    answer = one.get(f"/gradio_api/call/rate/{event['event_id']}").text
    assert "Learning rate" in answer or value != value  # gradio lets NaN through; the handler's own check is `number`
    with pytest.raises(InputError, match="Learning rate must be a number from 0 to 1, not"):
        number("Learning rate", value, 0, 1)


def test_numbers():
    assert number("Seed", 3.0, 0, 10, whole=True) == 3
    assert number("Seed", None, 0, 10, whole=True, default=0) == 0
    with pytest.raises(InputError, match="Seed is empty"):
        number("Seed", None, 0, 10)
    with pytest.raises(InputError, match="whole number"):
        number("Seed", 3.5, 0, 10, whole=True)
    with pytest.raises(InputError, match="30 million pixels; this page takes up to 4 million"):
        with_limit(Image.new("1", (6000, 5000)), 4_000_000, "this page")


def _until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("name", ["endless", "plodding"])
def test_work_stops_when_its_client_leaves(browser_like, name):
    one = browser_like()
    event = one.post(f"/gradio_api/call/{name}", json={"data": [f"leaving {name}"]}).json()["event_id"]
    with one.stream("GET", f"/gradio_api/call/{name}/{event}"):
        assert _until(lambda: RUNNING.get(f"leaving {name}"))
        time.sleep(0.5)
        assert RUNNING[f"leaving {name}"]
    assert _until(lambda: not RUNNING[f"leaving {name}"])


@pytest.mark.parametrize("name", ["endless", "plodding"])
def test_a_stream_nobody_reads_stops(browser_like, monkeypatch, name):
    monkeypatch.setattr(limits, "LEAVE_SECONDS", 1)
    one = browser_like()
    one.post(f"/gradio_api/call/{name}", json={"data": [f"unread {name}"]})
    assert _until(lambda: RUNNING.get(f"unread {name}"))
    assert _until(lambda: not RUNNING[f"unread {name}"])
    body = {"data": [f"unjoined {name}"], "fn_index": _index(one, name), "session_hash": f"s{name}"}
    assert one.post("/gradio_api/queue/join", json=body).status_code == 200
    assert _until(lambda: RUNNING.get(f"unjoined {name}"))
    assert _until(lambda: not RUNNING[f"unjoined {name}"])


def test_a_page_that_listens_is_left_alone(monkeypatch):
    visitors.expect("here", 0)
    with visitors.listening("here"):
        visitors.stop_if_left("here")
    visitors.stop_if_left("never seen")
    monkeypatch.setitem(visitors._until, "here", 0.0)
    with pytest.raises(visitors.Left):
        visitors.stop_if_left("here")


def test_a_quick_event_of_a_page_that_has_been_still_is_answered(browser_like):
    """Pages send events that need no queue as plain requests, also long after the last stream was closed."""
    one = browser_like()
    visitors.expect("still", -1)
    body = {"data": ["words"], "fn_index": _index(one, "fail"), "session_hash": "still"}
    assert "words" in one.post("/gradio_api/run/fail", json=body).json()["error"]


def test_names_are_text_in_html_and_markdown():
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(f"⚠️ {plain(EVIL)}")
    for tag in ("<img", "<a", "<script", "<em"):
        assert tag not in html
    assert "onerror" in html  # it is all there, as text
    assert without_markup("&lt;b&gt; <i>") == "&lt;b&gt; &lt;i&gt;"


def test_a_host_for_others_needs_passwords(tmp_path):
    with pytest.raises(InputError, match=r"0\.0\.0\.0 can be reached by others"):
        launch_studio(["gmm"], host="0.0.0.0", block=False)
    file = tmp_path / "users"
    file.write_text("# who\nada: love\nbob:a:b\n\n")
    assert read_passwords(file) == {"ada": " love", "bob": "a:b"}
    for content, message in (("ada", "line 1: expected user:password"), ("", "names no user"), (":x", "line 1")):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            read_passwords(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_passwords(tmp_path / "none")


def test_passwords_open_and_wrong_ones_slow_down(monkeypatch):
    import asyncio

    from mmkit.apps import server

    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(server, "_pause", sleep)
    check = _checker({"ada": "right"})

    async def tries():
        found = [await check("ada", f"wrong {i}") for i in range(10)] + [await check("bob", "right")]
        return found, await check("ada", "right")

    wrong, right = asyncio.run(tries())
    assert not any(wrong)
    assert right
    assert waits[0] < waits[1] < waits[2]
    assert max(waits) == server.MAX_DELAY


@pytest.mark.slow
def test_with_passwords_nothing_is_open(tmp_path):
    studio, url = launch_studio(["gmm"], block=False, host="0.0.0.0", auth={"ada": "right"})
    try:
        url = url.rstrip("/").replace("localhost", "127.0.0.1")
        for path in ("config", "gradio_api/info", "gradio_api/queue/status"):
            assert httpx.get(f"{url}/{path}").status_code == 401
        assert httpx.post(f"{url}/gradio_api/upload", files={"files": ("a", b"a")}).status_code == 401
        with pytest.raises(ValueError, match=r"Incorrect|credentials|login"):
            Client(url, auth=("ada", "wrong"), verbose=False)
        assert Client(url, auth=("ada", "right"), verbose=False).predict(api_name="/gmm_draw")
        assert httpx.get(f"{url}/config", headers={"host": "evil.example"}).status_code == 421
    finally:
        studio.close(verbose=False)


def test_many_visitors_at_once_do_not_lock_up(browser_like, tmp_path):
    """More calls than the queue holds: each gets an answer or a refusal that says why."""
    one, answers = browser_like(), []

    def ask():
        answers.append(_ask(one, "fail", "x"))

    threads = [threading.Thread(target=ask) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 60
    assert all("x" in a or "Queue is full" in a for a in answers)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert (
        Client(str(one.base_url), verbose=False).predict(handle_file(tmp_path / "a.png"), api_name="/size") == "(4, 4)"
    )


def test_readable_is_put_around_every_handler_once():
    def fn():
        return 1

    assert readable(fn).is_readable
