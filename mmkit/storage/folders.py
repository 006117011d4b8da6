"""Folders that appear whole or not at all, hold one kind of thing, say which, and carry the digest of every file.

`mmkit.json` in the folder holds "kind", "format", "mmkit_version", what the writer had to say, and "files": the sha256 of each.
A folder is filled in a hidden one beside it, `.mmkit-...tmp/new`, and renamed into place; what it replaces waits in
`.mmkit-...tmp/old` meanwhile. After a crash between the two renames the next reader or writer puts the old folder back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmkit import __version__
from mmkit.errors import CheckpointError, InputError
from mmkit.storage.files import (
    FORMAT,
    MANIFEST,
    a_kind,
    absolute,
    check_outside,
    left_behind,
    read_manifest,
    remove,
    sha256_file,
    sync,
    temporaries,
    temporary_name,
    write_json,
    writing,
)

_DOCUMENTS = {
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
}  # may be added or edited, and say nothing to a reader
_drafts: dict[Path, dict[str, Any]] = {}  # folders being filled -> their facts


# ------------------------------------------------------------------------------------------------------------ writing


@contextlib.contextmanager
def new_folder(
    path: str | os.PathLike[str],
    kind: str,
    facts: Mapping[str, Any] | None = None,
    *,
    keep: Iterable[str] = (),
    replaces: Iterable[str] = (),
) -> Iterator[Path]:
    """Yield a hidden folder to fill; when the block ends without an error it is sealed and takes the place of `path`.

    A writer may call other writers on the yielded folder: they add their files and facts to it.

    Args:
        path: where the folder goes. One of the same kind is replaced whole.
        kind: what it holds, such as "adapter" or "backbone".
        facts: JSON-friendly, written into `mmkit.json` beside kind and digests.
        keep: names inside `path` that stay when the rest is replaced, such as the state of a run.
        replaces: other kinds that may be replaced.

    Raises:
        InputError: `path` is a file, is or holds the working directory, holds another kind, or files that mmkit did not
            write there.
        StorageError: it could not be written; `path` is as it was and no temporary is left.
    """
    target = absolute(path)
    if target in _drafts:
        _drafts[target].update(facts or {})
        yield target
        return
    target, keep, kinds = target.resolve(), tuple(keep), (kind, *replaces)
    check_free(target, kinds, keep)
    work = target.parent / temporary_name()
    draft = work / "new"
    with writing(target):
        try:
            draft.mkdir(parents=True)
            (work / "name").write_bytes(os.fsencode(target.name))
            _drafts[draft] = {"kind": kind, "format": FORMAT, "mmkit_version": __version__, **(facts or {})}
            yield draft
            _seal(draft, _drafts[draft], keep)
            check_free(target, kinds, keep)  # others may have written meanwhile
            _swap(work, target, keep)
        finally:
            _drafts.pop(draft, None)
            _conclude(work)


def check_free(path: str | os.PathLike[str], kinds: Iterable[str], keep: Iterable[str] = ()) -> None:
    """Raise `InputError` unless a folder of one of `kinds` may be written at `path`; see `new_folder`."""
    target = absolute(path).resolve()
    check_outside(target)
    recover(target)
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file; give a folder.")
    if Path.cwd().is_relative_to(target):
        raise InputError(
            f"{target} is the working directory or holds it and cannot be replaced; give a folder below it."
        )
    manifest = read_manifest(target) if (target / MANIFEST).is_file() else None
    if manifest is not None and manifest["kind"] not in kinds:
        raise InputError(
            f"{target} holds {a_kind(manifest['kind'])}, not {a_kind(next(iter(kinds)))}. Choose another folder, or delete it."
        )
    known = manifest["files"] if manifest is not None else {}
    found = _files(target)  # once: a run that is under way adds and removes files
    strangers = sorted(found.keys() - set(known) - {MANIFEST} - _below(found, keep))
    if strangers:
        raise InputError(
            f"{target} holds files that would be lost: {_some(strangers)}. Choose another folder, or move them away."
        )


def check_no_saved(path: str | os.PathLike[str]) -> None:
    """Raise `InputError` when `path` holds something that was saved whole, which further files would spoil."""
    folder = absolute(path)
    if os.path.isfile(folder / MANIFEST):  # unlike pathlib's, it takes names of any length
        raise InputError(f"{folder} holds {a_kind(read_manifest(folder)['kind'])}, no run. Choose another folder.")
    check_outside(folder)


def _seal(draft: Path, manifest: dict[str, Any], keep: tuple[str, ...]) -> None:
    """Have the disk hold everything, and write the manifest last."""
    files = _files(draft)
    files.pop(MANIFEST, None)
    for file in files.values():
        sync(file)
    manifest["files"] = {name: sha256_file(files[name]) for name in sorted(files)}
    if keep:
        manifest["kept"] = list(keep)
    write_json(draft / MANIFEST, manifest)
    for folder in {file.parent for file in files.values()}:
        sync(folder)


def _swap(work: Path, target: Path, keep: tuple[str, ...]) -> None:
    old, draft = work / "old", work / "new"
    if target.exists():
        shutil.copymode(target, draft)
        os.replace(target, old)
    os.replace(draft, target)
    _move_kept(old, target, keep)
    sync(target.parent)


def _move_kept(old: Path, target: Path, keep: Iterable[str]) -> None:
    for name in keep:
        if (old / name).exists() and not (target / name).exists():
            os.replace(old / name, target / name)


def _conclude(work: Path) -> None:
    """End a replacement wherever it stopped: the old folder goes back unless the new one is in place."""
    old = work / "old"
    if old.is_dir():
        target = work.parent / os.fsdecode((work / "name").read_bytes())
        if target.exists():
            _move_kept(old, target, read_manifest(target).get("kept", ()))
        else:
            os.replace(old, target)
    remove(work)


def recover(path: Path) -> None:
    """Conclude what killed processes began beside `path`; wait while a living one is between its two renames."""
    for _ in range(100):
        works = [w for w in temporaries(path.parent) if w.is_dir()]
        for work in filter(left_behind, works):
            with writing(path):
                _conclude(work)
        if os.path.lexists(path) or not any((w / "old").is_dir() for w in works):
            return
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------------ reading


def require_folder(path: str | os.PathLike[str]) -> Path:
    """`path` as an absolute directory; raises `InputError` when it is not one."""
    folder = absolute(path)
    if not os.path.isdir(folder):
        recover(folder)
    if not os.path.isdir(folder):
        raise InputError(f"{folder} is not a folder.")
    return folder


def open_folder(
    path: str | os.PathLike[str], kind: str | tuple[str, ...] | None = None, *, required: bool = True
) -> dict[str, Any] | None:
    """The parsed `mmkit.json` of a folder, after every file was compared with its digest.

    Args:
        path: a folder written by `new_folder`.
        kind: what it must hold; several are allowed, None takes any.
        required: `False` returns None for a folder without `mmkit.json` (of another library, or an older mmkit).

    Raises:
        InputError: not a folder.
        CheckpointError: no manifest, another kind, files missing, changed or added since; named.
    """
    folder = absolute(path)
    recover(folder)
    folder = require_folder(folder)
    if not os.path.isfile(folder / MANIFEST) and not required:
        return None
    manifest = read_manifest(folder)
    wanted = (kind,) if isinstance(kind, str) else kind
    if wanted is not None and manifest["kind"] not in wanted:
        raise CheckpointError(
            f"{folder} holds {a_kind(manifest['kind'])}; expected {' or '.join(map(a_kind, wanted))}."
        )
    for _ in range(5):
        faults = _faults(folder, manifest)
        if not faults:
            return manifest
        recover(folder)
        if (now := read_manifest(folder)) == manifest:
            break
        manifest = now  # replaced by another process while its files were compared
    raise CheckpointError(
        f"{folder} is not as it was saved ({'; '.join(faults)}). Save or copy the folder again, whole."
    )


def _faults(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """How the files of a folder differ from what its manifest lists."""
    found = _files(folder)
    listed = manifest["files"]
    missing = sorted(listed.keys() - found.keys() - _DOCUMENTS)
    added = sorted(found.keys() - listed.keys() - {MANIFEST} - _DOCUMENTS - _below(found, manifest.get("kept", ())))
    compared = sorted((listed.keys() & found.keys()) - _DOCUMENTS)
    changed = [name for name in compared if not _is_as_listed(found[name], listed[name])]
    return [
        f"{what}: {_some(names)}"
        for what, names in (("missing", missing), ("changed", changed), ("not written with it", added))
        if names
    ]


def _is_as_listed(file: Path, digest: str) -> bool:
    try:
        return sha256_file(file) == digest
    except CheckpointError:
        if file.exists():  # there, and not to be read: that is another fault
            raise
        return False


def _files(folder: Path) -> dict[str, Path]:
    """Files below `folder` by relative name; hidden ones (.DS_Store, .gitattributes) belong to other programs."""
    found: dict[str, Path] = {}
    for place, folders, names in os.walk(folder):  # unlike pathlib's, it bears folders that go away meanwhile
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(place, name) for name in names if not name.startswith("."))
        found |= {p.relative_to(folder).as_posix(): p for p in paths if p.is_file()}
    return found


def _below(found: Iterable[str], folders: Iterable[str]) -> set[str]:
    kept = tuple(folders)
    return {n for n in found if n.partition("/")[0] in kept}


def _some(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
