"""What the server keeps for its visitors: what they have open in memory, and the files they brought or got.

All files lie in one private folder of this process, the workspace. A thread removes what is too old, whether or not anybody
comes by; the folder goes with the process, and a killed process's folder goes when the next one starts.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from gradio.context import LocalContext

from mmkit.apps import limits
from mmkit.errors import InputError
from mmkit.memory import return_freed_memory
from mmkit.storage.lock import try_lock

Kept = TypeVar("Kept")


def visitor() -> str:
    """The open page (browser tab or API client) whose event is being handled; "" outside of one."""
    request = LocalContext.request.get(None)
    return str(getattr(request, "session_hash", None) or "")


@dataclass
class _Entry(Generic[Kept]):
    value: Kept
    owner: str
    size: int
    used: float


class Sessions(Generic[Kept]):
    """What the visitors have open: one thing for every open page and `Sessions`, at most `limit` in all.

    A new thing takes the place of the page's old one, whose key is void from then on: an event that was on its way with it gets a
    message instead of an answer about another picture. A page keeps only the key.
    """

    _all: ClassVar[weakref.WeakSet[Sessions[Any]]] = weakref.WeakSet()

    def __init__(self, limit: int = 24, on_drop: Callable[[Kept], None] | None = None):
        self.limit = limit
        self.on_drop = on_drop
        self._open: OrderedDict[str, _Entry[Kept]] = OrderedDict()
        self._lock = threading.RLock()
        Sessions._all.add(self)

    def add(self, value: Kept, key: str | None = None) -> str:
        """Keep `value` for the visitor; returns its key, which cannot be guessed unless given.

        Raises `InputError` when all pictures and results in memory together would pass the quota.
        """
        owner, size = visitor(), size_of(value)
        self.forget(owner)
        used = sum(one.bytes() for one in Sessions._all)
        if used + size > limits.MEMORY_QUOTA:
            raise InputError(
                f"The studio is full: its visitors have {limits.of_bytes(used)} open and this needs {limits.of_bytes(size)} more, of "
                f"{limits.of_bytes(limits.MEMORY_QUOTA)} in all. Try a smaller one, or try again later."
            )
        key = key or secrets.token_hex(16)
        with self._lock:
            self._open[key] = _Entry(value, owner, size, time.monotonic())
            while len(self._open) > self.limit:
                self._drop(next(iter(self._open)))
        return key

    def get(self, key: str | None) -> Kept:
        """The value of `key`. Raises `InputError` when there is none (any more)."""
        with self._lock:
            if key is None or key not in self._open:
                raise InputError("Load a picture first." if not key else "This picture was put away; load it again.")
            self._open[key].used = time.monotonic()
            self._open.move_to_end(key)
            return self._open[key].value

    def find(self, key: str | None) -> Kept | None:
        """The value of `key`, or None."""
        with self._lock:
            return self.get(key) if key in self._open else None

    def forget(self, owner: str | None = None) -> None:
        """Drop what a page (default: the one whose event is handled) has open."""
        owner = visitor() if owner is None else owner
        with self._lock:
            for key in [k for k, entry in self._open.items() if owner and entry.owner == owner]:
                self._drop(key)

    def drop(self, key: str) -> None:
        """Drop what `key` stands for, if there is anything."""
        with self._lock:
            if key in self._open:
                self._drop(key)

    def expire(self, older_than: float) -> None:
        """Drop what was not used for `older_than` seconds."""
        with self._lock:
            for key in [k for k, e in self._open.items() if time.monotonic() - e.used >= older_than]:
                self._drop(key)

    def bytes(self) -> int:
        """Size of what is kept."""
        with self._lock:
            return sum(entry.size for entry in self._open.values())

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, key: str) -> bool:
        return key in self._open

    def _drop(self, key: str) -> None:
        entry = self._open.pop(key)
        if self.on_drop is not None:
            self.on_drop(entry.value)


def size_of(value: Any, depth: int = 4) -> int:
    """Bytes of the pictures, arrays and tensors that `value` holds; models are shared and do not count."""
    if hasattr(value, "parameters") or isinstance(value, type) or depth < 0:
        return 0
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    if hasattr(value, "getbands"):
        return value.width * value.height * len(value.getbands())
    if isinstance(value, dict):
        return sum(size_of(v, depth - 1) for v in value.values())
    if isinstance(value, (list, tuple, set)):
        return sum(size_of(v, depth - 1) for v in value)
    return sum(size_of(v, depth - 1) for v in vars(value).values()) if hasattr(value, "__dict__") else 0


class Workspace:
    """A private folder, locked as long as the process lives.

    Args:
        root: holds the folders of all studios of this user; those whose process is gone are removed.
    """

    def __init__(self, root: Path):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid") and root.stat().st_uid != os.getuid():
            raise InputError(f"{root} belongs to another user. Set TMPDIR to a folder of your own.")
        root.chmod(0o700)
        self.folder = Path(tempfile.mkdtemp(prefix=".", dir=root)).resolve()  # hidden until it is locked
        self._lock = (self.folder / "lock").open("w")
        try_lock(self._lock.fileno())
        self._process = os.getpid()
        for other in root.iterdir():
            if not other.name.startswith(".") and not _alive(other):
                shutil.rmtree(other, ignore_errors=True)
        for other in root.glob(".*"):  # of a process that died before its folder was locked
            if other != self.folder and time.time() - other.stat().st_mtime > limits.SWEEP_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
        self.folder = self.folder.rename(root / self.folder.name.lstrip("."))
        self.files = self.folder / "files"
        self.files.mkdir()

    def used(self) -> int:
        """Bytes of all files."""
        total = 0
        for folder, _, names in os.walk(self.files):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(folder, name)).st_size
        return total

    def sweep(self, older_than: float) -> None:
        """Remove files and result folders that were not touched for `older_than` seconds, and folders left empty."""
        before = time.time() - older_than
        for path in list(self.files.iterdir()) if self.files.is_dir() else ():
            with contextlib.suppress(OSError):
                if path.name.startswith(RESULTS):  # kept or removed as a whole; its date says when it was used
                    if path.stat().st_mtime <= before:
                        shutil.rmtree(path, ignore_errors=True)
                elif path.is_dir():
                    for file in path.rglob("*"):
                        if not file.is_dir() and file.lstat().st_mtime <= before:
                            file.unlink()
                    if path.stat().st_mtime <= before:
                        path.rmdir()  # when it is empty
                elif path.lstat().st_mtime <= before:
                    path.unlink()

    def close(self) -> None:
        """Remove the folder (not from a forked child)."""
        if os.getpid() == self._process:
            self._lock.close()
            shutil.rmtree(self.folder, ignore_errors=True)


RESULTS = "results-"


def _alive(folder: Path) -> bool:
    try:
        with (folder / "lock").open("r+") as lock:
            return not try_lock(lock.fileno())
    except OSError:  # no lock: nobody's
        return False


_workspaces: dict[Path, Workspace] = {}
_making = threading.Lock()


def workspace() -> Workspace:
    """This process's folder, made and swept from its first use."""
    root = Path(tempfile.gettempdir()) / f"mmkit-studio-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    with _making:
        if root not in _workspaces:
            _workspaces[root] = made = Workspace(root)
            atexit.register(made.close)
            if len(_workspaces) == 1:
                threading.Thread(target=_sweep_forever, name="mmkit-sweeper", daemon=True).start()
        return _workspaces[root]


