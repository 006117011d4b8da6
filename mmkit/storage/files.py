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
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmkit.errors import CheckpointError, InputError, MMKitError, StorageError

MANIFEST = "mmkit.json"
"""Of a folder that was saved whole: what it holds, and the digest of every file."""
FORMAT = 1
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
    errno.ENOTEMPTY: "another process wrote it at the same moment; try again, or choose another folder",
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


# ------------------------------------------------------------------------------------------------------ where to write


def read_manifest(folder: Path) -> dict[str, Any]:
    """The parsed `mmkit.json` of a folder that was saved whole. Raises `CheckpointError` when it is damaged."""
    path = folder / MANIFEST
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("kind"), str):
        raise CheckpointError(f"{path} does not say what the folder holds.")
    if not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{path} lists no files.")
    kept = manifest.get("kept", [])
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise CheckpointError(f"{path}: 'kept' is no list of names.")
    if not isinstance(manifest.get("format"), int) or manifest["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.get('format')!r}; this mmkit reads up to {FORMAT}. Upgrade mmkit."
        )
    return manifest


def a_kind(kind: str) -> str:
    """`kind` with its article."""
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"


def check_outside(path: str | os.PathLike[str]) -> None:
    """Raise `InputError` when `path` lies in a folder that was saved whole: it would no longer be as it was saved."""
    target = absolute(path).resolve()
    for folder in target.parents:
        if not os.path.isfile(folder / MANIFEST):
            continue
        manifest = read_manifest(folder)
        if target.relative_to(folder).parts[0] not in manifest.get("kept", ()):
            raise InputError(
                f"{target} lies in {folder}, which holds {a_kind(manifest['kind'])} and would no longer be as it was saved. "
                "Choose a place beside it."
            )


def check_writable(path: str | os.PathLike[str]) -> Path:
    """`path`, made absolute, if a file could be written there now: asked before work that would be lost otherwise. Nothing is made.

    Raises:
        InputError: it lies in a folder that was saved whole.
        StorageError: there is a folder of that name, a part of the path is a file, the place is read-only, the name is too long.
    """
    target = absolute(path)
    check_outside(target)
    with writing(target):
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(target.stat().st_mode):
                raise IsADirectoryError(errno.EISDIR, "")
        place = next(parent for parent in target.parents if os.path.lexists(parent))
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "")
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "")
    return target


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
        InputError: `path` lies in a folder that was saved whole and would no longer be as it was saved.
        StorageError: the disk is full, the place is read-only, a part of the path is a file, the name is too long. No
            temporary is left.
    """
    path = absolute(path)
    check_outside(path)
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
