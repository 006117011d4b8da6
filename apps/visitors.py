"""Who is who: which browser a page, an event and a file belong to, and whether anybody still listens to an answer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from mmkit.apps import limits
from mmkit.errors import InputError

MAX_VISITORS, MAX_OWNED = 2_000, 5_000


class NotYours(Exception):
    """A page, event or file of another visitor."""


class Left(InputError):
    """Nobody waits for the answer any more."""

    def __init__(self) -> None:
        super().__init__("Stopped: the page that asked was closed.")


@dataclass
class Visitor:
    """A browser or an API client, known by a cookie."""

    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    files: OrderedDict[str, None] = field(default_factory=OrderedDict)
    seen: float = 0.0


class Visitors:
    """The ledger of one studio. `files`: the folder of what visitors bring and get; `public`: files in it that everybody may read."""

    PATH = re.compile(rb'"path"\s*(?::|\]\s*,)\s*("(?:[^"\\]|\\.)*")')
    """A file's name in an object, or in what gradio sends when a handler yields again: `["replace", ["path"], "/the/new/one"]`."""

    def __init__(self, files: str, public: frozenset[str] = frozenset()):
        self.files = files
        self.public = public
        self._known: OrderedDict[str, Visitor] = OrderedDict()
        self._owners: OrderedDict[str, str] = OrderedDict()  # page or event -> token
        self._lock = threading.Lock()

    def find(self, token: str | None) -> Visitor | None:
        """The visitor with this cookie, unless it was not seen for too long."""
        with self._lock:
            now = time.monotonic()
            while self._known and now - next(iter(self._known.values())).seen > 2 * limits.KEEP_SECONDS:
                self._known.popitem(last=False)
            visitor = self._known.get(token or "")
            if visitor is not None:
                visitor.seen = now
                self._known.move_to_end(visitor.token)
            return visitor

    def new(self) -> Visitor:
        """A visitor who was not here before."""
        visitor = Visitor(seen=time.monotonic())
        with self._lock:
            self._known[visitor.token] = visitor
            while len(self._known) > MAX_VISITORS:
                self._known.popitem(last=False)
        return visitor

    def claim(self, name: str, visitor: Visitor) -> None:
        """`name`, a page or event, is the visitor's from its first use on. Raises `NotYours` when it is another's."""
        with self._lock:
            owner = self._owners.setdefault(name, visitor.token)
            if owner != visitor.token and owner in self._known:
                raise NotYours
            self._owners[name] = visitor.token
            self._owners.move_to_end(name)
            while len(self._owners) > 10 * MAX_VISITORS:
                self._owners.popitem(last=False)

    def knows(self, event: str) -> bool:
        """Whether an event of this name was started by anybody."""
        return event in self._owners

    def own(self, visitor: Visitor, text: bytes) -> None:
        """The files that JSON on its way to the visitor names are the visitor's."""
        for quoted in self.PATH.findall(text):
            self.own_file(visitor, json.loads(quoted))

    def own_file(self, visitor: Visitor, path: str) -> None:
        """This file is the visitor's."""
        if self.holds(path):
            visitor.files[os.path.abspath(path)] = None
            while len(visitor.files) > MAX_OWNED:
                visitor.files.popitem(last=False)

    def holds(self, path: str) -> bool:
        """Whether `path` lies in the folder of visitors' files."""
        return os.path.abspath(path).startswith(self.files + os.sep)

    def may_read(self, visitor: Visitor | None, path: str) -> bool:
        """Whether the visitor may read or use a file."""
        path = os.path.abspath(path)
        return path in self.public or (visitor is not None and path in visitor.files)


_open: dict[str, int] = {}
_until: OrderedDict[str, float] = OrderedDict()
_presence = threading.Lock()


def expect(page: str, seconds: float | None = None) -> None:
    """Somebody asked for something for `page` and has a moment to come and listen."""
    with _presence:
        _until[page] = time.monotonic() + (limits.LEAVE_SECONDS if seconds is None else seconds)
        _until.move_to_end(page)
        while len(_until) > 10 * MAX_VISITORS:
            _until.popitem(last=False)


@contextlib.contextmanager
def listening(page: str) -> Iterator[None]:
    """Somebody listens for the block."""
    with _presence:
        _open[page] = _open.get(page, 0) + 1
    try:
        yield
    finally:
        with _presence:
            _open[page] -= 1
            if not _open[page]:
                del _open[page]
        expect(page, 1.0)


def stop_if_left(page: str) -> None:
    """Raise `Left` when nobody listens to `page` any more. Pages that never asked through the server are left alone."""
    if page in _until and page not in _open and time.monotonic() > _until[page]:
        raise Left
