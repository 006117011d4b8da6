"""The exceptions mmkit raises on purpose: each is an `MMKitError` and also the builtin a caller would expect.

A message says what was given, what was expected, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class MMKitError(Exception):
    """Base class: `except MMKitError` catches everything mmkit raises on purpose."""


class InputError(MMKitError, ValueError):
    """An argument, image, clip, data set or configuration cannot be used."""


class RunDiffersError(InputError):
    """A folder holds a run that cannot be continued, because something that decides its result is another now.

    `changes` says what: the name of the argument -> a phrase. Command line and studio put it in their own words.
    """

    def __init__(
        self, folder: object, changes: Mapping[str, str], names: Mapping[str, str] | None = None, advice: str = ""
    ):
        told = [f"{(names or {}).get(k, k)}: {v}" for k, v in changes.items()]
        more = f" (and {len(told) - 4} more)" if len(told) > 4 else ""
        advice = advice or "Use the same to continue, resume=False to start over, or another output_dir."
        super().__init__(f"{folder} holds a run that differs. {'; '.join(told[:4])}{more}. {advice}")
        self.folder, self.changes = folder, dict(changes)

    def reworded(self, names: Mapping[str, str], advice: str) -> RunDiffersError:
        """The same with other names of the arguments and another advice."""
        return RunDiffersError(self.folder, self.changes, names, advice)


class CheckpointError(MMKitError, ValueError):
    """A weight or adapter file is unreadable, unsafe, or belongs to another model."""


class StorageError(MMKitError, OSError):
    """A file or folder could not be written: the disk is full, the place is read-only, a name is too long."""


class NotMergeableError(MMKitError, ValueError):
    """An adapter cannot be folded into the weights; nothing was changed. `sites` names the places."""

    def __init__(self, message: str, sites: Iterable[str] = ()):
        super().__init__(message)
        self.sites = tuple(sites)


class BackendUnavailableError(MMKitError, ImportError):
    """An optional package or device that was asked for is missing; the message names the pip command."""


class TrainingError(MMKitError, RuntimeError):
    """Training could not go on. `step` (1-based), `files` of the batch, and `saved`: the folder of the state before it."""

    def __init__(self, message: str, step: int = 0, files: Iterable[str] = (), saved: object = None):
        super().__init__(message)
        self.step, self.files, self.saved = step, tuple(files), saved


def nearest(name: str, candidates: Iterable[str], n: int = 5) -> str:
    """A sentence fragment that offers the known names closest to `name`, for error messages."""
    known = sorted(set(candidates))
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.4)
    if close:
        return f"Did you mean {', '.join(map(repr, close))}?"
    shown = ", ".join(map(repr, known[:12]))
    return f"Known: {shown}{', ...' if len(known) > 12 else ''}." if known else "None are known."
