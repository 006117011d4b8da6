"""The exceptions mmkit raises on purpose: each is an `MMKitError` and also the builtin a caller would expect.

A message says what was given, what was expected, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MMKitError(Exception):
    """Base class: `except MMKitError` catches everything mmkit raises on purpose."""


class InputError(MMKitError, ValueError):
    """An argument, image, clip, data set or configuration cannot be used."""


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
