"""One run per folder: the lock of a living process, given back by the system itself when the process dies."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmkit.errors import InputError
from mmkit.storage.files import absolute, clean, writing

LOCK = ".mmkit.lock"
_held: dict[Path, int] = {}  # folder -> the thread that holds it; a process's own file locks do not exclude its threads


@contextlib.contextmanager
def folder_lock(path: str | os.PathLike[str], *, beside: bool = False) -> Iterator[Path]:
    """Hold `path` (created when missing) for the block; the same thread may enter it again.

    Left-overs of killed processes in it are removed. A folder created here and left empty is removed at the end.

    Args:
        beside: the lock lies beside `path`, which is replaced whole during the block, and not in it; then it is not created either.

    Raises:
        InputError: a living process, or one of another machine, is using the folder; it is named.
        StorageError: the folder cannot be written.
    """
    folder = absolute(path).resolve()
    if _held.get(folder) == threading.get_ident():
        yield folder
        return
    if folder in _held:
        raise InputError(
            f"{folder} is in use by another thread of this process. Wait for it, or choose another folder."
        )
    place = folder.parent if beside else folder
    lock = place / (f"{LOCK}-{folder.name}" if beside else LOCK)
    with writing(folder):
        created = not place.exists()
        place.mkdir(parents=True, exist_ok=True)
        handle = _acquire(folder, lock)
    _held[folder] = threading.get_ident()
    try:
        clean(place)
        yield folder
    finally:
        del _held[folder]
        with contextlib.suppress(OSError):  # the folder may be gone
            lock.unlink()
        os.close(handle)
        if created:
            with contextlib.suppress(OSError):  # not empty: it was used
                place.rmdir()


def _acquire(folder: Path, lock: Path) -> int:
    """The open, locked lock file, with this process written into it."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not try_lock(handle):
                raise InputError(_in_use(folder, _read(handle), "Wait for it, or choose another folder."))
            if not _is_current(handle, lock):  # given back and removed between opening and locking
                os.close(handle)
                continue
            owner = _read(handle)
            if owner and owner.get("host") != _me()["host"] and owner.get("boot") != _me()["boot"]:
                way_out = f"If that process has ended, delete {lock}; else choose another folder."
                raise InputError(_in_use(folder, owner, way_out))
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(_me()).encode(), 0)
            return handle
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(handle)
            raise


def try_lock(handle: int) -> bool:
    """Take the system's lock on an open file: bound to this process, not inherited by forked data workers."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, 1 << 20, os.SEEK_SET)  # beyond the content, which others must be able to read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_current(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _me() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")  # containers of one machine share its kernel, and so its locks
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "boot": boot.read_text().strip() if boot.is_file() else platform.node(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _read(handle: int) -> dict[str, Any]:
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        owner = json.loads(os.read(handle, 4096))
    except (ValueError, RecursionError):  # empty, or torn by a crash
        return {}
    return owner if isinstance(owner, dict) else {}


def _in_use(folder: Path, owner: dict[str, Any], way_out: str) -> str:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since {owner.get('since', '?')}"
    return f"{folder} is in use by another run ({who}). {way_out}"
