"""The one grammar for naming modules: full names ("blocks.0.attn.qkv"), endings ("attn.qkv", "qkv"), wildcards ("blocks.[0-5].*")."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from mmkit.errors import InputError, nearest

MAX_PATTERN = 512


def match_targets(targets: Sequence[str] | str, paths: Iterable[str]) -> list[str]:
    """The `paths` that one of `targets` names, in their own order.

    A wildcard pattern may also match an ending: "attn.*" is every child of every `attn`. Matching takes time linear in the
    length of a path, whatever the pattern.

    Raises `InputError` for a pattern that is no text or longer than 512 characters.
    """
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    for pattern in patterns:
        if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_PATTERN:
            raise InputError(
                f"A target is a module's name, an ending or a wildcard pattern, not {str(pattern)[:60]!r}."
            )
    plain = tuple(f".{p}" for p in patterns if not any(c in p for c in "*?["))
    # fnmatch writes every `*` as an atomic group, so that its expressions cannot backtrack
    wild = [re.compile(fnmatch.translate(p)) for p in patterns if any(c in p for c in "*?[")]
    return [p for p in paths if (plain and f".{p}".endswith(plain)) or any(_matches(w, p) for w in wild)]


def _matches(pattern: re.Pattern[str], path: str) -> bool:
    """The pattern against the whole path and against each of its endings."""
    start = 0
    while start >= 0:
        if pattern.match(path, start):
            return True
        start = path.find(".", start) + 1 or -1
    return False


def shortest_endings(paths: Iterable[str], others: Iterable[str]) -> list[str]:
    """Endings that name all `paths` and none of `others`, as short as possible: "qkv", or "pool.qkv" where others end the same."""
    rest, found = [f".{p}" for p in others], set()
    for path in paths:
        parts = path.split(".")
        endings = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        found.add(next((e for e in endings if not any(r.endswith(f".{e}") for r in rest)), path))
    return sorted(found)


def no_match(
    method: str, targets: Sequence[str] | str | None, candidates: Sequence[str], names: Sequence[str]
) -> InputError:
    """The error for targets that name no module `method` can act on: says what exists under that name, else what is near."""
    if not candidates:
        return InputError(f"The model has no module that {method!r} can adapt (targets={targets!r}).")
    wanted = targets if isinstance(targets, str) else (targets or ("",))[0]
    there = match_targets(targets, [n for n in names if n]) if targets else []
    reason = f"{there[:3]} exist but {method!r} cannot act on them. " if there else ""
    endings = [c.rpartition(".")[2] for c in candidates]
    return InputError(
        f"No module matches targets={targets!r} for adapter {method!r}. {reason}{nearest(wanted, [*endings, *candidates])}"
    )
