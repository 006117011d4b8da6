"""Unpacking zip files that strangers send: no path outside the folder, no bomb, nothing half-unpacked."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from mmkit.data.listing import is_hidden
from mmkit.errors import InputError
from mmkit.storage import clean, temporary_name
from mmkit.storage.files import expanded

MAX_FILES = 100_000
MAX_BYTES = 4_000_000_000


def extract_zip(
    archive: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    suffixes: Iterable[str] | None = None,
    max_files: int = MAX_FILES,
    max_bytes: int = MAX_BYTES,
    left_out: Counter[str] | None = None,
) -> Path:
    """Unpack `archive` into the new folder `folder`, which appears only when everything went well.

    Args:
        archive: a `.zip` file.
        folder: must not exist yet, or be empty.
        suffixes: unpack only names that end so (lower case, with dot); other files are left out.
        max_files: more entries are refused.
        max_bytes: more unpacked bytes are refused, by the archive's own statement and while unpacking.
        left_out: counts the files that `suffixes` leave out, by suffix.

    Raises:
        InputError: not a readable zip, encrypted, beyond a limit, a link, or an entry that points outside the folder.
    """
    archive, folder = expanded(archive), expanded(folder)
    if not os.path.isfile(archive):
        raise InputError(f"{archive} does not exist or is not a file.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already and is not empty.")
    endings = None if suffixes is None else tuple(suffixes)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        clean(folder.parent)
        temporary = folder.parent / temporary_name()
        temporary.mkdir(mode=0o700)
    except OSError as error:
        raise InputError(f"{archive} cannot be unpacked into {folder}: {error}") from error
    try:
        with zipfile.ZipFile(archive) as source:
            left = max_bytes
            for entry, target in _checked_entries(source, archive, max_files, max_bytes):
                if endings is None or target.suffix.lower() in endings:
                    left -= _extract_one(source, entry, temporary / target, left, archive, max_bytes)
                elif left_out is not None:
                    left_out[target.suffix.lower() or target.name] += 1
        if folder.exists():
            folder.rmdir()
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except InputError:
        raise
    except Exception as error:  # a damaged zip fails anywhere inside zipfile and its decompressors
        raise InputError(f"{archive} is not a readable zip file: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _checked_entries(
    source: zipfile.ZipFile, archive: Path, max_files: int, max_bytes: int
) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """The file entries with their safe relative paths; everything is checked before anything is written."""
    entries = [e for e in source.infolist() if not e.is_dir()]
    if len(entries) > max_files:
        raise InputError(f"{archive} holds {len(entries)} files; the limit is {max_files}.")
    total = sum(e.file_size for e in entries)
    if total > max_bytes:
        raise InputError(f"{archive} unpacks to {total / 1e6:.0f} MB; the limit is {max_bytes / 1e6:.0f} MB.")
    result, seen = [], set()
    for entry in entries:
        name = entry.filename.replace("\\", "/")
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or "\0" in name:
            raise InputError(
                f"{archive} holds {entry.filename!r}, which points outside the folder; nothing was unpacked."
            )
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise InputError(f"{archive} holds the link {entry.filename!r}; nothing was unpacked.")
        if entry.flag_bits & 0x1:
            raise InputError(f"{archive} is encrypted; unpack it and pass the folder.")
        if any(is_hidden(part) for part in path.parts):
            continue
        if path in seen:
            raise InputError(f"{archive} holds {entry.filename!r} twice; nothing was unpacked.")
        seen.add(path)
        result.append((entry, path))
    return result


def _extract_one(
    source: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, left: int, archive: Path, max_bytes: int
) -> int:
    """Copy one entry, counting what really comes out; returns the number of bytes."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        written = 0
        with source.open(entry) as packed, open(target, "xb") as file:
            while chunk := packed.read(1 << 20):
                written += len(chunk)
                if written > left:
                    raise InputError(f"{archive} unpacks to more than the limit of {max_bytes / 1e6:.0f} MB.")
                file.write(chunk)
        return written
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{archive} uses {entry.filename!r} both as a file and as a folder.") from None
    except OSError as error:  # a name or size the file system does not take
        raise InputError(f"{archive}: {entry.filename!r} cannot be unpacked: {error}") from error
