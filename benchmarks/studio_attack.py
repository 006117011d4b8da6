"""A hostile visitor at the studio's door: each try must be refused in words, or survived without harm. Loopback only.

python benchmarks/studio_attack.py            # writes results/studio_attack.{json,md} after every group; goes on where it stopped
python benchmarks/studio_attack.py --restart  # all groups again

A studio is started in a process of its own. A listener of this script stands for every foreign host: a connection to it counts as
harm. After every group an honest visitor asks for an answer; not getting one counts as harm, too.
"""

from __future__ import annotations

import argparse
import http.server
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from mmkit.storage import write_json

RESULTS = Path(__file__).parent / "results"
SERVER = """
import sys
from mmkit.apps import launch_studio
studio, url = launch_studio(["finetune", "gmm", "medical", "segment", "video"], block=False, quota="60mb", max_file_size="8mb")
print("URL", url, flush=True)
studio.block_thread()
"""
SECRET = "nobody may read this"
MARKUP = '<img src="{0}/a.png">![b]({0}/b.png)[c]({0}/c)<script>d</script>'


class Listener:
    """Stands for every foreign host; `calls` are the requests it got."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        calls = self.calls

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                calls.append(self.path)
                self.send_error(404)

            do_POST = do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Studio:
    """The studio under attack, in a process of its own."""

    def __init__(self, folder: Path, server: str = SERVER):
        environment = {**os.environ, "TMPDIR": str(folder)}
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", server], env=environment, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        assert self.process.stdout is not None
        lines = iter(self.process.stdout.readline, "")
        self.url = next(line.split()[-1] for line in lines if line.startswith(("URL", "mmkit studio:"))).rstrip("/")
        self.loaded = threading.Event()
        threading.Thread(target=self._listen, args=(lines,), daemon=True).start()

    def _listen(self, lines: Iterator[str]) -> None:
        for line in lines:
            if "all models are loaded" in line:
                self.loaded.set()

    def visitor(self, **headers: str) -> httpx.Client:
        # No idle connections: the server closes them after five seconds, which would look like a failure.
        limits = httpx.Limits(max_keepalive_connections=0)
        client = httpx.Client(base_url=self.url, timeout=120, headers=headers, limits=limits)
        client.get("/config")
        return client

    def memory(self) -> float:
        """Resident MB of the studio and the processes it started."""
        studio = psutil.Process(self.process.pid)
        return sum(one.memory_info().rss for one in (studio, *studio.children(recursive=True))) / 1e6


def file_data(path: Any, name: str | None = None) -> dict[str, Any]:
    return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def upload(visitor: httpx.Client, name: str, content: bytes) -> dict[str, Any]:
    answer = visitor.post("/gradio_api/upload", files={"files": (name, content)})
    answer.raise_for_status()
    return file_data(answer.json()[0], name)


def ask(visitor: httpx.Client, endpoint: str, *data: Any, seconds: float = 120) -> tuple[bool, str]:
    """Whether an endpoint answered, and the end of what it said."""
    asked = visitor.post(f"/gradio_api/call/{endpoint}", json={"data": list(data)})
    if asked.status_code != 200:
        return False, f"{asked.status_code} {asked.text}"
    with visitor.stream("GET", f"/gradio_api/call/{endpoint}/{asked.json()['event_id']}", timeout=seconds) as stream:
        text = stream.read().decode()
    return "event: complete" in text, text.strip().rsplit("data: ", 1)[-1]


Row = tuple[str, bool, str]
"""What was tried, whether it was refused or survived without harm, and what came back."""


def refused(name: str, answer: httpx.Response, *statuses: int) -> Row:
    told = f"{answer.status_code} {answer.text[:90]}"
    return (
        name,
        answer.status_code in (statuses or (400, 401, 403, 404, 405, 413, 421, 422)) and SECRET not in answer.text,
        told,
    )


def denied(name: str, answer: tuple[bool, str]) -> Row:
    """An endpoint that must not do it, and must say why."""
    done, text = answer
    told = '"error": null' not in text and len(text) > 12
    return name, not done and told and "Traceback" not in text, text[:120]


def traversal(studio: Studio, listener: Listener, folder: Path) -> Iterator[Row]:
    for path in (
        "/etc/passwd", "//etc/passwd", "../../../../etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd",
        str(folder / "secret.txt"), f"{folder}/./secret.txt", "pyproject.toml", ".git/config", "/proc/self/environ",
    ):  # fmt: skip
        for prefix in ("gradio_api/file=", "gradio_api/file/", "static/", "assets/"):
            yield refused(f"{prefix}{path}", httpx.get(f"{studio.url}/{prefix}{path}"))
    for name in ("../../evil.png", "/etc/evil.png", "..\\evil.png", "a/../../b.png", "\x00.png", "x" * 5000):
        answer = studio.visitor().post("/gradio_api/upload", files={"files": (name, b"x")})
        inside = answer.status_code != 200 or answer.json()[0].startswith(str(folder.resolve()))
        yield f"upload named {name[:20]!r}", inside and answer.status_code < 500, str(answer.status_code)
    yield "no file outside the studio's folder", not list(folder.parent.glob("evil*")), ""


def foreign_files(studio: Studio, listener: Listener, folder: Path) -> Iterator[Row]:
    one, other = studio.visitor(), studio.visitor()
    theirs = upload(one, "private.png", picture(8))
    yield refused("another's upload, by its address", other.get(f"/gradio_api/file={theirs['path']}"))
    for endpoint, rest in (
        ("segment", (None, None)),
        ("segment_medical", (None, None)),
        ("finetune_train", ("tiny_vit", "ssf", 1, 0)),
    ):
        yield denied(f"another's upload as input of {endpoint}", ask(other, endpoint, theirs, *rest))
        for path in (str(folder / "secret.txt"), "/etc/passwd", "pyproject.toml", None, "", 5, ["/etc/passwd"]):
            yield denied(f"{path} as input of {endpoint}", ask(other, endpoint, file_data(path), *rest))
    body = {"data": [], "fn_index": 0, "session_hash": "somebody"}
    one.post("/gradio_api/queue/join", json=body)
    yield refused("joining another's session", other.post("/gradio_api/queue/join", json=body))
    yield refused("reading another's answers", other.get("/gradio_api/queue/data?session_hash=somebody"))
    cancel = {"session_hash": "somebody", "fn_index": 0, "event_id": "x"}
    yield refused("cancelling another's work", other.post("/gradio_api/cancel", json=cancel))


def addresses(studio: Studio, listener: Listener, folder: Path) -> Iterator[Row]:
    one, port = studio.visitor(), listener.url.rsplit(":", 1)[1]
    shapes = [
        f"{listener.url}/x.png", f"http://localhost:{port}/x", f"http://[::1]:{port}/x", f"http://2130706433:{port}/x",
        f"http://127.1:{port}/x", f"http://a@127.0.0.1:{port}/x", f"HTTP://127.0.0.1:{port}/x", f"//127.0.0.1:{port}/x",
        "http://169.254.169.254/latest", f"ftp://127.0.0.1:{port}/x", "file:///etc/passwd", f" {listener.url}/x",
        "data:image/png;base64,AA==",
    ]  # fmt: skip
    for shape in shapes:
        for kind, endpoint, rest in (
            ("picture", "segment", (None, None)), ("file", "segment_medical", (None, None)),
            ("zip", "finetune_train", ("tiny_vit", "ssf", 1, 0)),
        ):  # fmt: skip
            yield denied(f"{shape} as {kind}", ask(one, endpoint, file_data(shape), *rest))
            sent = {"path": "x", "url": shape, "meta": {"_type": "gradio.FileData"}}
            yield denied(f"{shape} as address of a {kind}", ask(one, endpoint, sent, *rest))
        yield denied(
            f"{shape} as video",
            ask(one, "video_classify", {"video": file_data(shape)}, 2, "Forwards", "Adapters separate"),
        )
        yield refused(f"file={shape}", one.get(f"/gradio_api/file={shape}"))
        yield refused(f"proxy={shape}", one.get(f"/gradio_api/proxy={shape}"))


def senders(studio: Studio, listener: Listener, folder: Path) -> Iterator[Row]:
    routes: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", "/config", {}), ("GET", "/", {}), ("POST", "/gradio_api/upload", {"files": {"files": ("x", b"x")}}),
        ("POST", "/gradio_api/queue/join", {"json": {"data": [], "fn_index": 0, "session_hash": "a"}}),
        ("POST", "/gradio_api/call/gmm_draw", {"json": {"data": []}}),
        ("POST", "/gradio_api/run/predict", {"json": {"data": [], "fn_index": 0}}),
        ("POST", "/gradio_api/cancel", {"json": {"session_hash": "a", "fn_index": 0, "event_id": "b"}}),
        ("POST", "/gradio_api/component_server", {"json": {"data": [], "component_id": 1, "session_hash": "a", "fn_name": "ls"}}),
        ("OPTIONS", "/config", {}),
    ]  # fmt: skip
    for headers in (
        {"host": "evil.example"}, {"host": "127.0.0.1.evil.example"}, {"host": "evil.example:7860"}, {"origin": "http://localhost:9999"},
        {"origin": "http://127.0.0.1:1"}, {"origin": "https://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    ):  # fmt: skip
        for method, path, options in routes:
            answer = httpx.request(method, studio.url + path, headers=headers, **options)
            name, fine, told = refused(f"{method} {path} with {headers}", answer, 403, 421)
            shared = [h for h in answer.headers if h.startswith("access-control")]
            yield name, fine and not shared, told


def names(studio: Studio, listener: Listener, folder: Path) -> Iterator[Row]:
    markup = MARKUP.format(listener.url)
    one = studio.visitor()
    members = {f"{markup.replace('/', '|')}{c}/{i}.png": picture(24, c * 200) for c in (0, 1) for i in range(6)}
    done, text = ask(
        one, "finetune_train", upload(one, f"{markup}.zip", zipped(members)), "tiny_vit", "linear_probe", 1, 0
    )
    yield "classes named in markup", done or ("<" not in text and '"error": "' in text), text[:80]
    done, text = ask(
        one, "finetune_train", upload(one, "a.zip", zipped({f"{markup}/a.txt": b"x"})), "tiny_vit", "ssf", 1, 0
    )
    yield "members named in markup", not done and "<" not in text, text[:120]
    for endpoint, data in (
        ("segment_medical", (upload(one, f"{markup}.nii", b"no volume"), markup, None)), ("finetune_plan", (markup, markup)),
        ("segment", (upload(one, "a.png", picture(8)), None, markup)), ("video_draw", (markup,)),
        ("gmm_explore", (upload(one, "a.png", picture(8)), 1, 1, 1, 1, 1, 1, markup)),
    ):  # fmt: skip
        done, text = ask(one, endpoint, *data)
        yield f"markup in the fields of {endpoint}", not done and "<" not in text and '"error": "' in text, text[:120]


def bombs(studio: Studio, listener: Listener, folder: Path) -> Iterator[Row]:
    one = studio.visitor()
    zeros = zipped({f"a/{i}.png": bytes(60_000_000) for i in range(8)})
    train = ("tiny_vit", "ssf", 1, 0)
    yield denied("480 MB in a zip of half a MB", ask(one, "finetune_train", upload(one, "a.zip", zeros), *train))
    yield denied(
        "a zip of 30,000 members",
        ask(one, "finetune_train", upload(one, "b.zip", zipped({f"a/{i}": b"" for i in range(30_000)})), *train),
    )
    yield denied(
        "a zip that leaves its folder",
        ask(one, "finetune_train", upload(one, "c.zip", zipped({"../../x/1.png": picture(8)})), *train),
    )
    for width, height in ((60_000, 60_000), (1, 5_000_000), (9_000, 9_000)):
        yield denied(
            f"a picture of {width} x {height}",
            ask(one, "segment", upload(one, "a.png", flat_png(width, height)), None, None),
        )
    yield denied(
        "8000 x 8000 on the medical page",
        ask(one, "segment_medical", upload(one, "a.png", flat_png(8_000, 8_000)), None, None),
    )
    lying = flat_png(30_000, 30_000)[:60]
    yield denied("a PNG that is only a header", ask(one, "segment", upload(one, "a.png", lying), None, None))
    yield denied(
        "a volume that claims 32767 voxels a side",
        ask(one, "segment_medical", upload(one, "a.nii", volume_header()), None, None),
    )
    clip = {"video": upload(one, "a.mp4", bytes(100_000))}
    yield denied("100 kB of nothing as a video", ask(one, "video_classify", clip, 2, "Forwards", "Adapters separate"))
    long = {"video": upload(one, "a.mp4", long_video(folder))}
    yield denied(
        "a video of 20 minutes in a few kB", ask(one, "video_classify", long, 2, "Forwards", "Adapters separate")
    )


def bodies(studio: Studio, listener: Listener, folder: Path) -> Iterator[Row]:
    one = studio.visitor()
    for path in ("queue/join", "call/gmm_draw", "run/predict", "cancel", "component_server", "reset"):
        for content in (
            b"",
            b"{",
            b"[]",
            b"null",
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"data":' * 5_000,
            b'{"data": ["' + b"x" * 5_000_000 + b'"]}',
        ):
            answer = one.post(f"/gradio_api/{path}", content=content, headers={"content-type": "application/json"})
            yield refused(f"{path} with {content[:12]!r} ({len(content)} bytes)", answer)
    for body in (
        {"data": [], "fn_index": 10**9},
        {"data": [], "fn_index": -1},
        {"data": [], "fn_index": "x"},
        {"data": {}, "fn_index": 0},
    ):
        for session in ("s1", "../x", "", "y" * 500, 5, None):
            answer = one.post("/gradio_api/queue/join", json={**body, "session_hash": session})
            yield (
                f"queue/join with {body} {str(session)[:8]!r}",
                answer.status_code != 200 and len(answer.text) > 2,
                f"{answer.status_code}",
            )
    for kind in (
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=b",
        "text/plain",
        "",
    ):
        answer = one.post("/gradio_api/upload", content=b"--b\r\nx" + b"0" * 100, headers={"content-type": kind})
        yield (
            f"upload of kind {kind!r}",
            answer.status_code < 600 and "Traceback" not in answer.text,
            f"{answer.status_code}",
        )
    for data in ([], [1] * 50, [None] * 5, [float("1e308")] * 5, [{"a": 1}] * 5, ["<b>"] * 5, [[[]]] * 5):
        for endpoint in ("finetune_train", "gmm_explore", "segment", "segment_medical", "video_classify"):
            done, text = ask(one, endpoint, *data)
            yield (
                f"{endpoint} with {str(data)[:24]}",
                done or ('"error": null' not in text and len(text) > 12),
                text[:80],
            )
    for field, value in (
        ("epochs", 1e30),
        ("epochs", -1),
        ("epochs", None),
        ("seed", -3),
        ("seed", 1e30),
        ("seed", 0.5),
    ):
        values = {"epochs": 1, "seed": 0, field: value}
        name, fine, told = denied(
            f"{field} = {value}", ask(one, "finetune_train", None, "tiny_vit", "ssf", *values.values())
        )
        yield name, fine and field in told.lower(), told


def crowd(studio: Studio, listener: Listener, folder: Path) -> Iterator[Row]:
    one, answers = studio.visitor(), []
    threads = [threading.Thread(target=lambda: answers.append(ask(one, "gmm_draw"))) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    served = sum(done for done, _ in answers)
    full = sum("Queue is full" in text for _, text in answers)
    yield (
        "60 calls at once: each answered, or told that the queue is full",
        served + full == 60,
        f"{served} answered, {full} told",
    )
    for _ in range(30):  # started, and never looked at
        one.post("/gradio_api/call/finetune_train", json={"data": [None, "tiny_vit", "ssf", 50, 0]})
    start = time.monotonic()
    yield "30 trainings nobody looks at", *ask(studio.visitor(), "gmm_draw", seconds=60)
    done, text = ask(studio.visitor(), "finetune_train", None, "tiny_vit", "linear_probe", 1, 0, seconds=300)
    yield "a training after them", done, f"{time.monotonic() - start:.0f} s; {text[:60]}"


def quotas(studio: Studio, listener: Listener, folder: Path) -> Iterator[Row]:
    one, answers = studio.visitor(), []
    yield refused(
        "a file above the limit", one.post("/gradio_api/upload", files={"files": ("x", bytes(9_000_000))}), 413
    )
    many = [("files", (f"{i}", bytes([i]) * 1_000_000)) for i in range(12)]
    yield refused("many files above it together", one.post("/gradio_api/upload", files=many), 413)
    for i in range(12):
        answers.append(one.post("/gradio_api/upload", files={"files": (f"{i}.bin", os.urandom(7_000_000))}))
    last = answers[-1]
    used = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    yield (
        "the disk quota of 60 MB",
        last.status_code == 507 and "storage is full" in last.text and used < 70e6,
        f"{used / 1e6:.0f} MB; {last.text[:90]}",
    )


GROUPS: dict[str, Callable[[Studio, Listener, Path], Iterator[Row]]] = {
    "paths that leave the folder": traversal, "files of others": foreign_files, "addresses to fetch": addresses,
    "foreign Host and Origin": senders, "names in markup": names, "bombs": bombs, "malformed requests": bodies, "a crowd": crowd,
    "quotas": quotas,
}  # fmt: skip


def picture(side: int, level: int = 90) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(level).integers(0, 40, (side, side, 3)) + level
    Image.fromarray(noise.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def flat_png(width: int, height: int) -> bytes:
    """A whole PNG of one color, a thousand times smaller than its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze, parts, rows = zlib.compressobj(1), [], bytes(width + 1) * min(height, 64)
    for first in range(0, height, 64):
        parts.append(squeeze.compress(rows[: (width + 1) * min(64, height - first)]))
        if sum(map(len, parts)) > 6_000_000:
            break
    body = b"".join([*parts, squeeze.flush()])
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def volume_header() -> bytes:
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_shape((32767, 32767, 32767))
    header["magic"], header["vox_offset"] = b"n+1", 352
    return header.binaryblock + bytes(100_000)


