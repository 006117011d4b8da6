"""The gate in front of gradio: who may talk to the studio, about what, how much at a time, and whose files are whose.

Pure ASGI around the whole application. Requests are refused before gradio sees them; answers get their headers, and error texts
without markup, after it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import ipaddress
import json
import re
import traceback
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmkit.apps import limits
from mmkit.apps.sessions import require_space
from mmkit.apps.visitors import NotYours, Visitor, Visitors, expect, listening
from mmkit.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_JSON = 4_000_000
"""Bytes of a JSON request: settings and file names. Pictures come as uploads."""

UNEXPLAINED = (
    "The studio could not do this: a field has a value of a wrong kind, or something broke. Its terminal says more."
)

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "geolocation=(), payment=(), usb=()",
}
_POLICY = (  # gradio evaluates the scripts of its own events, and its 3D viewer runs wasm in a worker made of a blob
    "default-src 'self'; script-src 'self' 'unsafe-eval' blob: {scripts}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_FILE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"

HEALTH = "/healthz"
"""Answers as long as the server does, without a password or a cookie: for the supervisor of a container."""

_API = "/gradio_api/"
_STATIC = ("/assets/", "/static/", "/svelte/", "/theme.css", "/favicon.ico", "/gradio_api/theme.css")
_READ = re.compile(
    r"/(login|logout|config|robots\.txt|manifest\.json)/?|"
    r"/gradio_api/((info|openapi\.json|startup-events|app_id|user|login_check|queue/status|queue/data|upload_progress)/?"
    r"|heartbeat/[^/]+|file[=/].+|call/(v2/)?[^/]+/[^/]+|stream/.+|custom_component/.+)"
)
_WRITE = re.compile(
    r"/login/?|/gradio_api/((upload|queue/join|cancel|reset|component_server)/?|(run|api|call|call/v2)/[^/]+/?|stream/.+)"
)
_SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SCRIPT = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.S | re.I)


class Refused(Exception):
    """A request that is not let in: status and reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Guard:
    """ASGI middleware.

    Args:
        app: what stands behind the gate.
        visitors: the ledger of visitors.
        pages: paths of the pages, "/finetune" and so on.
        hosts: names under which the studio may be reached, besides the loopback ones.
        any_address: numeric addresses are fine as well: the studio listens on them, and nobody can rebind a number.
        max_upload: bytes of one upload request.
        head: HTML for every page, ahead of gradio's own, so that its scripts hear of events first.
        mcp: let MCP clients in.
    """

    def __init__(
        self,
        app: ASGIApp,
        visitors: Visitors,
        pages: Iterable[str],
        *,
        hosts: Iterable[str] = (),
        any_address: bool = False,
        max_upload: int = 64_000_000,
        head: str = "",
        mcp: bool = False,
    ):
        self.app = app
        self.visitors = visitors
        self.pages = {"/", *pages}
        self.hosts = {*LOOPBACK, *(h.lower() for h in hosts)}
        self.any_address = any_address
        self.max_upload = max_upload
        self.head = head.encode()
        self.mcp = mcp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        answer = _Answer(send, scope, self.visitors, self.head)
        incoming = _Incoming(receive)
        refused: Refused | None = None
        try:
            await self._handle(scope, incoming, answer)
        except Refused as error:
            refused = error
        except Exception:
            if answer.started:
                raise
            if answer.refused is None:
                traceback.print_exc()
                response = JSONResponse({"detail": UNEXPLAINED, "error": UNEXPLAINED}, 500)
                await response(scope, receive, answer.plainly)
        refused = refused or answer.refused
        if refused is not None and not answer.started:
            answer.refused = None
            await incoming.drain()
            response = JSONResponse({"detail": refused.reason, "error": refused.reason}, refused.status)
            await response(scope, receive, answer.plainly)

    async def _handle(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        self._check_sender(scope["method"], headers)
        if path.rstrip("/") == HEALTH and scope["method"] in ("GET", "HEAD"):
            return await JSONResponse({"status": "ok"}, headers={"Cache-Control": "no-store"})(
                scope, receive, answer.plainly
            )
        self._check_route(scope["method"], path)
        if path.startswith(_STATIC):
            return await self.app(scope, receive, answer.plainly)
        # What passes must be readable here: nothing but static files is compressed.
        scope["headers"] = [(k, v) for k, v in scope["headers"] if k != b"accept-encoding"]
        port = (scope.get("server") or ("", 0))[1]
        visitor = self.visitors.find(_cookie(headers, f"mmkit-visitor-{port}"))
        if path.startswith((_API + "file=", _API + "file/")):
            self._check_file(visitor, path[len(_API + "file=") :])
            return await self.app(scope, receive, answer.as_file)
        cookieless = visitor is None
        if visitor is None:
            visitor = self.visitors.new()
            answer.cookie = f"mmkit-visitor-{port}={visitor.token}; Path=/; HttpOnly; SameSite=Lax"
        answer.visitor = visitor
        page = self._page_of(scope, visitor, cookieless)
        if path.rstrip("/") == "/login":
            receive = _counted(receive, 10_000, answer)
        elif scope["method"] == "POST":
            receive, body = await self._body(headers, path, receive, answer)
            if body is not None:
                page = self._check_body(body, visitor) or page
                if path.startswith((_API + "queue/join", _API + "call/")) and page:
                    expect(page)
        answers = scope["method"] == "GET" and not path.startswith(_API + "heartbeat/")
        if page and (answers or path.startswith((_API + "run/", _API + "api/"))):
            with listening(page):
                return await self.app(scope, receive, answer.told)
        await self.app(scope, receive, answer.told)

    def _check_sender(self, method: str, headers: Headers) -> None:
        """The Host names this studio, and a browser's request comes from one of its own pages."""
        host = headers.get("host", "")
        name = _hostname(host)
        if not (name in self.hosts or (self.any_address and _is_address(name))):
            raise Refused(421, f"This studio does not answer to {host[:100]!r}. Start it with --allow-host NAME.")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        own = origin is None or _netloc(origin) == host.lower().removesuffix(":80").removesuffix(":443")
        navigation = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
        if not own or (site not in ("same-origin", "none") and not navigation) or method == "OPTIONS":
            raise Refused(403, "The studio answers its own pages only, not those of another site.")

    def _check_route(self, method: str, path: str) -> None:
        if self.mcp and path.startswith(_API + "mcp"):
            return
        reading = method in ("GET", "HEAD")
        known = (path.rstrip("/") or "/") in self.pages or path.startswith(_STATIC) or _READ.fullmatch(path)
        if not (known if reading else method == "POST" and _WRITE.fullmatch(path)):
            raise Refused(404, "There is nothing here.")

    def _check_file(self, visitor: Visitor | None, path: str) -> None:
        if not _is_url(path) and (not self.visitors.holds(path) or self.visitors.may_read(visitor, path)):
            return  # files elsewhere: gradio serves none but those of the program
        raise Refused(403, "This file belongs to another visitor, or was deleted.")

    def _page_of(self, scope: Scope, visitor: Visitor, cookieless: bool) -> str:
        """The page or event that a URL names, once it is known to be the visitor's."""
        path = scope["path"]
        if path.startswith(_API + "queue/data"):
            name = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        elif path.startswith((_API + "heartbeat/", _API + "stream/")):  # of a page, or of an event
            name = path.split("/")[3]
        elif scope["method"] == "GET" and path.startswith(_API + "call/"):
            name = path.rsplit("/", 1)[1]
            if not self.visitors.knows(f"event {name}"):
                raise Refused(404, "There is no such event.")
            if not cookieless:  # curl keeps no cookies, but nobody can guess the event's name
                self._claim(name, visitor, "event ")
            return name
        else:
            return ""
        return self._claim(name, visitor)

    def _claim(self, name: Any, visitor: Visitor, kind: str = "") -> str:
        if not isinstance(name, str) or not _SESSION.fullmatch(name):
            raise Refused(400, "session_hash must be 1 to 64 letters and digits.")
        try:
            self.visitors.claim(kind + name, visitor)
        except NotYours:
            raise Refused(403, "This session belongs to another visitor.") from None
        return name

    async def _body(
        self, headers: Headers, path: str, receive: Receive, answer: _Answer
    ) -> tuple[Receive, dict[str, Any] | None]:
        """Uploads are counted as they come; JSON is read, and handed on when it is sound."""
        multipart = headers.get("content-type", "").startswith("multipart/form-data")
        limit = self.max_upload + 100_000 if multipart else MAX_JSON
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise Refused(413, f"This is more than {limits.of_bytes(limit)}, which is all the studio takes at once.")
        if multipart:
            try:
                require_space(int(length) if length.isdigit() else self.max_upload)
            except InputError as error:
                raise Refused(507, str(error)) from None
            return _counted(receive, limit, answer), None
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "The request was cut off.")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > MAX_JSON:
                raise Refused(413, f"A request of settings may have {limits.of_bytes(MAX_JSON)}; upload files first.")
            if not message.get("more_body"):
                break
        raw = b"".join(parts)
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            raise Refused(400, "The request is not JSON.") from None
        if not isinstance(body, dict):
            raise Refused(400, "The request must be a JSON object.")
        return _replayed(raw, receive), body

    def _check_body(self, body: dict[str, Any], visitor: Visitor) -> str:
        """Files named in a request are the visitor's own uploads and results, never addresses or paths of the server."""
        for item in _dicts(body):
            path, url = item.get("path"), item.get("url")
            path = path if isinstance(path, str) else ""
            looks_like_file = (
                "meta" in item or "orig_name" in item or (path != "" and (_is_url(path) or path[0] in "/\\~."))
            )
            if looks_like_file and not (path and self.visitors.may_read(visitor, path)):
                raise Refused(
                    403, "A file in this request is not an upload or a result of this session (or was deleted)."
                )
            if isinstance(url, str) and url.lower().startswith("data:"):
                raise Refused(403, "Upload the file instead of sending it inside the request.")
        if self.visitors.knows(f"event {body.get('event_id')}"):
            self._claim(body["event_id"], visitor, "event ")
        return self._claim(body["session_hash"], visitor) if body.get("session_hash") is not None else ""


