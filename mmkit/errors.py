"""The exceptions mmkit raises on purpose: each is an `MMKitError` and also the builtin a caller would expect.

A message says what was given, what was expected, and what to do next.
"""

from __future__ import annotations

import contextlib
import difflib
import numbers
from collections.abc import Iterable, Iterator, Mapping


class MMKitError(Exception):
    """Base class: `except MMKitError` catches everything mmkit raises on purpose."""


class InputError(MMKitError, ValueError):
    """An argument, image, clip, data set or configuration cannot be used."""


class RunDiffersError(InputError):
    """A folder holds a run that cannot be continued, because something that decides its result is another now.

    `changes` says what: the name of the argument -> a phrase. `finished`: whether the run in the folder had come to its end.
    """

    def __init__(
        self,
        folder: object,
        changes: Mapping[str, str],
        *,
        finished: bool = False,
        advice: str = "Use the same to continue, resume=False to start over, or another output_dir.",
    ):
        told = [f"{k}: {v}" for k, v in changes.items()]
        more = f" (and {len(told) - 4} more)" if len(told) > 4 else ""
        super().__init__(f"{folder} holds a run that differs. {'; '.join(told[:4])}{more}. {advice}")
        self.folder, self.changes, self.finished = folder, dict(changes), finished

    def reworded(self, folder: object, names: Mapping[str, str], advice: str) -> RunDiffersError:
        """The same in the words of another interface: its names of the arguments, its advice."""
        changes: dict[str, str] = {}
        for key, phrase in self.changes.items():
            changes.setdefault(names.get(key, key), phrase)
        return RunDiffersError(folder, changes, finished=self.finished, advice=advice)


@contextlib.contextmanager
def in_words(names: Mapping[str, str], advice: str) -> Iterator[None]:
    """Inside the block a run that differs is told in the words of another interface: its names of the arguments, its advice."""
    try:
        yield
    except RunDiffersError as error:
        raise error.reworded(error.folder, names, advice) from None


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


class InterruptedRun(MMKitError, KeyboardInterrupt):
    """A run ended by Ctrl-C or SIGTERM with its state saved. `number`: of the signal."""

    def __init__(self, steps: int, number: int, folder: object):
        super().__init__(
            f"Interrupted after {steps} steps; the state is saved in {folder}. Run the same command again to continue."
        )
        self.number = number


MAX_SEED = 2**32 - 1
"""Seeds lie within ± this, as numpy and torch both take them."""


def check_seed(seed: object) -> None:
    """Raise `InputError` unless `seed` is a whole number that every generator of random numbers takes."""
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or abs(int(seed)) > MAX_SEED:
        raise InputError(f"seed must be a whole number within ±{MAX_SEED}, not {seed!r}.")


def nearest(name: str, candidates: Iterable[str], n: int = 5) -> str:
    """A sentence fragment that offers the known names closest to `name`, for error messages."""
    known = sorted(set(candidates))
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.4)
    if close:
        return f"Did you mean {', '.join(map(repr, close))}?"
    shown = ", ".join(map(repr, known[:12]))
    return f"Known: {shown}{', ...' if len(known) > 12 else ''}." if known else "None are known."