def long_video(folder: Path) -> bytes:
    from mmkit.video import write_video

    path = write_video(folder / "long.mp4", np.zeros((120, 32, 32, 3), np.uint8), fps=0.1)
    return path.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restart", action="store_true", help="all groups again")
    args = parser.parse_args()
    file = RESULTS / "studio_attack.json"
    table: dict[str, dict[str, Any]] = {}
    if file.is_file() and not args.restart:
        table = json.loads(file.read_text())["groups"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "secret.txt").write_text(SECRET)
        listener, studio = Listener(), Studio(folder)
        try:
            for group, tries in GROUPS.items():
                if group in table:
                    continue
                before = studio.memory()
                rows = list(tries(studio, listener, folder))
                harm = [f"{tried} -> {told}" for tried, fine, told in rows if not fine]
                table[group] = {
                    "tries": len(rows),
                    "refused or survived": len(rows) - len(harm),
                    "harm": harm,
                    "next visitor served": ask(studio.visitor(), "gmm_draw")[0] and studio.process.poll() is None,
                    "requests to other hosts": len(listener.calls),
                    "memory grown (MB)": round(studio.memory() - before),
                }
                print(group, json.dumps(table[group]), flush=True)
                write_json(file, {"groups": table})
                file.with_suffix(".md").write_text(markdown(table), encoding="utf-8")
        finally:
            studio.process.terminate()
            studio.process.wait(20)


def markdown(table: dict[str, dict[str, Any]]) -> str:
    columns = ["tries", "refused or survived", "next visitor served", "requests to other hosts", "memory grown (MB)"]
    lines = [f"| attack | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for group, row in table.items():
        cells = [
            {True: "yes", False: "no", None: "-"}.get(row.get(c), row.get(c))
            if c == "next visitor served"
            else row.get(c, "-")
            for c in columns
        ]
        lines.append(f"| {group} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n\nWritten by `python benchmarks/studio_attack.py`.\n"


if __name__ == "__main__":
    main()