class _Incoming:
    """What a client sends. A refusal comes after the rest of it: closing earlier would reset the connection, and hide the reason."""

    MOST = 256_000_000

    def __init__(self, receive: Receive):
        self._receive = receive
        self._ended = False

    async def __call__(self) -> Message:
        message = await self._receive()
        self._ended = message["type"] != "http.request" or not message.get("more_body")
        return message

    async def drain(self) -> None:
        count = 0
        while not self._ended and count < self.MOST:
            count += len((await self()).get("body", b""))


class _Answer:
    """The way back: headers for all, the visitor's new files noted, error texts without markup."""

    def __init__(self, send: Send, scope: Scope, visitors: Visitors, head: bytes):
        self._send = send
        self._scope = scope
        self._visitors = visitors
        self.visitor: Visitor | None = None
        self.cookie = ""
        self.started = False
        self.refused: Refused | None = None  # while the app was reading: what it makes of that is not sent
        self._added = head
        self._head: Message | None = None
        self._parts: list[bytes] = []

    async def plainly(self, message: Message) -> None:
        """Headers only."""
        if self.refused is not None:
            return
        if message["type"] == "http.response.start":
            self._finish_head(message, _POLICY.format(scripts=""))
            self.started = True
        await self._send(message)

    async def as_file(self, message: Message) -> None:
        """A visitor's file: shown or saved, never run, and not kept by the browser."""
        if message["type"] == "http.response.start":
            self._finish_head(message, _FILE_POLICY)["Cache-Control"] = "no-store"
            self.started = True
        await self._send(message)

    async def told(self, message: Message) -> None:
        """Pages, JSON and event streams are looked through."""
        if self.refused is not None:
            return None
        if message["type"] == "http.response.start":
            kind = Headers(raw=message["headers"]).get("content-type", "")
            if kind.startswith(("text/html", "application/json")) and self._scope["method"] != "HEAD":
                self._head = message
                return
            return await self.plainly(message)
        if message["type"] != "http.response.body":
            return await self._send(message)
        body = message.get("body", b"")
        if self._head is None:  # a stream: gradio sends whole events
            return await self._send({**message, "body": self._tell(body)})
        self._parts.append(body)
        if not message.get("more_body"):
            await self._send_whole(b"".join(self._parts))

    async def _send_whole(self, body: bytes) -> None:
        assert self._head is not None
        if Headers(raw=self._head["headers"])["content-type"].startswith("text/html"):
            body = body.replace(b"<head>", b"<head>" + self._added, 1)
            digests = (base64.b64encode(hashlib.sha256(s).digest()).decode() for s in _SCRIPT.findall(body))
            scripts = " ".join(f"'sha256-{d}'" for d in digests)
        else:
            body, scripts = self._tell(body), ""
        headers = self._finish_head(self._head, _POLICY.format(scripts=scripts))
        headers["Content-Length"] = str(len(body))
        headers["Cache-Control"] = "no-store"
        self.started = True
        await self._send(self._head)
        await self._send({"type": "http.response.body", "body": body})

    def _finish_head(self, head: Message, policy: str) -> MutableHeaders:
        headers = MutableHeaders(scope=head)
        for name in [n for n in headers if n.startswith("access-control-")]:
            del headers[name]
        for name, value in HEADERS.items():
            headers[name] = value
        headers["Content-Security-Policy"] = policy
        if self.cookie:
            headers.append("Set-Cookie", self.cookie)
        return headers

    def _tell(self, body: bytes) -> bytes:
        """Note whose the files in an answer are, and make its error texts safe."""
        if self.visitor is None:
            return body
        self._visitors.own(self.visitor, body)
        path = self._scope["path"]
        if path.startswith(_API + "upload") and body.startswith(b"["):
            for name in json.loads(body):
                self._visitors.own_file(self.visitor, name)
        elif path.startswith((_API + "queue/join", _API + "call/")) and body.startswith(b'{"event_id"'):
            event = json.loads(body).get("event_id")
            if isinstance(event, str):
                self._visitors.claim(f"event {event}", self.visitor)
                expect(event)
        if self._head is None or self._head["status"] >= 400:
            return b"\n\n".join(_explained(part) for part in body.split(b"\n\n"))
        return body