def sweep(older_than: float | None = None) -> None:
    """One round of the sweeper: what is too old, or will be before its next round, is removed from disk and memory."""
    age = max(limits.KEEP_SECONDS - limits.SWEEP_SECONDS, 0) if older_than is None else older_than
    for one in list(_workspaces.values()):
        one.sweep(age)
    for kept in list(Sessions._all):
        kept.expire(age)
    return_freed_memory()


def _sweep_forever() -> None:
    while True:
        time.sleep(limits.SWEEP_SECONDS)
        with contextlib.suppress(Exception):  # one bad folder must not end the promise for the others
            sweep()


def output_folder() -> Path:
    """A fresh folder under a random name for files handed to the browser. Raises `InputError` when the disk quota is used up."""
    place = workspace()
    require_space(0)
    return Path(tempfile.mkdtemp(prefix=RESULTS, dir=place.files))


def require_space(count: int) -> None:
    """Raise `InputError` when `count` more bytes would pass the disk quota."""
    used, quota = workspace().used(), limits.in_bytes(limits.DISK_QUOTA)
    if used + count > quota:
        raise InputError(
            f"The studio's storage is full: {limits.of_bytes(used)} of {limits.of_bytes(quota)} are used"
            + (f" and this needs {limits.of_bytes(count)}" if count else "")
            + f". Older files are deleted after {limits.KEEP_SECONDS // 60} minutes; try again later."
        )
