"""Single files that appear complete or not at all, and the hidden temporaries they are written in."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmkit.errors import CheckpointError, InputError, MMKitError, StorageError

_DAY = 86_400.0
_cleaned: set[Path] = set()


# -------------------------------------------------------------------------------------------------- paths and errors


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with `~` expanded; a name that merely begins so (`~$draft.png`, a user that there is not) stays, as in a shell.

    Raises `InputError` for what is no path, an empty one (it would be the working directory), and a null character.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise InputError(f"A path is a text or a pathlib.Path, not {type(path).__name__}.")
    text = os.fspath(path)
    if not text:
        raise InputError("The path is empty. Give a file or a folder; '.' is the working directory.")
    if "\0" in text:
        raise InputError(f"{text!r} holds a null character, which no path can.")
    return Path(os.path.expanduser(text))  # pathlib's raises a RuntimeError for an unknown user


def absolute(path: str | os.PathLike[str]) -> Path:
    """`expanded` and made absolute, so that a later change of the working directory does not move it. Raises `InputError`."""
    return Path(os.path.abspath(expanded(path)))


_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "there is no permission to write there; choose another place",
    errno.EPERM: "there is no permission to write there; choose another place",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENOTDIR: "a part of the path is a file; choose another place",
    errno.EEXIST: "a part of the path is a file; choose another place",
    errno.EISDIR: "there is a folder of that name; choose another name",
    errno.EBUSY: "it is in use or a mounted volume; choose a folder below it",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn any `OSError` of the block into a `StorageError`: one sentence with the path, the reason and the way out."""
    try:
        yield
    except OSError as error:
        if isinstance(error, MMKitError):
            raise
        reason = _ADVICE.get(error.errno or 0, str(error))
        raise StorageError(f"{path} cannot be written: {reason}.") from error


# ------------------------------------------------------------------------------------------------------- temporaries


def temporary_name() -> str:
    """A hidden name that tells which process made it, so that what a killed process leaves behind can be told apart."""
    return f".mmkit-{_host()}-{os.getpid()}-{_started(os.getpid())}-{secrets.token_hex(4)}.tmp"


def left_behind(temporary: Path) -> bool:
    """Whether the process that made this temporary is gone (one of another machine: whether it is a day old)."""
    try:
        host, pid, started = temporary.name.removeprefix(".mmkit-").split("-")[:3]
        if host == _host():
            return abs(_started(int(pid)) - int(started)) > 10  # the clock may have been set since
        return time.time() - temporary.lstat().st_mtime > _DAY
    except (ValueError, OSError):
        return False


def temporaries(folder: Path) -> list[Path]:
    """The temporaries in `folder`, of whatever process."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [Path(e.path) for e in entries if e.name.startswith(".mmkit-") and e.name.endswith(".tmp")]
    return []


def clean(folder: Path) -> None:
    """Remove the temporaries that killed processes left in `folder`, but for those that hold what they were replacing."""
    for path in temporaries(folder):
        if left_behind(path) and not os.path.lexists(path / "old"):
            with contextlib.suppress(OSError):
                remove(path) if path.is_dir() else path.unlink()


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _started(pid: int) -> int:
    """When process `pid` was started, in seconds since 1970; 0 when there is none (any more)."""
    import psutil

    try:
        process = psutil.Process(pid)
        return 0 if process.status() == psutil.STATUS_ZOMBIE else int(process.create_time())
    except psutil.NoSuchProcess:
        return 0


# ------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the final name only when the block ends without an error.

    Raises:
        StorageError: the disk is full, the place is read-only, a part of the path is a file, the name is too long. No
            temporary is left.
    """
    path = absolute(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent not in _cleaned:  # once per process: a folder may hold many files
            _cleaned.add(path.parent)
            clean(path.parent)
        temporary = path.with_name(temporary_name())
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the kernel applies the umask
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors puts a private file in its place
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk hold what was written: a file's content, or a folder's names."""
    if path.is_dir():
        if os.name != "posix":  # Windows cannot open a folder; renames are atomic there as well
            return
        handle = os.open(path, os.O_RDONLY)
    else:
        handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Delete a folder that may be half gone already."""
    shutil.rmtree(folder, ignore_errors=True)


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as JSON (in one line with `indent=None`), atomically. Raises `StorageError`."""
    text = json.dumps(value, indent=indent) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; raises `CheckpointError` naming the file when it is missing or damaged."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: neither UTF-8 nor JSON
        raise CheckpointError(f"{path} is not a readable JSON file: {error}. Save or download it again.") from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's content as 64 hexadecimal digits. Raises `CheckpointError` when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