def _explained(event: bytes) -> bytes:
    """One event or JSON answer, its error and log texts without markup, and never an error without a text."""
    lead, brace, rest = event.partition(b"{")
    try:
        content = json.loads(brace + rest)
    except ValueError:
        return event
    failed = content.get("success") is False or b"event: error" in lead
    for part in [content, content["output"]] if isinstance(content.get("output"), dict) else [content]:
        if "error" in part and part["error"] is None:
            part["error"], part["visible"] = UNEXPLAINED, True
        elif part is not content and failed and "error" not in part:
            part["error"] = UNEXPLAINED
        for key in ("error", "log", "title", "message"):
            if isinstance(part.get(key), str):
                part[key] = without_markup(part[key])
    return lead + json.dumps(content).encode()


def without_markup(text: str) -> str:
    """Text that a page shows as it is where it expects HTML. What is escaped already stays."""
    return html.escape(html.unescape(text))


def _counted(receive: Receive, limit: int, answer: _Answer) -> Receive:
    count = 0

    async def counted() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > limit:
            answer.refused = Refused(
                413, f"This is more than {limits.of_bytes(limit)}, which is all the studio takes at once."
            )
            raise answer.refused
        return message

    return counted


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _dicts(value: Any) -> Iterable[dict[str, Any]]:
    """Every object in a JSON value."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


def _is_url(text: str) -> bool:
    return re.match(r"\s*[a-z][a-z0-9+.-]*:", text, re.I) is not None or text.strip().startswith(("//", "\\\\"))


def _cookie(headers: Headers, name: str) -> str | None:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return None
    return found.value if found else None


def _hostname(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    return origin.lower().partition("://")[2].removesuffix(":80").removesuffix(":443")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
